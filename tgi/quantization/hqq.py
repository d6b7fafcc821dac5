"""HQQ's tensors (Badri & Shaji, mobiusml.github.io/hqq_blog): integers with scales and zeros that are no integers."""

import math
from collections.abc import Mapping

import torch

from tgi.quantization.grouped import FLOATS, Columns, Integers, Module, unpacked
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import HQQ_PACKED, Hqq


def unpack(entries: Mapping[str, Entry], scheme: Hqq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    return unpacked(entries, scheme, _matrix)


def _matrix(module: Module) -> Entry:
    def told(part: str) -> list[int]:
        numbers: list[int] = module.part(part, ("U8", "I32", "I64")).values[:].reshape(-1).tolist()
        return numbers

    bits, axis, shape = told("nbits")[0], told("axis")[0], told("shape")
    if bits not in HQQ_PACKED:
        raise module.wrong("nbits", f"is {bits}, hqq implies one of {', '.join(map(str, HQQ_PACKED))}")
    if axis != 1 or len(shape) != 2:
        raise module.wrong("axis", f"is {axis} of shape {shape}: only groups of inputs (axis 1) are implemented")
    for part in ("quant_scale", "quant_zero"):
        if part in module.parts and told(part)[0]:
            raise module.wrong(part, "is true: quantized scales and zeros are not implemented")
    outs, inner = shape
    scales = module.part("scale", FLOATS)
    count = math.prod(scales.shape)
    if count == 0 or scales.shape != (count, 1) or count % outs or inner % (count // outs):
        raise module.wrong("scale", f"has shape {scales.shape}, which are no groups of {outs} rows of {inner}")
    zeros = module.part("zero", FLOATS, (count, 1), f"{count} groups")
    groups, size = count // outs, outs * inner // count
    each = HQQ_PACKED[bits]
    dtype = torch.int32 if bits == 3 else torch.uint8
    packed = module.part("W_q", ("U8", "I32", *FLOATS))
    step = -(-count // each)
    if packed.bytes != step * size * dtype.itemsize:
        raise module.wrong(
            "W_q", f"has {packed.bytes} bytes, hqq with {bits} bits implies {step * size * dtype.itemsize}"
        )

    def codes(rows: slice) -> torch.Tensor:
        # A word's highest bits are of a group of the first part of the matrix, the next of one of the second part, …
        # It may be stored as if it were floating point.
        words = packed.values[:].view(dtype).view(step, size)
        place = torch.arange(count).view(outs, groups)[rows].flatten()
        found = words[place % step] >> (bits * (each - 1 - place // step)).to(dtype)[:, None]
        return (found & (1 << bits) - 1).to(torch.uint8).view(-1, inner)

    return module.entry(
        outs,
        Integers(
            bits,
            Columns.even(inner, size),
            codes,
            lambda rows: scales.values[:].view(outs, groups)[rows],
            lambda rows: zeros.values[:].view(outs, groups)[rows],
        ),
    )
