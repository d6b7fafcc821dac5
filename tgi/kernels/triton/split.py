"""Products whose columns are split among programs, so that few rows fill the device: how many ways, and their sum."""

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.tiles import multiprocessors

_PROGRAMS = 2
"""For each multiprocessor, at least: columns are split until there are so many …"""
_LEAST = 4
"""… or each has so few tiles left."""
_BLOCK = 1024
AT_ONCE = 512
"""Rows, at most, of which there are sums of parts where their number must not matter: tens of megabytes."""


def split(across: int, along: int, device: torch.device) -> tuple[int, int]:
    """For a matrix of so many tiles across outputs and along inputs: ways, and the tiles that each but the last has."""
    programs = triton.cdiv(_PROGRAMS * multiprocessors(device), across)
    each = triton.cdiv(along, max(min(programs, along // _LEAST), 1))
    return triton.cdiv(along, each), each


def add(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, factor: float | None = None) -> torch.Tensor:
    """Sum of parts, float32 [ways, rows, outs], and the bias, in the order of ways, to ``out``; ``factor``: as in
    store."""
    size = out.numel()
    _add[(triton.cdiv(size, _BLOCK),)](*(parts, bias, out, factor, len(parts), size, out.shape[1]), BLOCK=_BLOCK)
    return out


@triton.jit
def store(out, total, factor, mask):
    """``total`` to where ``out`` points, or with a ``factor`` so many times that added to what is there."""
    if factor is not None:
        total = tl.load(out, mask=mask, other=0).to(tl.float32) + factor * total
    tl.store(out, total, mask=mask)


@triton.jit
def _add(parts, bias, out, factor, count, size, outs, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + at, mask=at < size, other=0)
    if bias is not None:
        total += tl.load(bias + at % outs, mask=at < size, other=0).to(tl.float32)
    store(out + at, total, factor, at < size)
