"""float8 weights with a scale for each tensor, row, or block of rows and columns (DeepSeek-AI, arXiv 2412.19437)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.quantization.forms import Float8
from tgi.quantization.parts import floating, matrix, part, weights_alone
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import Fp8

KINDS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def unpack(entries: Mapping[str, Entry], scheme: Fp8) -> dict[str, Entry]:
    """Each float8 tensor ``X`` and its ``X_scale_inv`` or ``X_scale`` as the one matrix that they make."""
    found = weights_alone(entries)
    for name, entry in list(found.items()):
        if entry.kind in KINDS and len(entry.shape) > 1:
            scale = next((key for key in (f"{name}_scale_inv", f"{name}_scale") if key in found), f"{name}_scale")
            found[name] = scaled(found, entry, scale, scheme.block, scheme.method)
            del found[scale]
    return found


def scaled(entries: Mapping[str, Entry], weight: Entry, name: str, block: tuple[int, int] | None, method: str) -> Entry:
    """The float8 ``weight`` with the scales ``name``. ``block``: rows and columns that share one; None: a whole row
    or all of the tensor does."""
    *stack, outs, inner = weight.shape
    if block is not None:
        shapes = [(*stack, -(-outs // block[0]), -(-inner // block[1]))]
    else:
        shapes = [(*stack, outs, 1), (*stack, outs), (*stack, 1, 1), (*stack, 1), tuple(stack)]
    scale = part(entries, name, weight, method, _SCALES, *shapes)
    if block is None:
        block = (1 if math.prod(scale.shape) == math.prod(stack) * outs else outs, inner)
    return matrix((weight, scale), weight.shape, Blocks(weight, scale, block))


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
