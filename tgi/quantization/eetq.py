"""EETQ's tensors: int8 with a scale for each output, in the order that CUTLASS's kernels read from Turing on."""

from collections.abc import Mapping

import torch

from tgi.quantization.grouped import FLOATS, Columns, Integers, Module, unpacked, whole
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import Eetq


def unpack(entries: Mapping[str, Entry], scheme: Eetq) -> dict[str, Entry]:
    """Weights with scales as the matrices that they mean; all others as they are."""
    return unpacked(entries, scheme, _matrix)


def _matrix(module: Module) -> Entry:
    weight, inner, outs = module.matrix("weight", ("I8",), 64, 64)
    scales = module.part("weight_scales", FLOATS, (outs,), "its weight")

    def codes(rows: slice) -> torch.Tensor:
        # Outputs in pairs, which take turns every 64 inputs. Of 16 inputs each of the first 8 is followed by the one
        # 8 further on. What is stored is 128 more than what is meant, modulo 256.
        pairs, place = whole(rows, outs, 2)
        stored = weight.values[:].view(torch.uint8).view(outs // 2, -1, 2, 64)[pairs]
        return stored.transpose(1, 2).reshape(-1, inner // 16, 8, 2).mT.reshape(-1, inner)[place]

    return module.entry(
        outs, Integers(8, Columns.even(inner, None), codes, lambda rows: scales.values[:][rows, None], 128)
    )
