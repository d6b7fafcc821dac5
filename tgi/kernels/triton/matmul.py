"""Products with plain matrices in which rows don't know of each other, however many there are.

torch's own take another kernel for another number of rows, and with it another order of sums. Here tiles have one size,
and so have the ways in which columns are split: both depend on the matrix alone.
"""

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.split import add, split, store
from tgi.kernels.triton.tiles import tile

_AT_ONCE = 512
"""Rows, at most, of which there are sums of parts: tens of megabytes."""


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """[tokens, inner] times contiguous [outs, inner] → [tokens, outs], ``bias`` [outs] added; ``factor`` times that is
    added to ``into``, contiguous, if it is given. Sums are in float32."""
    x = x.contiguous()
    assert weight.is_contiguous() and x.dtype == weight.dtype
    outs, inner = weight.shape
    out = x.new_empty(len(x), outs) if into is None else into
    added = None if into is None else factor
    constants = tile("matmul" if x.dtype.itemsize == 2 else "matmul of float32", x.device)
    across = triton.cdiv(outs, constants["OUTS"])
    ways, each = split(across, triton.cdiv(inner, constants["INNER"]), x.device)
    for first in range(0, len(x), _AT_ONCE):
        rows = x[first : first + _AT_ONCE]
        own = out[first : first + _AT_ONCE]
        parts = own if ways == 1 else x.new_empty(ways, *own.shape, dtype=torch.float32)
        _matmul[triton.cdiv(len(rows), constants["ROWS"]), across, ways](
            *(rows, weight, bias if ways == 1 else None, parts, added if ways == 1 else None),
            *(len(rows), outs, inner, each * constants["INNER"]),
            **constants,
        )
        if ways > 1:
            add(parts, bias, own, added)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _matmul(
    x,
    weight,
    bias,
    out,
    factor,
    tokens,
    outs,
    inner,
    share,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    begin = tl.program_id(2) * share
    known_token, known_row = (token < tokens)[:, None], (row < outs)[None, :]
    x += token.to(tl.int64)[:, None] * inner
    weight += row.to(tl.int64)[None, :] * inner
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(begin, tl.minimum(begin + share, inner), INNER):
        column = start + tl.arange(0, INNER)
        known = column < inner
        inputs = tl.load(x + column[None, :], mask=known_token & known[None, :], other=0)
        numbers = tl.load(weight + column[:, None], mask=known_row & known[:, None], other=0)
        total = tl.dot(inputs, numbers, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + row, mask=row < outs, other=0).to(tl.float32)[None, :]
    at = (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * outs + row[None, :]
    store(out + at, total, factor, known_token & known_row)
