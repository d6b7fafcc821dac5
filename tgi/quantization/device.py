"""How matrices are multiplied on a GPU, with Triton's kernels: quantized ones as they are, plain ones by torch unless
rows must not know of each other."""

from collections.abc import Iterable
from functools import cache

import torch
import triton

from tgi.core.model_config import Activation
from tgi.kernels.triton import coded, rows
from tgi.kernels.triton.coded import LEAST, Coded
from tgi.kernels.triton.linear import linear
from tgi.kernels.triton.matmul import GROUP, matmul
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
        return matmul(x, self._weight, self._bias, fixed=True)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        matmul(x, self._weight, self._bias, into, factor, fixed=True)


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


class Float8Linear(DeviceLinear):
    """A matrix in float8 with a scale for each row, or for each block of a row's columns. Many rows of activations are
    rounded to float8, too, with scales for as many blocks. If there is one, torch multiplies the two.

    If ``fixed``, none are, and each row's result is bit-equal whatever the other rows are.
    """

    __slots__ = ("_bias", "_fixed", "_scale", "_weight")
    _FEW = 64

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, fixed: bool = False
    ) -> None:
        """``weight``: float8_e4m3fn [outs, inner], multiples of 16; ``scale``: float32 [groups, outs]."""
        self._weight = weight
        self._scale = scale
        self._bias = bias
        self._fixed = fixed

    @classmethod
    def of(
        cls,
        parts: Iterable[torch.Tensor | Packed],
        shape: tuple[int, int],
        device: torch.device,
        bias: torch.Tensor | None,
        *,
        fixed: bool = False,
    ) -> "Float8Linear":
        """Of a matrix of this shape, some rows after others."""
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scales, at = [], 0
        for part in parts:
            assert isinstance(part, Float8)
            weight[at : at + part.shape[0]] = part.values
            scales.append(part.scale.to(device).T)
            at += part.shape[0]
        return cls(weight, torch.cat(scales, 1).contiguous(), bias, fixed=fixed)

    @staticmethod
    def takes(matrix: torch.Tensor | Packed, outs: int, device: torch.device) -> bool:
        """Whether rows like these, ``outs`` of them, can be multiplied so there."""
        return (
            isinstance(matrix, Float8)
            and matrix.values.dtype == torch.float8_e4m3fn
            and (matrix.scale.shape[1] == 1 or matrix.group % GROUP == 0)
            and matrix.shape[1] % 16 == outs % 16 == 0
            and _multiplies_float8(device)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, None, 1.0)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        self._product(x, into, factor)

    def _product(self, x: torch.Tensor, into: torch.Tensor | None, factor: float) -> torch.Tensor:
        weight = self._weight, self._bias, into, factor
        if self._fixed or len(x) <= self._FEW:
            height = self._FEW if self._fixed else max(triton.next_power_of_2(len(x)), 16)
            return matmul(x, *weight, scale=self._scale, rows=height, fixed=self._fixed)
        values, scale = rows.float8(x.contiguous(), len(self._scale))
        if len(self._scale) > 1:
            return matmul(values, *weight, scale=self._scale, x_scale=scale, dtype=x.dtype)
        product = torch._scaled_mm(
            values,
            self._weight.T,
            scale_a=scale,
            scale_b=self._scale,
            bias=self._bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return product if into is None else into.add_(product, alpha=factor)


@cache
def _multiplies_float8(device: torch.device) -> bool:
    """Whether torch multiplies float8 with scales for rows: on NVIDIA's data-centre GPUs from Hopper on, or a CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "cpu"
    return 9 <= torch.cuda.get_device_capability(device)[0] < 12


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
