"""What llm-compressor writes (compressed-tensors): integers, float8 and codes of 4 bits, module by module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tgi.core.errors import StartupError
from tgi.quantization import fp8
from tgi.quantization.groups import WeightGroup
from tgi.quantization.mx import coded
from tgi.quantization.parts import matrix, part, weights_alone
from tgi.quantization.quantized import Entry, Quantized, Rows
from tgi.quantization.scheme import CompressedTensors

_PARTS = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
_FLOATS = ("F32", "BF16", "F16")


def unpack(entries: Mapping[str, Entry], scheme: CompressedTensors) -> dict[str, Entry]:
    """Modules' ``weight``, or ``weight_packed``, and what is beside it as the one matrix that they make."""
    entries = weights_alone(entries)
    found = {name: entry for name, entry in entries.items() if name.rpartition(".weight_")[2] not in _PARTS}
    for name, entry in entries.items():
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        group = scheme.group(module)
        if group is None:
            raise StartupError(f"{entry.path}: tensor {name} quantizes a module that quantization_config leaves out")
        found[f"{module}.weight"] = _module(entries, f"{module}.weight", entry, group)
    return found


def _module(entries: Mapping[str, Entry], name: str, scale: Entry, group: WeightGroup) -> Entry:
    """The matrix ``name``, whose scales are known."""
    form, packed = group.format, f"{name}_packed"
    if form == "pack-quantized":
        return _packed(entries, name, scale, group)
    if form == "int-quantized":
        weight = part(entries, name, scale, form, ("I8",))
        return _integers(entries, name, weight, _Bytes(weight), weight.shape, group)
    if form == "float-quantized":
        block = (1, group.group) if group.group is not None else group.block
        return fp8.scaled(entries, part(entries, name, scale, form, fp8.KINDS), f"{name}_scale", block, form)
    if form == "mxfp8-quantized":
        return fp8.scaled(entries, part(entries, name, scale, form, fp8.KINDS), f"{name}_scale", (1, 32), form)
    weight = part(entries, packed, scale, form, ("U8",))
    outs, inner = weight.shape[0], weight.shape[1] * 2
    assert group.group is not None
    kind, whole = ("U8", None)
    if form == "nvfp4-pack-quantized":
        kind, whole = "F8_E4M3", part(entries, f"{name}_global_scale", scale, form, ("F32",), (1,), ())
    part(entries, f"{name}_scale", scale, form, (kind,), (outs, inner // group.group))
    return coded(weight, scale, (outs, inner), form, divisor=whole)


def _packed(entries: Mapping[str, Entry], name: str, scale: Entry, group: WeightGroup) -> Entry:
    says = part(entries, f"{name}_shape", scale, group.format, ("I64", "I32"), (2,))
    outs, inner = map(int, says.values[:])
    shape = outs, -(-inner * group.bits // 32)
    words = part(entries, f"{name}_packed", scale, group.format, ("I32",), shape)
    return _integers(entries, name, words, _Words(words, group.bits, inner), (outs, inner), group)


def _integers(
    entries: Mapping[str, Entry],
    name: str,
    weight: Entry,
    stored: Rows[torch.Tensor],
    shape: tuple[int, ...],
    group: WeightGroup,
) -> Entry:
    """Of what is ``stored`` in ``weight``: integers, half of the largest being zero unless they have zeros."""
    outs, inner = shape
    groups, rest = (1, 0) if group.group is None else divmod(inner, group.group)
    if rest:
        raise StartupError(f"{weight.path}: {name}: {inner} columns don't divide into groups of {group.group}")
    shapes: list[tuple[int, ...]] = [(outs, groups)]
    if group.strategy == "tensor":
        shapes = [(), (1,), (1, 1)]
    elif group.strategy == "channel":
        shapes = [(outs, 1), (outs,)]
    scale = part(entries, f"{name}_scale", weight, group.format, _FLOATS, *shapes)
    zeros = None
    if not group.symmetric and group.format == "pack-quantized":
        words = -(-outs * group.bits // 32)
        zeros = part(entries, f"{name}_zero_point", weight, group.format, ("I32",), (words, groups))
    elif not group.symmetric:
        zeros = part(entries, f"{name}_zero_point", weight, group.format, ("I8",), *shapes)
    parts = [entry for entry in (weight, scale, zeros) if entry is not None]
    made = matrix(parts, (outs, inner), rows := _Integers(stored, scale, zeros, outs, group.bits))
    if not group.ordered:
        return made
    order = part(entries, f"{name}_g_idx", weight, group.format, ("I32", "I64"), (inner,))
    return replace(made, values=_Ordered(rows, order), stored=None)


@dataclass(frozen=True, slots=True)
class _Words:
    """Integers in words along the inputs, the first in the lowest bits: as uint8."""

    weight: Entry
    bits: int
    inner: int

    def __getitem__(self, rows: slice) -> torch.Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        stored = self.weight.values[rows][..., None] >> shifts & (1 << self.bits) - 1
        return stored.to(torch.uint8).flatten(1)[:, : self.inner]


@dataclass(frozen=True, slots=True)
class _Bytes:
    """int8, 128 being added: as uint8."""

    weight: Entry

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.weight.values[rows].view(torch.uint8) ^ 0x80


@dataclass(frozen=True, slots=True)
class _Integers:
    stored: Rows[torch.Tensor]
    scale: Entry
    zeros: Entry | None
    outs: int
    bits: int

    def __getitem__(self, rows: slice) -> Quantized:
        scale = self._each(self.scale.values[:])[rows]
        width, half = max(self.bits, 4), 1 << self.bits - 1
        if self.zeros is None:
            return Quantized(width, half, self.stored[rows], scale if scale.dtype == torch.float16 else scale.float())
        zeros = self.zeros.values[:]
        if zeros.dtype == torch.int8:
            zero = self._each(zeros)[rows].float() + half
        else:  # in words along the outputs
            place = torch.arange(self.outs)[rows] * self.bits
            zero = (zeros[place // 32] >> (place % 32)[:, None] & (1 << self.bits) - 1).float()
        scale = scale.float()
        return Quantized(width, 0, self.stored[rows], scale, -zero * scale)

    def _each(self, values: torch.Tensor) -> torch.Tensor:
        """Those of a tensor, of rows or of groups, for every row."""
        if values.numel() == 1:
            return values.reshape(1, 1).expand(self.outs, 1)
        return values.reshape(self.outs, -1)


@dataclass(frozen=True, slots=True)
class _Ordered:
    """A matrix whose columns belong to groups in an order of their own, in float32."""

    matrix: _Integers
    group: Entry
    """Of each column."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        part, group = self.matrix[rows], self.group.values[:].long()
        values = (part.stored.float() - part.zero) * part.scale.float()[:, group]
        return values if part.min is None else values + part.min[:, group]
