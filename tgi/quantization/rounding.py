"""Quantization at load, by the names that ``--quantize`` has for it."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from tgi.quantization import bitsandbytes, fp8
from tgi.quantization.quantized import Packed, quantize

ROUNDING: Mapping[str | None, Callable[[torch.Tensor], Packed | None]] = {
    "int8": partial(quantize, bits=8),
    "int4": partial(quantize, bits=4),
    "fp8": fp8.quantize,
    "bitsandbytes": bitsandbytes.quantize_rows,
    "bitsandbytes-nf4": partial(bitsandbytes.quantize, kind="nf4"),
    "bitsandbytes-fp4": partial(bitsandbytes.quantize, kind="fp4"),
}
"""What a floating-point matrix [outs, inner] becomes; None if it must stay as it is."""

VOCABULARY: Mapping[str | None, str | None] = {
    "int4": "int8",
    **dict.fromkeys(("fp8", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4")),
}
"""What matrices of the vocabulary are rounded to instead, or not at all, as other programs leave them out by these
names: rare tokens have nothing else than their row."""
