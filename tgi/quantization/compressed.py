"""What llm-compressor writes (compressed-tensors): integers, float8 and codes of 4 bits, module by module."""

from collections.abc import Mapping

import torch

from tgi.quantization import fp8
from tgi.quantization.formats.base import Module
from tgi.quantization.formats.compressed import MARLIN_24, CompressedTensors, WeightGroup
from tgi.quantization.grouped import Integers, Part, fields, ordered
from tgi.quantization.marlin import sparse
from tgi.quantization.mx import coded
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: CompressedTensors) -> dict[str, Entry]:
    """Modules' ``weight``, or ``weight_packed``, and what is beside it as the one matrix that they make."""
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, scheme.of(module)))


def _matrix(module: Module[Entry], shape: tuple[int, ...], group: WeightGroup) -> Entry:
    zeros = module.parts.get("weight_zero_point")
    if not group.format.startswith(("pack", "int", "marlin")) and zeros is not None and bool(zeros.values[:].any()):
        raise module.wrong("weight_zero_point", f"has other numbers than 0, which {group.format} forbids")
    match group.format:
        case "pack-quantized":
            return _packed(module, group)
        case "marlin-24":
            return sparse(module, shape, MARLIN_24, group.bits, group.group)
        case "int-quantized":
            weight = module.parts["weight"]
            return _integers(module, shape, group, lambda rows: weight.values[rows].view(torch.uint8) ^ 0x80)
        case "nvfp4-pack-quantized":
            divisor = module.parts["weight_global_scale"]
            return coded(module, shape, "weight_packed", "weight_scale", divisor=divisor)
        case "mxfp4-pack-quantized":
            return coded(module, shape, "weight_packed", "weight_scale")
        case _:
            return fp8.scaled(module, "weight", "weight_scale", group.shares)


def _packed(module: Module[Entry], group: WeightGroup) -> Entry:
    """Integers in words along the inputs, of which the last may hold fewer."""
    words = module.parts["weight_packed"]
    outs, inner = map(int, module.parts["weight_shape"].values[:])
    implied = outs, -(-inner * group.bits // 32)
    if words.shape != implied or inner < 1 or (group.group is not None and inner % group.group):
        sizes = f"num_bits {group.bits} and group_size {group.group}"
        raise module.wrong("weight_shape", f"is {(outs, inner)}, which {words.shape} words with {sizes} can't be")

    def codes(rows: slice) -> torch.Tensor:
        return fields(words.values[:][rows].T, group.bits).T[:, :inner]

    return _integers(module, (outs, inner), group, codes)


def _integers(module: Module[Entry], shape: tuple[int, ...], group: WeightGroup, codes: Part) -> Entry:
    """Half of the largest is zero unless there are zeros."""
    outs, inner = shape
    scale, zero = module.parts["weight_scale"], module.parts.get("weight_zero_point")
    half = 1 << group.bits - 1

    def zeros(rows: slice) -> torch.Tensor:
        assert zero is not None
        if zero.kind == "I32":  # in words along the outputs
            return fields(zero.values[:], group.bits)[rows]
        return _each(zero, outs)[rows].int() + half

    columns = ordered(module, "weight_g_idx", inner, group.group)
    rows = Integers(group.bits, columns, codes, lambda rows: _each(scale, outs)[rows], half if zero is None else zeros)
    return matrix(module, shape, rows, columns.order)


def _each(entry: Entry, outs: int) -> torch.Tensor:
    """A tensor's number, or those of rows or of groups, for every row: [outs, groups]."""
    values = entry.values[:]
    return values.reshape(1, 1).expand(outs, 1) if values.numel() == 1 else values.reshape(outs, -1)
