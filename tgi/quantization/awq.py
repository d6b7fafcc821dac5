"""AWQ's tensors (Lin et al., arXiv 2306.00978) as AutoAWQ packs them: 4 bits, eight to a word."""

from collections.abc import Mapping

import torch

from tgi.quantization.grouped import FLOATS, INTEGERS, Columns, Integers, Module, columns_of, fields, unpacked, whole
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import Awq

_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where a word has its first output, its second, …, with the kernel ``gemm``."""


def unpack(entries: Mapping[str, Entry], scheme: Awq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    make = {"gemm": _gemm, "gemv": _gemv}[scheme.version]
    return unpacked(entries, scheme, lambda module: make(module, scheme))


def _gemm(module: Module, scheme: Awq) -> Entry:
    """Words hold eight outputs of one input."""
    qweight, inner, words = module.matrix("qweight", INTEGERS, 1, 1)
    outs, rule = words * 8, f"group_size {scheme.group or -1}"
    groups = -(-inner // (scheme.group or inner))
    scales = module.part("scales", FLOATS, (groups, outs), rule)
    qzeros = module.part("qzeros", INTEGERS, (groups, words), rule)
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32)

    def outputs(entry: Entry, rows: slice) -> torch.Tensor:
        tiles, place = whole(rows, outs, 8)
        return (entry.values[:][:, tiles, None] >> shifts & 15).flatten(1)[:, place].T.to(torch.uint8)

    return module.entry(
        outs,
        Integers(
            4,
            Columns.even(inner, scheme.group),
            lambda rows: outputs(qweight, rows),
            columns_of(scales),
            lambda rows: outputs(qzeros, rows),
        ),
    )


def _gemv(module: Module, scheme: Awq) -> Entry:
    """Words hold eight inputs of one output. Zeros and scales are filled up to whole words, by the kernel's needs."""
    qweight, outs, words = module.matrix("qweight", INTEGERS, 1, 1)
    inner, rule = words * 8, f"group_size {scheme.group or -1}"
    group = scheme.group or inner
    groups, times = -(-inner // group), max(128 // group, 1)
    wide = -(-(inner // group) // (8 * times)) * times
    scales = module.part("scales", FLOATS, (outs, wide * 8), rule)
    qzeros = module.part("qzeros", INTEGERS, (outs, wide), rule)

    def inputs(entry: Entry, rows: slice) -> torch.Tensor:
        return fields(entry.values[:][rows].T, 4).T

    return module.entry(
        outs,
        Integers(
            4,
            Columns.even(inner, scheme.group),
            lambda rows: inputs(qweight, rows),
            lambda rows: scales.values[:][rows, :groups],
            lambda rows: inputs(qzeros, rows)[:, :groups],
        ),
    )
