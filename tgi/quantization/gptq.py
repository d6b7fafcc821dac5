"""GPTQ's tensors (Frantar et al., arXiv 2210.17323): integers packed into words along the inputs."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from tgi.quantization.grouped import (
    FLOATS,
    INTEGERS,
    Columns,
    Integers,
    Module,
    Part,
    columns_of,
    fields,
    unpacked,
    whole,
)
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import Gptq


def unpack(entries: Mapping[str, Entry], scheme: Gptq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    if {"gptq_bits", "gptq_groupsize"} <= entries.keys():
        # TGI's own quantizer writes tensors that overrule the config.
        bits, group = (int(entries[key].values[:]) for key in ("gptq_bits", "gptq_groupsize"))
        scheme = replace(scheme, bits=bits, group=None if group == -1 else group)
        entries = {name: entry for name, entry in entries.items() if not name.startswith("gptq_")}
    return unpacked(entries, scheme, lambda module: _matrix(module, scheme))


def _matrix(module: Module, scheme: Gptq) -> Entry:
    bits, group = scheme.of(module.name)
    period = bits if 32 % bits else 1
    qweight, words, outs = module.matrix("qweight", INTEGERS, period, 32 if 32 % bits else 1)
    inner = words * 32 // bits
    groups = -(-inner // (group or inner))
    rule = f"bits {bits} and group_size {group or -1}"
    scales = module.part("scales", FLOATS, (groups, outs), rule)
    qzeros = module.part("qzeros", INTEGERS, (groups, -(-outs * bits // 32)), rule)
    columns = Columns.even(inner, group)
    if "g_idx" in module.parts:
        index = module.part("g_idx", ("I32", "I64"), (inner,), rule).values[:].long()
        if index.min() < 0 or index.max() >= groups:
            raise module.wrong("g_idx", f"has groups {index.min()} to {index.max()}, of which there are {groups}")
        columns = Columns.of(index)

    def codes(rows: slice) -> torch.Tensor:
        return fields(qweight.values[:][:, rows], bits).T

    zeros = _zeros(qzeros, bits, outs, less_one=scheme.less_one)
    return module.entry(outs, Integers(bits, columns, codes, columns_of(scales), zeros))


def _zeros(stored: Entry, bits: int, outs: int, *, less_one: bool) -> Part | int:
    """A symmetric matrix has the same everywhere. ``less_one``: that much is taken off each."""
    tile = 32 if 32 % bits else 32 // bits
    wide = tile * bits // 32

    def zeros(rows: slice) -> torch.Tensor:
        tiles, place = whole(rows, outs, tile)
        words = stored.values[:][:, tiles.start * wide : tiles.stop * wide]
        if less_one and 32 % bits == 0:
            # As words, not one by one: GPTQModel takes it off so, and where a zero is 0 that borrows from the next.
            words = words + _ones(bits)
        found = fields(words.T, bits).T[:, place]
        return (found + 1 & (1 << bits) - 1 if less_one and 32 % bits else found).T

    first = int(zeros(slice(0, 1))[0, 0])
    words = stored.values[:]
    period = words.view(len(words), -1, wide)
    return first if bool((period == period[:1, :1]).all()) and bool((zeros(slice(0, tile)) == first).all()) else zeros


def _ones(bits: int) -> int:
    """A word of ones."""
    return sum(1 << at for at in range(0, 32, bits))
