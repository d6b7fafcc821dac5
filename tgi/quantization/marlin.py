"""Marlin's tensors (Frantar et al., arXiv 2408.11743): symmetric 4 bits in the order in which its GPU kernel reads, and
Sparse-Marlin's, which has two of each four inputs."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Marlin, Marlin24, groups_of
from tgi.quantization.grouped import Columns, Integers, fields, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry

_TILE = 64
"""Outputs of a tile, of 16 inputs."""


def unpack(entries: Mapping[str, Entry], scheme: Marlin | Marlin24) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    if isinstance(scheme, Marlin24):
        names = ("B_24", "B_meta", "s")
        return unpacked(entries, scheme, lambda module, shape: sparse(module, shape, names, scheme.bits, scheme.group))
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, scheme.group))


def _matrix(module: Module[Entry], shape: tuple[int, ...], group: int | None) -> Entry:
    outs, inner = shape
    tiles, groups = inner // 16, groups_of(inner, group)
    packed, scales = module.parts["B"], module.parts["s"]

    def codes(rows: slice) -> torch.Tensor:
        run, place = whole(rows, outs, _TILE)
        stored = packed.values[:][:, run.start * 2 * _TILE : run.stop * 2 * _TILE]
        nibbles = fields(stored.reshape(1, -1), 4).view(8, tiles, -1, 8, 4, 4).permute(1, 2, 3, 4, 5, 0)
        # A warp's 32 threads are 8 columns by 4 pairs of rows; each has, in 4 blocks of 16 columns, its pair in both
        # halves of the 16 rows and of the block. [tiles, run, column, pair, block, of the pair, half of the block,
        # half of the rows]
        held = nibbles.reshape(tiles, -1, 8, 4, 4, 2, 2, 2)
        return held.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(-1, inner)[place]

    def scale(rows: slice) -> torch.Tensor:
        # With groups a thread's scales are 8 apart, else 8 pairs are.
        run, place = whole(rows, outs, _TILE)
        own = scales.values[:][:, run.start * _TILE : run.stop * _TILE]
        held = own.reshape(groups, -1, 8, 8).mT if groups > 1 else own.reshape(1, -1, 4, 4, 2).transpose(2, 3)
        return held.reshape(groups, -1)[:, place].T

    return matrix(module, shape, Integers(4, Columns.even(inner, group), codes, scale, 8))


def sparse(
    module: Module[Entry], shape: tuple[int, ...], names: tuple[str, str, str], bits: int, group: int | None
) -> Entry:
    """Of the integers, their places, and the scales: parts that are called so. The inputs that are left out are 0."""
    outs, inner = shape
    tiles, groups, half = inner // 32, groups_of(inner, group), 1 << bits - 1
    packed, meta, scales = (module.parts[name] for name in names)
    wide = 16 * bits // 32 * _TILE

    def codes(rows: slice) -> torch.Tensor:
        run, place = whole(rows, outs, _TILE)
        stored = packed.values[:][:, run.start * wide : run.stop * wide]
        numbers = fields(stored.reshape(1, -1), bits).view(32 // bits, -1).T
        # [tiles, run, block of 16 columns, half of it, pair of rows (those of both halves of 16), column of 4, …
        if bits == 4:  # … of the pair, other 4 columns, half of the rows]
            held = numbers.reshape(tiles, -1, 4, 2, 4, 4, 2, 2, 2).permute(1, 2, 3, 7, 5, 0, 8, 4, 6)
        else:  # … other 4 columns, of the pair, half of the rows]
            held = numbers.reshape(tiles, -1, 4, 2, 4, 4, 2, 2, 2).permute(1, 2, 3, 6, 5, 0, 8, 4, 7)
        kept = held.reshape(-1, inner // 2)[place]
        found = torch.full((len(kept), inner), half, dtype=torch.uint8)
        return found.scatter_(1, _places(meta, torch.arange(outs)[rows], shape), kept)

    def scale(rows: slice) -> torch.Tensor:
        run, place = whole(rows, outs, _TILE)
        own = scales.values[:][:, run.start * _TILE : run.stop * _TILE]
        if groups > 1:
            own = own.reshape(groups, -1, 4, 2).mT.reshape(groups, -1)
        return own[:, place].T

    return matrix(module, shape, Integers(bits, Columns.even(inner, group), codes, scale, half))


def _places(meta: Entry, rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int64 [rows, inner / 2]: the input of each number that is kept. Each has 2 bits, in words for 16 inputs, which
    lie as CUTLASS wants them: of 32 rows every eighth together, and of 2 by 2 words two corners exchanged."""
    outs, inner = shape
    row, column = rows[:, None], torch.arange(inner // 16)
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = (row + column) % 2 * (1 - 2 * (row % 2))
    row, column = row + swap, column - swap
    words = meta.values[:].flatten()[column // 2 * outs * 2 + row * 2 + column % 2].int()
    within = words[..., None] >> torch.arange(0, 16, 2, dtype=torch.int32) & 3
    first = torch.arange(0, inner, 4).repeat_interleave(2)
    return within.flatten(1).long() + first
