"""AWQ's tensors (Lin et al., arXiv 2306.00978) as AutoAWQ packs them: 4 bits, eight to a word."""

from collections.abc import Mapping

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Awq, groups_of
from tgi.quantization.grouped import Columns, Integers, columns_of, fields, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry

_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where a word has its first output, its second, …, with the kernel ``gemm``."""


def unpack(entries: Mapping[str, Entry], scheme: Awq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    make = {"gemm": _gemm, "gemv": _gemv}[scheme.version]
    return unpacked(entries, scheme, lambda module, shape: matrix(module, shape, make(module, shape, scheme.group)))


def _gemm(module: Module[Entry], shape: tuple[int, ...], group: int | None) -> Integers:
    """Words hold eight outputs of one input."""
    outs, inner = shape
    qweight, qzeros, scales = (module.parts[part] for part in ("qweight", "qzeros", "scales"))
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32)

    def outputs(entry: Entry, rows: slice) -> torch.Tensor:
        tiles, place = whole(rows, outs, 8)
        return (entry.values[:][:, tiles, None] >> shifts & 15).flatten(1)[:, place].T.to(torch.uint8)

    return Integers(
        4,
        Columns.even(inner, group),
        lambda rows: outputs(qweight, rows),
        columns_of(scales),
        lambda rows: outputs(qzeros, rows),
    )


def _gemv(module: Module[Entry], shape: tuple[int, ...], group: int | None) -> Integers:
    """Words hold eight inputs of one output; zeros and scales are filled up."""
    qweight, qzeros, scales = (module.parts[part] for part in ("qweight", "qzeros", "scales"))
    groups = groups_of(shape[1], group)

    def inputs(entry: Entry, rows: slice) -> torch.Tensor:
        return fields(entry.values[:][rows].T, 4).T

    return Integers(
        4,
        Columns.even(shape[1], group),
        lambda rows: inputs(qweight, rows),
        lambda rows: scales.values[:][rows, :groups],
        lambda rows: inputs(qzeros, rows)[:, :groups],
    )
