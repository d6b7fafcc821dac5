"""MLX's tensors: words of integers along the inputs, with a scale and a minimum for each group of them."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Affine
from tgi.quantization.grouped import Columns, Integers, fields
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Affine) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    return unpacked(entries, scheme, lambda module, shape: _matrix(module, shape, scheme))


def _matrix(module: Module[Entry], shape: tuple[int, ...], scheme: Affine) -> Entry:
    words, scales, minima = (module.parts[part] for part in ("weight", "scales", scheme.minima(module)))

    def codes(rows: slice) -> torch.Tensor:
        return fields(words.values[:].view(torch.int32)[rows].T, scheme.bits).T

    rows_of = Integers(
        scheme.bits,
        Columns.even(shape[1], scheme.group),
        codes,
        lambda rows: scales.values[:][rows],
        0,
        lambda rows: minima.values[:][rows],
    )
    return matrix(module, shape, rows_of)
