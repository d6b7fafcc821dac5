"""BitNet's tensors (Ma et al., arXiv 2402.17764): -1, 0 or 1 in 2 bits each, four rows in the bytes of one."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import BitNet
from tgi.quantization.grouped import Columns, Integers
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: BitNet) -> dict[str, Entry]:
    """Packed weights as the matrices that they mean; all others as they are."""
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, divides=scheme.divides))


def _matrix(module: Module[Entry], shape: tuple[int, ...], *, divides: bool) -> Entry:
    outs, inner = shape
    packed, scale = module.parts["weight"], module.parts["weight_scale"]

    def codes(rows: slice) -> torch.Tensor:
        # The first quarter of all rows is in the lowest bits, the last in the highest.
        place = torch.arange(outs)[rows]
        shift = (place // (outs // 4) * 2).to(torch.uint8)
        return packed.values[:][place % (outs // 4)] >> shift[:, None] & 3

    def scales(rows: slice) -> torch.Tensor:
        one = scale.values[:].float().reshape(1, 1)
        return (1 / one if divides else one).expand(len(range(*rows.indices(outs))), 1)

    return matrix(module, shape, Integers(2, Columns.even(inner, None), codes, scales, 1))
