"""float8 weights with a scale for each tensor, row, or block of rows and columns (DeepSeek-AI, arXiv 2412.19437)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.floats import Fp8
from tgi.quantization.forms import Float8
from tgi.quantization.parts import floating, matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Fp8) -> dict[str, Entry]:
    """Each float8 tensor and its scales as the one matrix, or stack of them, that they make."""
    return unpacked(entries, scheme, lambda module, shape: scaled(module, "", scheme.scale(module), scheme.block))


def scaled(module: Module[Entry], weight: str, scale: str, block: tuple[int, int] | None) -> Entry:
    """Of the parts that are called so. ``block``: rows and columns that share a scale; None: a whole row or all of the
    tensor does."""
    values, scales = module.parts[weight], module.parts[scale]
    *stack, outs, inner = values.shape
    if block is None:
        block = (1 if math.prod(scales.shape) == math.prod(stack) * outs else outs, inner)
    return matrix(module, values.shape, Blocks(values, scales, block))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix, or a stack of them, in blocks of rows and columns; the last may be smaller."""

    weight: Entry
    scale: Entry
    block: tuple[int, int]

    def __getitem__(self, rows: slice) -> Float8:
        values = self.weight.values[:].flatten(0, -2)
        outs, inner = self.weight.shape[-2:]
        high, wide = self.block
        row = torch.arange(len(values))[rows]
        scale = floating(self.scale.values[:]).reshape(-1, -(-inner // wide))
        scale = scale[row // outs * -(-outs // high) + row % outs // high]
        group = math.gcd(inner, wide)
        return Float8(values[rows], scale[:, torch.arange(0, inner, group) // wide])


def quantize(weight: torch.Tensor) -> Float8:
    """Round a floating-point matrix [outs, inner] to e4m3, each row's largest number to the format's largest."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = weight.float().abs().amax(1, keepdim=True) / most
    scale[scale == 0] = 1
    return Float8((weight.float() / scale).clamp_(-most, most).to(torch.float8_e4m3fn), scale)
