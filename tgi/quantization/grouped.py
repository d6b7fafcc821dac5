"""What formats of integers with a scale for each group of inputs share.

How a module's tensors are found and judged, which columns share a scale, and how rows become ``Quantized``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tgi.core.errors import StartupError
from tgi.quantization.quantized import Dequantized, Entry, Quantized
from tgi.quantization.scheme import Grouped

INTEGERS = ("I32",)
FLOATS = ("F16", "BF16", "F32")
GRAIN = 16
"""Columns that share a scale in our kernels: a multiple of this, …"""
WIDEST = 128
"""… and no more, for activations are rounded in the same groups."""


@dataclass(frozen=True, slots=True)
class Module:
    """A quantized module's tensors, by what they are called in it."""

    name: str
    method: str
    parts: Mapping[str, Entry]

    def part(self, part: str, kinds: tuple[str, ...], shape: tuple[int, ...] | None = None, rule: str = "") -> Entry:
        """A tensor that must be there, of one of ``kinds`` and, by a ``rule``, of this shape; else StartupError."""
        if part not in self.parts:
            path = next(iter(self.parts.values())).path
            raise StartupError(f"{path}: tensor {self.name}.{part} is missing, which {self.method} implies")
        entry = self.parts[part]
        if entry.kind not in kinds:
            raise self.wrong(part, f"has type {entry.kind}, {self.method} implies {' or '.join(kinds)}")
        if shape is not None and entry.shape != shape:
            raise self.wrong(part, f"has shape {entry.shape}, {self.method} with {rule} implies {shape}")
        return entry

    def matrix(self, part: str, kinds: tuple[str, ...], *multiples: int) -> tuple[Entry, int, int]:
        """A tensor that must be there, of two axes that are multiples of these, with their lengths."""
        entry = self.part(part, kinds)
        if len(entry.shape) != 2 or any(size % times for size, times in zip(entry.shape, multiples, strict=True)):
            raise self.wrong(part, f"has shape {entry.shape}, {self.method} implies multiples of {multiples}")
        return entry, *entry.shape

    def wrong(self, part: str, what: str) -> StartupError:
        return StartupError(f"{self.parts[part].path}: tensor {self.name}.{part} {what}")

    def entry(self, outs: int, rows: "Integers") -> Entry:
        """The matrix ``weight``; our kernels multiply it as it is stored if its groups are theirs."""
        path, size = next(iter(self.parts.values())).path, sum(part.bytes for part in self.parts.values())
        stored = None if rows.columns.unit % GRAIN else rows
        return Entry(path, (outs, rows.columns.count), size, "F32", Dequantized(rows), stored)


def unpacked(entries: Mapping[str, Entry], scheme: Grouped, make: Callable[[Module], Entry]) -> dict[str, Entry]:
    """``entries`` with the one matrix that ``make`` makes of a quantized module's tensors. What belongs to none stays:
    somebody will ask what it is."""
    found = dict(entries)
    for module in _modules(entries, scheme):
        for part in module.parts:
            del found[f"{module.name}.{part}"]
        weight = f"{module.name}.weight"
        if weight in found:
            raise module.wrong(scheme.PACKED, f"stands for {weight}, which is also there")
        found[weight] = make(module)
    return found


def _modules(entries: Mapping[str, Entry], scheme: Grouped) -> Iterator[Module]:
    for name in entries:
        module, _, part = name.rpartition(".")
        if part == scheme.PARTS[0]:
            own = {part: entry for part in scheme.PARTS if (entry := entries.get(f"{module}.{part}"))}
            yield Module(module, scheme.method, own)


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
        return cls.of(torch.arange(count) // (group or count))


def _unit(groups: torch.Tensor) -> int:
    """The longest run that the runs of equal groups consist of, of those our kernels can do if there is one."""
    edges = groups.diff().nonzero().flatten() + 1
    run = math.gcd(len(groups), *edges.tolist())
    sizes = [size for size in range(1, WIDEST + 1) if run % size == 0]
    return max(sizes, key=lambda size: (size % GRAIN == 0, size))


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
    ordered: bool = False
    """Codes come in the columns' order instead of the inputs'."""

    def __getitem__(self, rows: slice) -> Quantized:
        codes, scale, order = self.codes(rows), self.scales(rows), self.columns.order
        if order is not None and not self.ordered:
            codes = codes[:, order]
        scale = scale.float() if scale.dtype != torch.float16 else scale
        bits = 4 if self.bits <= 4 else 8
        runs = self.columns.groups
        if isinstance(self.zeros, int):
            return Quantized(bits, self.zeros, codes.contiguous(), scale[:, runs], order=order)
        # In float32, for in half precision the product would not be what the checkpoint means.
        least = -self.zeros(rows).float() * scale.float()
        return Quantized(bits, 0, codes.contiguous(), scale.float()[:, runs], least[:, runs], order)


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


def columns_of(entry: Entry) -> Part:
    """Of a stored [groups, outs]: rows of its transpose."""
    return lambda rows: entry.values[:][:, rows].T
