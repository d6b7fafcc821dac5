"""EETQ's tensors: int8 with a scale for each output, in the order that CUTLASS's kernels read from Turing on."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Eetq
from tgi.quantization.grouped import Columns, Integers, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Eetq) -> dict[str, Entry]:
    """Weights with scales as the matrices that they mean; all others as they are."""
    return unpacked(entries, scheme, _matrix)


def _matrix(module: Module[Entry], shape: tuple[int, ...]) -> Entry:
    outs, inner = shape
    weight, scales = module.parts["weight"], module.parts["weight_scales"]

    def codes(rows: slice) -> torch.Tensor:
        # Outputs in pairs, which take turns every 64 inputs. Of 16 inputs each of the first 8 is followed by the one
        # 8 further on. What is stored is 128 more than what is meant, modulo 256.
        pairs, place = whole(rows, outs, 2)
        stored = weight.values[:].view(torch.uint8).view(outs // 2, -1, 2, 64)[pairs]
        return stored.transpose(1, 2).reshape(-1, inner // 16, 8, 2).mT.reshape(-1, inner)[place]

    rows_of = Integers(8, Columns.even(inner, None), codes, lambda rows: scales.values[:][rows, None], 128)
    return matrix(module, shape, rows_of)
