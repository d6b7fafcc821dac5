"""GPTQ's tensors (Frantar et al., arXiv 2210.17323): integers packed into words along the inputs."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Gptq
from tgi.quantization.grouped import Integers, Part, columns_of, fields, ordered, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Gptq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, scheme))


def _matrix(module: Module[Entry], shape: tuple[int, ...], scheme: Gptq) -> Entry:
    outs, inner = shape
    bits, group = scheme.of(module.name)
    qweight = module.parts["qweight"]
    columns = ordered(module, "g_idx", inner, group)

    def codes(rows: slice) -> torch.Tensor:
        return fields(qweight.values[:][:, rows], bits).T

    zeros = _zeros(module.parts["qzeros"], bits, outs, less_one=scheme.less_one)
    rows_of = Integers(bits, columns, codes, columns_of(module.parts["scales"]), zeros)
    return matrix(module, shape, rows_of, columns.order)


def _zeros(stored: Entry, bits: int, outs: int, *, less_one: bool) -> Part | int:
    """A symmetric matrix has the same everywhere. ``less_one``: that much is taken off each."""
    tile = 32 if 32 % bits else 32 // bits
    wide = tile * bits // 32

    def zeros(rows: slice) -> torch.Tensor:
        tiles, place = whole(rows, outs, tile)
        words = stored.values[:][:, tiles.start * wide : tiles.stop * wide]
        if less_one and 32 % bits == 0:
            # As words, not one by one: GPTQModel takes it off so, and where a zero is 0 that borrows from the next.
            words = words + _ones(bits)
        found = fields(words.T, bits).T[:, place]
        return (found + 1 & (1 << bits) - 1 if less_one and 32 % bits else found).T

    first = int(zeros(slice(0, 1))[0, 0])
    words = stored.values[:]
    period = words.view(len(words), -1, wide)
    return first if bool((period == period[:1, :1]).all()) and bool((zeros(slice(0, tile)) == first).all()) else zeros


def _ones(bits: int) -> int:
    """A word of ones."""
    return sum(1 << at for at in range(0, 32, bits))
