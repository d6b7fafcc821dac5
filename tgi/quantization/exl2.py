"""ExLlamaV2's tensors: inputs by their importance, in groups of 2 to 8 bits each; scales are squares of 4 bits."""

from collections.abc import Mapping
from itertools import pairwise

import torch

from tgi.quantization.formats.base import Module
from tgi.quantization.formats.integers import Exl2
from tgi.quantization.grouped import Columns, Integers, fields, whole
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry


def unpack(entries: Mapping[str, Entry], scheme: Exl2) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    return unpacked(entries, scheme, _matrix)


def _matrix(module: Module[Entry], shape: tuple[int, ...]) -> Entry:
    outs, inner = shape
    weight, scales, most = (module.parts[part] for part in ("q_weight", "q_scale", "q_scale_max"))
    place, table = (module.parts[part].values[:].long() & 0xFFFF for part in ("q_invperm", "q_groups"))
    words, count = weight.shape[0], len(table) // 2
    if not torch.equal(place.sort().values, torch.arange(inner)):
        raise module.wrong("q_invperm", f"is no order of {inner} inputs")
    bits, starts = table.view(-1, 2).T.tolist()
    runs = [slice(*run) for run in pairwise([*starts, words])]
    sizes = [(run.stop - run.start) * 32 // width for run, width in zip(runs, bits, strict=True) if width]
    if not set(bits) <= {2, 3, 4, 5, 6, 8} or sum(sizes) != inner or any(size <= 0 or size % 16 for size in sizes):
        raise module.wrong("q_groups", f"has groups of {bits} bits and {sizes} of {inner} inputs")
    widest = max(bits)
    half = 8 if widest <= 4 else 1 << widest - 1
    groups = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    columns = Columns.of(groups)
    columns = Columns(inner, columns.unit, columns.groups, place.argsort())

    def codes(rows: slice) -> torch.Tensor:
        some = weight.values[:][:, rows]
        # Each group's middle is brought to the same number.
        parts = [fields(some[run], width) + (half - (1 << width - 1)) for run, width in zip(runs, bits, strict=True)]
        return torch.cat(parts).T

    def scale(rows: slice) -> torch.Tensor:
        tiles, own = whole(rows, outs, 8)
        steps = fields(scales.values[:][:, tiles].T, 4).T[:, own].float() + 1
        return (steps.square() * (most.values[:].float() / 256)[:, None]).T

    return matrix(module, shape, Integers(widest, columns, codes, scale, half, ordered=True), columns.order)
