"""Floating point of 4 bits with a scale for each group of columns: MXFP4 (OCP Microscaling Formats 1.0), NVFP4."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.floats import Fp4
from tgi.quantization.forms import Codes
from tgi.quantization.parts import E2M1, floating, halves, matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Fp4) -> dict[str, Entry]:
    """Bytes and their scales as the one matrix, or stack of them, that they make; all others as they are."""
    return unpacked(entries, scheme, _matrix)


def _matrix(module: Module[Entry], shape: tuple[int, ...]) -> Entry:
    if "_blocks" in module.parts:
        return coded(module, shape, "_blocks", "_scales")
    return coded(module, shape, "", "_scale", factor=module.parts.get("_scale_2"))


def coded(
    module: Module[Entry],
    shape: tuple[int, ...],
    packed: str,
    scale: str,
    *,
    factor: Entry | None = None,
    divisor: Entry | None = None,
) -> Entry:
    """The matrix, or stack of them, of ``shape``, two numbers to a byte. ``factor``, ``divisor``: of all scales."""
    return matrix(module, shape, _Coded(module.parts[packed], module.parts[scale], factor, divisor))


@dataclass(frozen=True, slots=True)
class _Coded:
    packed: Entry
    scale: Entry
    factor: Entry | None
    divisor: Entry | None

    def __getitem__(self, rows: slice) -> Codes:
        stored = self.scale.values[:].reshape(-1, self.scale.shape[-1])
        packed = halves(self.packed.values[:].reshape(len(stored), -1)[rows])
        if self.factor is None and self.divisor is None:
            return Codes(packed, E2M1, floating(stored[rows]))
        # Half precision holds a float8 number, but hardly its product with another.
        factor = torch.ones(1) if self.factor is None else self.factor.values[:].float().reshape(1)
        if self.divisor is not None:
            factor = factor / self.divisor.values[:].float().reshape(1)
        return Codes(packed, E2M1, stored[rows].half(), factor.expand(len(packed), 1))
