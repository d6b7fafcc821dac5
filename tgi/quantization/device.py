"""How quantized matrices are multiplied on a CUDA device: as they are, by Triton's kernels."""

from collections.abc import Iterable

import torch

from tgi.kernels.triton import coded
from tgi.kernels.triton.coded import LEAST, Coded
from tgi.kernels.triton.linear import linear
from tgi.quantization.base import ByProduct
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.parts import E2M1
from tgi.quantization.quantized import Packed, Quantized


class CodedLinear(ByProduct):
    """Activations in any floating point. Numbers of the matrix are those that it is dequantized to, in that of
    activations where there is more than one row."""

    __slots__ = ("_bias", "weight")

    def __init__(self, weight: Coded, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    @classmethod
    def of(
        cls, parts: Iterable[torch.Tensor | Packed], outs: int, device: torch.device, bias: torch.Tensor | None
    ) -> "CodedLinear":
        """Of a matrix of ``outs`` rows, some rows after others."""
        return cls(coded.assemble(map(code, parts), outs, device), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self._bias)


def multiplied(matrix: torch.Tensor | Packed) -> bool:
    """Whether the kernels multiply such a matrix: one that is quantized in groups that aren't too small."""
    return not isinstance(matrix, torch.Tensor) and code(matrix).span >= LEAST


def code(matrix: torch.Tensor | Packed) -> Coded:
    """A quantized matrix as the kernels read it."""
    match matrix:
        case Quantized():
            integers = matrix.stored, matrix.scale, matrix.min
            return coded.integers(*integers, bits=matrix.bits, zero=matrix.zero, order=matrix.order)
        case Float8():
            return coded.float8(matrix.values, matrix.scale)
        case Codes() if torch.equal(matrix.table.cpu(), E2M1):
            return coded.float4(matrix.codes, matrix.scale, matrix.factor)
        case Codes():
            return coded.places(matrix.codes, matrix.table, matrix.scale, matrix.factor)
        case _:
            raise TypeError("a plain matrix has no codes")
