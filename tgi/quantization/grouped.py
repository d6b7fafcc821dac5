"""What formats of integers with a scale for each group of inputs share: which columns share one, and how rows become
``Quantized``."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tgi.quantization.formats.base import GRAIN, Module, widest
from tgi.quantization.formats.integers import groups_of
from tgi.quantization.quantized import Entry, Quantized


@dataclass(frozen=True, slots=True)
class Columns:
    """A matrix's columns in runs of ``unit`` that share a scale."""

    count: int
    unit: int
    groups: torch.Tensor
    """int64 [count / unit]: which of the stored scales a run has."""
    order: torch.Tensor | None = None
    """int64 [count]: the input that each is of, if they had to be reordered to lie in runs."""

    @classmethod
    def of(cls, groups: torch.Tensor) -> "Columns":
        """``groups``, int64 [inputs]: the group of each input. Reordered if that makes runs that our kernels can do."""
        order = None
        unit = _unit(groups)
        if unit % GRAIN:
            order = groups.argsort(stable=True)
            if _unit(groups[order]) % GRAIN:
                order = None
            else:
                groups = groups[order]
                unit = _unit(groups)
        return cls(len(groups), unit, groups[::unit].contiguous(), order)

    @classmethod
    def even(cls, count: int, group: int | None) -> "Columns":
        """Groups of this size, the last one perhaps shorter; None: one."""
        return cls.of(torch.arange(count) // min(group or count, count))


def _unit(groups: torch.Tensor) -> int:
    """The longest run that the runs of equal groups consist of, of those our kernels can do if there is one."""
    edges = groups.diff().nonzero().flatten() + 1
    return widest(math.gcd(len(groups), *edges.tolist()))


Part = Callable[[slice], torch.Tensor]
"""Some rows of something that a matrix is made of."""


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix that is unpacked when rows are asked for: (code - zero) · scale."""

    bits: int
    columns: Columns
    codes: Part
    """uint8 [outs, inputs]."""
    scales: Part
    """[outs, groups]."""
    zeros: Part | int
    """[outs, groups], or the one that all have."""
    minima: Part | None = None
    """[outs, groups]: code · scale + these instead."""
    ordered: bool = False
    """Codes come in the columns' order instead of the inputs'."""

    def __getitem__(self, rows: slice) -> Quantized:
        codes, scale, order = self.codes(rows), self.scales(rows), self.columns.order
        if order is not None and not self.ordered:
            codes = codes[:, order]
        bits, runs = 4 if self.bits <= 4 else 8, self.columns.groups
        if isinstance(self.zeros, int) and self.minima is None:
            scale = scale if scale.dtype == torch.float16 else scale.float()
            return Quantized(bits, self.zeros, codes.contiguous(), scale[:, runs], order=order)
        # In float32, for in half precision the product would not be what the checkpoint means.
        scale = scale.float()
        if self.minima is not None:
            least = self.minima(rows).float()
        else:
            assert not isinstance(self.zeros, int)
            least = -self.zeros(rows).float() * scale
        return Quantized(bits, 0, codes.contiguous(), scale[:, runs], least[:, runs], order)


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers in int32 [words, n], a stream of bits along the first axis, lowest first: uint8 [integers, n]."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return (words[:, None] >> shifts[:, None] & (1 << bits) - 1).flatten(0, 1).to(torch.uint8)
    # After `bits` words the 32nd integer ends where a word does; in between some straddle two.
    stream = words.view(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    starts = torch.arange(0, 32 * bits, bits)
    first, shift = starts // 32, (starts % 32)[:, None]
    low, high = stream[:, first] >> shift, stream[:, (first + 1).clamp(max=bits - 1)] << 32 - shift
    return ((low | high) & (1 << bits) - 1).flatten(0, 1).to(torch.uint8)


def whole(rows: slice, outs: int, tile: int) -> tuple[slice, slice]:
    """The run of tiles of so many rows in which ``rows`` are, and where they are in it."""
    some = range(*rows.indices(outs))
    if not some:
        return slice(0, 0), slice(0, 0)
    first, last = some[0] // tile, some[-1] // tile + 1
    return slice(first, last), slice(some[0] - first * tile, some[-1] + 1 - first * tile, some.step)


def ordered(module: Module[Entry], part: str, inner: int, group: int | None) -> Columns:
    """Columns in groups of this size, or in those that a ``part``, if it is there, has for each input (act-order)."""
    if part not in module.parts:
        return Columns.even(inner, group)
    index, count = module.parts[part].values[:].long(), groups_of(inner, group)
    if bool((index == -1).all()):  # llm-compressor's, for none
        return Columns.even(inner, group)
    if index.min() < 0 or index.max() >= count:
        raise module.wrong(part, f"has groups {index.min()} to {index.max()}, of which there are {count}")
    return Columns.of(index)


def columns_of(entry: Entry) -> Part:
    """Of a stored [groups, outs]: rows of its transpose."""
    return lambda rows: entry.values[:][:, rows].T
