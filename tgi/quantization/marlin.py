"""Marlin's tensors (Frantar et al., arXiv 2408.11743): symmetric 4 bits in the order in which its GPU kernel reads."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Marlin, groups_of
from tgi.quantization.grouped import Columns, Integers, fields, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry

_TILE = 64
"""Outputs of a tile, of 16 inputs."""


def unpack(entries: Mapping[str, Entry], scheme: Marlin) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
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
