"""Matrices of codes as the Triton kernels read them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

LEAST = 4
"""Columns that must share a scale."""
_GRAIN = 16
"""Rows are filled up to a multiple of so many words: then Triton reads several at once."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix [outs, inner]: what a code means, times a scale and a row's factor, plus a minimum if there are any.

    A row is cut into as many equal parts as a word has codes. The ``n``-th word has the ``n``-th code of each part, the
    first part's lowest. So a run of words is a run of columns in each part, all in one place of their words.
    """

    bits: int
    """4 or 8."""
    inner: int
    group: int
    """Columns that share a scale."""
    words: torch.Tensor
    """int32 [outs, words]."""
    scale: torch.Tensor
    """float16 or float32 [groups, outs]."""
    min: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    """float32 [outs]."""
    zero: int = 0
    """A code means itself less this, …"""
    exponent: int = 0
    """… or, if not 0, floating point with so many bits of exponent and float16's bias, …"""
    table: torch.Tensor | None = None
    """… or what stands there: float32 [16]."""
    order: torch.Tensor | None = None
    """int64 [inner]: the input that each column is of, where the columns are not in the order of inputs."""

    @property
    def outs(self) -> int:
        return self.words.shape[0]

    @property
    def width(self) -> int:
        """Words of a row."""
        return self.words.shape[1]

    @property
    def span(self) -> int:
        """A power of two: so many words, behind a multiple of as many, have one scale in each part."""
        if self.group == self.inner:
            return 1 << 30
        common = math.gcd(self.group, self.width)
        return common & -common

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(part.nbytes for part in (self.words, self.scale, self.min, self.factor) if part is not None)


def integers(
    stored: torch.Tensor,
    scale: torch.Tensor,
    min: torch.Tensor | None,
    *,
    bits: int,
    zero: int,
    order: torch.Tensor | None = None,
) -> Coded:
    """Of stored: uint8 [outs, inner] below 2**bits; scale and min: float [outs, groups]; order: int64 [inner]."""
    least = None if min is None else min.T.contiguous()
    return replace(_coded(stored, scale, bits), min=least, zero=zero, order=order)


def float8(values: torch.Tensor, scale: torch.Tensor) -> Coded:
    """Of values: float8_e4m3fn or float8_e5m2 [outs, inner]; scale: float32 [outs, groups].

    Where e4m3fn has no number, the whole group will have none.
    """
    broken = values.float().isnan().view(*scale.shape, -1).any(-1)
    exponent = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}[values.dtype]
    return _floats(values.view(torch.uint8), scale.masked_fill(broken, torch.nan), 8, exponent)


def float4(codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None = None) -> Coded:
    """Of codes of e2m1: uint8 [outs, inner] below 16; scale: float [outs, groups]; factor: float32 [outs, 1]."""
    if factor is None:
        return _floats(codes, scale.float(), 4, 2)
    # The scales may be too narrow for what belongs to the exponent.
    return replace(_coded(codes, scale, 4), exponent=2, factor=factor[:, 0] * _bias(2))


def places(codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None = None) -> Coded:
    """Of codes: uint8 [outs, inner] below 16; table: float32 [16]; the others as for float4."""
    return replace(_coded(codes, scale, 4), table=table, factor=None if factor is None else factor[:, 0])


def _floats(codes: torch.Tensor, scale: torch.Tensor, bits: int, exponent: int) -> Coded:
    return replace(_coded(codes, scale * _bias(exponent), bits), exponent=exponent)


def _bias(exponent: int) -> float:
    """What makes up for that numbers are read with float16's bias, 15, instead of their own."""
    return float(1 << (16 - (1 << (exponent - 1))))


def _coded(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> Coded:
    outs, inner = codes.shape
    each = 32 // bits
    width = -(-inner // (each * _GRAIN)) * _GRAIN
    parts = pad(codes, (0, each * width - inner)).view(outs, each, width)
    if bits == 4:
        parts = parts[:, 0::2] | parts[:, 1::2] << 4
    words = parts.transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)
    return Coded(bits, inner, inner // scale.shape[1], words, scale.T.contiguous())


def assemble(parts: Iterable[Coded], outs: int, device: torch.device) -> Coded:
    """One matrix of ``outs`` rows on the device, from rows that follow one another. Each goes to its place before the
    next is made."""
    whole: Coded | None = None
    at = 0
    for part in parts:
        if whole is None:
            whole = _room(part, outs, device)
        own = slice(at, at + part.outs)
        whole.words[own] = part.words
        whole.scale[:, own] = part.scale
        if whole.min is not None and part.min is not None:
            whole.min[:, own] = part.min
        if whole.factor is not None and part.factor is not None:
            whole.factor[own] = part.factor
        at += part.outs
    assert whole is not None and at == outs
    return whole


def _room(like: Coded, outs: int, device: torch.device) -> Coded:
    def room(scales: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(scales), outs, dtype=scales.dtype, device=device)

    return replace(
        like,
        words=torch.empty(outs, like.width, dtype=torch.int32, device=device),
        scale=room(like.scale),
        min=None if like.min is None else room(like.min),
        factor=None if like.factor is None else torch.empty(outs, device=device),
        table=None if like.table is None else like.table.to(device),
        order=None if like.order is None else like.order.to(device),
    )
