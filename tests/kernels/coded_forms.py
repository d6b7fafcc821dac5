"""Random matrices of every form that Triton's kernels multiply."""

from collections.abc import Callable, Mapping

import torch

from tgi.quantization.bitsandbytes import TABLES
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.parts import E2M1
from tgi.quantization.quantized import Packed, Quantized

Make = Callable[[int, int, int], Packed]
"""Of outs, inner and the columns that share a scale."""


def _integers(bits: int, *, least: bool = False, ordered: bool = False) -> Make:
    def make(outs: int, inner: int, group: int) -> Quantized:
        scale = torch.rand(outs, inner // group) * 2 ** (1 - bits) + 1e-3
        return Quantized(
            bits,
            0 if least else 2 ** (bits - 1),
            torch.randint(2**bits, (outs, inner), dtype=torch.uint8),
            scale if least else scale.half(),
            -torch.rand(outs, inner // group) if least else None,
            torch.randperm(inner) if ordered else None,
        )

    return make


def _float8(dtype: torch.dtype) -> Make:
    return lambda outs, inner, group: Float8(torch.randn(outs, inner).to(dtype), torch.rand(outs, inner // group))


def _codes(table: torch.Tensor) -> Make:
    return lambda outs, inner, group: Codes(
        torch.randint(16, (outs, inner), dtype=torch.uint8), table, torch.rand(outs, inner // group)
    )


def _factors(outs: int, inner: int, group: int) -> Codes:
    """Scales that reach as far as their format, and powers of two for the rows, with which rounding is the same."""
    codes = torch.randint(16, (outs, inner), dtype=torch.uint8)
    scale = torch.rand(outs, inner // group).mul_(448).half()
    return Codes(codes, E2M1, scale, torch.randint(-9, -6, (outs, 1)).float().exp2_())


FORMS: Mapping[str, Make] = {
    "4 bits": _integers(4),
    "4 bits, minima": _integers(4, least=True),
    "4 bits, act-order": _integers(4, least=True, ordered=True),
    "8 bits": _integers(8),
    "8 bits, minima": _integers(8, least=True),
    "e4m3": _float8(torch.float8_e4m3fn),
    "e5m2": _float8(torch.float8_e5m2),
    "e2m1": _codes(E2M1),
    "e2m1, factors": _factors,
    "nf4": _codes(TABLES["nf4"]),
}
