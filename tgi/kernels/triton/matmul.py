"""Products with matrices of plain numbers, or of float8 with scales, in tiles of our own.

torch's own take another kernel for another number of rows, and with it another order of sums. Here that can depend on
the matrix and the tile alone.
"""

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.split import AT_ONCE, add, split, store
from tgi.kernels.triton.tiles import tile

GROUP = 128
"""Columns of a tile of float8, which have one scale."""


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    factor: float = 1.0,
    *,
    scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    rows: int = 64,
    fixed: bool = False,
) -> torch.Tensor:
    """[tokens, inner] times contiguous [outs, inner] → [tokens, outs] in x's own numbers, or ``dtype``; sums are in
    float32.

    ``scale``: float32 [groups, outs], one for each of a row's equal parts of columns, which are multiples of GROUP if
    there are several; ``x_scale``: float32 [tokens, groups], of those of x. ``bias``: [outs], added. ``factor`` times
    the result is added to ``into``, contiguous, if that is given. ``rows``: of a tile. If ``fixed``, a row's result
    depends on no other row, nor on how many there are.
    """
    x = x.contiguous()
    assert weight.is_contiguous()
    outs, inner = weight.shape
    groups = 1 if scale is None else len(scale)
    out = x.new_empty(len(x), outs, dtype=dtype) if into is None else into
    added = None if into is None else factor
    constants = tile(f"matmul, {8 * x.dtype.itemsize} bits by {8 * weight.dtype.itemsize}", x.device)
    across = triton.cdiv(outs, constants["OUTS"])
    along = triton.cdiv(inner, constants["INNER"])
    ways, each = split(across if fixed else across * triton.cdiv(len(x), rows), along, x.device)
    step = AT_ONCE if fixed else max(len(x), 1)
    for first in range(0, len(x), step):
        at_once = slice(first, first + step)
        some, own = x[at_once], out[at_once]
        parts = own if ways == 1 else x.new_empty(ways, *own.shape, dtype=torch.float32)
        scales = scale, None if x_scale is None else x_scale[at_once]
        _matmul[triton.cdiv(len(some), rows), across, ways](
            *(some, weight, *scales, bias if ways == 1 else None, parts, added if ways == 1 else None),
            *(len(some), outs, inner, each * constants["INNER"]),
            ROWS=rows,
            PART=inner // groups if groups > 1 else 0,
            **constants,
        )
        if ways > 1:
            add(parts, bias, own, added)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _matmul(
    x,
    weight,
    scale,
    x_scale,
    bias,
    out,
    factor,
    tokens,
    outs,
    inner,
    share,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    OUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    # Transposed: tensor cores take many outputs at once, from registers if they are converted there, and any few rows.
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    begin = tl.program_id(2) * share
    known_row, known_token = row < outs, token < tokens
    x += token.to(tl.int64)[None, :] * inner
    weight += row.to(tl.int64)[:, None] * inner
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for start in range(begin, tl.minimum(begin + share, inner), INNER):
        column = start + tl.arange(0, INNER)
        known = column < inner
        numbers = tl.load(weight + column[None, :], mask=known_row[:, None] & known[None, :], other=0.0)
        inputs = tl.load(x + column[:, None], mask=known[:, None] & known_token[None, :], other=0.0)
        numbers = numbers.to(inputs.dtype)
        if PART > 0:
            product = tl.dot(numbers, inputs)
            product *= tl.load(scale + start // PART * outs + row, mask=known_row, other=0)[:, None]
            if x_scale is not None:
                own = x_scale + token * (inner // PART) + start // PART
                product *= tl.load(own, mask=known_token, other=0)[None, :]
            total += product
        else:
            total = tl.dot(numbers, inputs, total, input_precision="ieee")
    if scale is not None and PART == 0:
        total *= tl.load(scale + row, mask=known_row, other=0)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=known_row, other=0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * tokens + token).to(tl.int64)[None, :] * outs + row[:, None]
    store(out + at, total, factor, known_row[:, None] & known_token[None, :])
