"""What bitsandbytes writes, and the same at load: codes of 4 bits in blocks (Dettmers et al., arXiv 2305.14314), and
LLM.int8 (arXiv 2208.07339).

LLM.int8 multiplies columns in which an activation is greater than a threshold apart from the others, in half
precision, since its other activations are rounded to int8 by the whole row. Ours are float32, or are rounded by groups
of the weight's own columns.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.core.errors import StartupError
from tgi.quantization.forms import Codes
from tgi.quantization.parts import matrix, part
from tgi.quantization.quantized import Entry, Quantized
from tgi.quantization.scheme import BitsAndBytes

BLOCK = 64
"""Numbers that share a scale where weights are rounded at load."""

_LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
TABLES = {name: torch.tensor(levels) for name, levels in _LEVELS.items()}
"""What the codes mean."""


def unpack(entries: Mapping[str, Entry], scheme: BitsAndBytes) -> dict[str, Entry]:
    """Bytes ``X.weight``, and tensors whose names begin so, or int8 and ``X.SCB``, as the one matrix that they make."""
    found = {name: entry for name, entry in entries.items() if ".weight." not in name}
    for name, entry in list(found.items()):
        if not name.endswith(".weight"):
            continue
        if scheme.bits == 4 and (entry.kind == "U8" or f"{name}.absmax" in entries):
            found[name] = _coded(entries, name, scheme)
        elif scheme.bits == 8 and entry.kind == "I8":
            module = name.removesuffix("weight")
            scale = part(entries, f"{module}SCB", entry, scheme.method, ("F32",), entry.shape[:1])
            found[name] = matrix((entry, scale), entry.shape, _Rows(entry, scale))
            del found[f"{module}SCB"]
            found.pop(f"{module}weight_format", None)
    return found


def _coded(entries: Mapping[str, Entry], name: str, scheme: BitsAndBytes) -> Entry:
    packed = entries[name]
    says = part(entries, f"{name}.quant_state.bitsandbytes__{scheme.kind}", packed, scheme.method, ("U8",))
    try:
        state = json.loads(bytes(says.values[:].tolist()))
        outs, inner = map(int, state["shape"])
        block, nested, offset = (state.get(key, 0) for key in ("blocksize", "nested_blocksize", "nested_offset"))
        blocks = -(-outs * inner // int(block))
    except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise StartupError(f"{packed.path}: tensor {name} is described wrongly: {error!r}") from None
    if packed.bytes != -(-outs * inner // 2):
        raise StartupError(f"{packed.path}: tensor {name} has {packed.bytes} bytes, its shape is {(outs, inner)}")
    parts = {
        "absmax": part(entries, f"{name}.absmax", packed, scheme.method, ("U8" if nested else "F32",), (blocks,)),
        "quant_map": part(entries, f"{name}.quant_map", packed, scheme.method, ("F32",), (16,)),
    }
    if nested:
        for key, size in (("nested_absmax", -(-blocks // nested)), ("nested_quant_map", 256)):
            parts[key] = part(entries, f"{name}.{key}", packed, scheme.method, ("F32",), (size,))
    stored = _Coded(packed, parts, (outs, inner), block, nested, offset)
    return matrix((packed, says, *parts.values()), (outs, inner), stored)


@dataclass(frozen=True, slots=True)
class _Coded:
    """A matrix whose numbers are cut into blocks one row behind the other, so that a block may be of two rows."""

    packed: Entry
    parts: Mapping[str, Entry]
    shape: tuple[int, int]
    block: int
    nested: int
    """Blocks whose scales share a scale; 0: they have none."""
    offset: float

    def __getitem__(self, rows: slice) -> Codes:
        outs, inner = self.shape
        start, stop, step = rows.indices(outs)
        first = start * inner // 2
        packed = self.packed.values[:].view(torch.uint8).flatten()[first : -(-stop * inner // 2)]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[start * inner - 2 * first :]
        codes = codes[: (stop - start) * inner].view(stop - start, inner)
        group = math.gcd(inner, self.block)
        at = torch.arange(start, stop, step)[:, None] * inner + torch.arange(0, inner, group)
        return Codes(codes[::step], self.parts["quant_map"].values[:], self._scale(at // self.block))

    def _scale(self, block: torch.Tensor) -> torch.Tensor:
        """Of these blocks."""
        most = self.parts["absmax"].values[:][block]
        if not self.nested:
            return most
        levels, scale = (self.parts[key].values[:] for key in ("nested_quant_map", "nested_absmax"))
        return levels[most.int()] * scale[block // self.nested] + self.offset


@dataclass(frozen=True, slots=True)
class _Rows:
    """int8 with a scale for each row, which takes 127 to the row's largest number."""

    weight: Entry
    scale: Entry

    def __getitem__(self, rows: slice) -> Quantized:
        stored = self.weight.values[rows].view(torch.uint8) ^ 0x80
        return Quantized(8, 128, stored, self.scale.values[rows][:, None] / 127)


def quantize_rows(weight: torch.Tensor) -> Quantized:
    """Round a floating-point matrix [outs, inner] to int8, each row's largest number to 127."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    scale[scale == 0] = 1
    stored = (weight.float() / scale).round_().clamp_(-127, 127) + 128
    return Quantized(8, 128, stored.to(torch.uint8), scale)


def quantize(weight: torch.Tensor, kind: str) -> Codes | None:
    """Round a floating-point matrix [outs, inner] to the levels of ``kind``, each block's largest number to ± 1; None
    if its rows don't divide into blocks."""
    outs, inner = weight.shape
    block = math.gcd(inner, BLOCK)
    if block < 16:
        return None
    blocks = weight.float().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    levels, order = TABLES[kind].sort(stable=True)
    nearest = torch.bucketize(blocks * (1 / scale.clamp(min=1e-38)), (levels[1:] + levels[:-1]) / 2)
    return Codes(order.to(torch.uint8)[nearest].view(outs, inner), TABLES[kind], scale.view(outs, -1))
