"""HQQ's tensors (Badri & Shaji, mobiusml.github.io/hqq_blog): integers with scales and zeros that are no integers."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import HQQ_PACKED, Hqq
from tgi.quantization.grouped import Columns, Integers
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Hqq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, scheme.of(module.name)[0]))


def _matrix(module: Module[Entry], blocks: tuple[int, ...], bits: int) -> Entry:
    """``blocks``: groups, and numbers of each."""

    def told(part: str) -> list[int]:
        numbers: list[int] = module.parts[part].values[:].reshape(-1).tolist()
        return numbers

    count, size = blocks
    axis, shape = told("axis")[0], tuple(told("shape"))
    if told("nbits") != [bits]:
        raise module.wrong("nbits", f"is {told('nbits')[0]}, quant_config implies {bits}")
    if axis != 1 or len(shape) != 2:
        raise module.wrong("axis", f"is {axis} of shape {shape}: only groups of inputs (axis 1) are implemented")
    for part in ("quant_scale", "quant_zero"):
        if part in module.parts and told(part)[0]:
            raise module.wrong(part, "is true: quantized scales and zeros are not implemented")
    outs, inner = shape
    if outs * inner != count * size or inner % size:
        raise module.wrong("shape", f"is {shape}, which are no {count} groups of {size} inputs")
    packed, scales, zeros = (module.parts[part] for part in ("W_q", "scale", "zero"))
    groups, each = inner // size, HQQ_PACKED[bits]
    dtype, step = torch.int32 if bits == 3 else torch.uint8, -(-count // each)

    def codes(rows: slice) -> torch.Tensor:
        # A word's highest bits are of a group of the first part of the matrix, the next of one of the second part, …
        # It may be stored as if it were floating point.
        words = packed.values[:].view(dtype).view(step, size)
        place = torch.arange(count).view(outs, groups)[rows].flatten()
        found = words[place % step] >> (bits * (each - 1 - place // step)).to(dtype)[:, None]
        return (found & (1 << bits) - 1).to(torch.uint8).view(-1, inner)

    def of(part: Entry, rows: slice) -> torch.Tensor:
        return part.values[:].view(outs, groups)[rows]

    columns = Columns.even(inner, size)
    return matrix(
        module, shape, Integers(bits, columns, codes, lambda rows: of(scales, rows), lambda rows: of(zeros, rows))
    )
