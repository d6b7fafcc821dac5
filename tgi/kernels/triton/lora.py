"""Low-rank adapters, another one for each row or none (Chen et al., Punica, arXiv 2310.18547; Sheng et al., S-LoRA,
arXiv 2311.03285). Linear layers will call this behind their product once a server holds several adapters.

Rows are put in the order of adapters as they are in that of experts. Shrinking reads all columns and makes few numbers:
columns are split among programs, and what these make is added in one order as it is expanded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.experts import Pairs, most_tiles, tile_rows
from tgi.kernels.triton.tiles import tile


@dataclass(frozen=True, slots=True)
class Adapters:
    """Of one matrix, in the numbers of activations; ranks are filled up to the largest with zeros."""

    a: torch.Tensor
    """[adapters, rank, inner], contiguous."""
    b: torch.Tensor
    """[adapters, outs, rank], contiguous."""
    scale: torch.Tensor
    """float32 [adapters]."""


def add(into: torch.Tensor, x: torch.Tensor, adapters: Adapters, rows: Pairs) -> None:
    """Add scale · B · A · x of its adapter to each row of ``into`` [tokens, outs], which may be some columns of a
    tensor. ``x``: [tokens, inner]. ``rows``: what ``experts.arrange`` makes of int32 [tokens, 1], the adapter of each
    row, -1: none. A row's result doesn't depend on the others."""
    x = x.contiguous()
    count, rank, inner = adapters.a.shape
    outs, tokens = adapters.b.shape[1], len(x)
    shrink, expand = dict(tile("lora, shrink", x.device)), dict(tile("lora, expand", x.device))
    splits = shrink.pop("SPLITS")
    each = triton.cdiv(triton.cdiv(inner, shrink["INNER"]), splits) * shrink["INNER"]
    parts = x.new_empty(splits, tokens, rank, dtype=torch.float32)
    common = rows.first, rows.pair, count, tokens, rank
    shape = {"ADAPTERS": triton.next_power_of_2(count), "RANK": max(triton.next_power_of_2(rank), 16)}
    _shrink[most_tiles(tokens, count, shrink["ROWS"]), splits](
        *common, x, adapters.a, parts, inner, each, **shape, **shrink
    )
    _expand[most_tiles(tokens, count, expand["ROWS"]), triton.cdiv(outs, expand["OUTS"])](
        *(*common, parts, adapters.b, adapters.scale, into, into.stride(0), outs), SPLITS=splits, **shape, **expand
    )


@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    first,
    row,
    adapters,
    tokens,
    rank,
    x,
    a,
    parts,
    inner,
    share,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    adapter, source, target, known = tile_rows(first, row, adapters, ROWS, 1, ADAPTERS)
    if adapter >= adapters:
        return
    own = tl.arange(0, RANK)
    x += source[None, :] * inner
    a += (adapter * rank + own).to(tl.int64)[:, None] * inner
    total = tl.zeros((RANK, ROWS), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, inner), INNER):
        column = start + tl.arange(0, INNER)
        numbers = tl.load(a + column[None, :], mask=(own < rank)[:, None] & (column < inner)[None, :], other=0)
        inputs = tl.load(x + column[:, None], mask=(column < inner)[:, None] & known[None, :], other=0)
        total = tl.dot(numbers, inputs, total, input_precision="ieee")
    at = (tl.program_id(1) * tokens + target)[None, :] * rank + own[:, None]
    tl.store(parts + at, total, mask=(own < rank)[:, None] & known[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    first,
    row,
    adapters,
    tokens,
    rank,
    parts,
    b,
    scale,
    out,
    stride,
    outs,
    SPLITS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):
    adapter, source, target, known = tile_rows(first, row, adapters, ROWS, 0, ADAPTERS)
    if adapter >= adapters:
        return
    own, column = tl.arange(0, RANK), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    some = (own < rank)[:, None] & known[None, :]
    inputs = tl.zeros((RANK, ROWS), tl.float32)
    for part in tl.static_range(SPLITS):
        inputs += tl.load(parts + (part * tokens + source)[None, :] * rank + own[:, None], mask=some, other=0)
    inputs *= tl.load(scale + adapter)
    b += (adapter * outs + column).to(tl.int64)[:, None] * rank + own[None, :]
    numbers = tl.load(b, mask=(column < outs)[:, None] & (own < rank)[None, :], other=0)
    total = tl.dot(numbers, inputs.to(numbers.dtype), input_precision="ieee")
    there = (column < outs)[:, None] & known[None, :]
    out += target[None, :] * stride + column[:, None]
    tl.store(out, total + tl.load(out, mask=there, other=0).to(tl.float32), mask=there)
