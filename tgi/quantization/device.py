"""How matrices are multiplied on a GPU, with Triton's kernels: quantized ones as they are, plain ones by torch unless
rows must not know of each other."""

from collections.abc import Iterable

import torch

from tgi.core.model_config import Activation
from tgi.kernels.triton import coded, rows
from tgi.kernels.triton.coded import LEAST, Coded
from tgi.kernels.triton.linear import linear
from tgi.kernels.triton.matmul import matmul
from tgi.quantization.base import ByProduct, PlainLinear
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.parts import E2M1
from tgi.quantization.quantized import Packed, Quantized


class DeviceLinear(ByProduct):
    """A method whose activations are kernels of our own."""

    __slots__ = ()

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return rows.activated(self(x), activation)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return rows.gated(self(x), activation)


class TorchLinear(DeviceLinear, PlainLinear):
    """torch's products: of the fastest of the device's own kernels for each number of rows."""

    __slots__ = ()


class FixedLinear(DeviceLinear):
    """A plain matrix; each row's result is bit-equal whatever the other rows are."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self._weight, self._bias)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        matmul(x, self._weight, self._bias, into, factor)


class CodedLinear(DeviceLinear):
    """Activations in any floating point. Numbers of the matrix are those that it is dequantized to, in that of
    activations where there is more than one row.

    If ``fixed``, each row's result is bit-equal whatever the other rows are, and numbers are always in that of
    activations.
    """

    __slots__ = ("_bias", "_fixed", "weight")

    def __init__(self, weight: Coded, bias: torch.Tensor | None, *, fixed: bool = False) -> None:
        self.weight = weight
        self._bias = bias
        self._fixed = fixed

    @classmethod
    def of(
        cls,
        parts: Iterable[torch.Tensor | Packed],
        outs: int,
        device: torch.device,
        bias: torch.Tensor | None,
        *,
        fixed: bool = False,
    ) -> "CodedLinear":
        """Of a matrix of ``outs`` rows, some rows after others."""
        return cls(coded.assemble(map(code, parts), outs, device), bias, fixed=fixed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self._bias, fixed=self._fixed)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        linear(x, self.weight, self._bias, into, factor, fixed=self._fixed)


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
