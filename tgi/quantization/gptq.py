"""GPTQ's tensors (Frantar et al., arXiv 2210.17323): integers packed into words along the inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.core.errors import StartupError
from tgi.quantization.quantized import Dequantized, Entry, Quantized
from tgi.quantization.scheme import Gptq

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack(entries: Mapping[str, Entry], scheme: Gptq) -> dict[str, Entry]:
    """Modules' packed tensors as the one matrix ``weight`` that each makes; all others as they are."""
    found = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] not in _PARTS}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            found[f"{module}.weight"] = _matrix(module, entry, entries, scheme)
    return found


def _matrix(module: str, packed: Entry, entries: Mapping[str, Entry], scheme: Gptq) -> Entry:
    words, outs = packed.shape
    inner = words * 32 // scheme.bits
    groups = 1 if scheme.group is None else inner // scheme.group
    parts = {"qweight": packed}
    for part, shape in (("scales", (groups, outs)), ("qzeros", (groups, outs * scheme.bits // 32))):
        name = f"{module}.{part}"
        if name not in entries:
            raise StartupError(f"{packed.path}: tensor {name} is missing")
        parts[part] = entry = entries[name]
        if entry.shape != shape:
            raise StartupError(f"{entry.path}: tensor {name} has shape {entry.shape}, gptq implies {shape}")
    stored = _Packed(parts, scheme.bits)
    size = sum(entry.bytes for entry in parts.values())
    return Entry(packed.path, (outs, inner), size, "F32", Dequantized(stored), stored)


@dataclass(frozen=True, slots=True)
class _Packed:
    parts: Mapping[str, Entry]
    bits: int

    def __getitem__(self, rows: slice) -> Quantized:
        qweight, scales, qzeros = (self.parts[part].values[:] for part in ("qweight", "scales", "qzeros"))
        each = 32 // self.bits
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        mask = (1 << self.bits) - 1
        stored = (qweight[:, rows, None] >> shifts & mask).to(torch.uint8)  # [words, outs, each]
        stored = stored.permute(1, 0, 2).reshape(stored.shape[1], -1)
        scale = scales[:, rows].T.float()
        outs = range(*rows.indices(scales.shape[1]))
        zeros = (qzeros[:, [out // each for out in outs]] >> shifts[[out % each for out in outs]] & mask).T + 1
        # In float32, for in half precision the product would not be what the checkpoint means.
        return Quantized(self.bits, 0, stored, scale.contiguous(), (-zeros * scale).contiguous())
