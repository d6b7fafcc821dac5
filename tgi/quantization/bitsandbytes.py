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

from tgi.quantization.formats.base import Module, widest
from tgi.quantization.formats.floats import BitsAndBytes
from tgi.quantization.forms import Codes
from tgi.quantization.grouped import Columns, Integers
from tgi.quantization.parts import matrix, unpacked
from tgi.quantization.quantized import Entry, Quantized

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
    if scheme.bits == 8:
        return unpacked(entries, scheme, _integers)
    return unpacked(entries, scheme, lambda module, shape: _codes(module, shape[0], scheme.state))


def _integers(module: Module[Entry], shape: tuple[int, ...]) -> Entry:
    """int8 with a scale for each row, which takes 127 to the row's largest number."""
    weight, most = module.parts["weight"], module.parts["SCB"]

    def codes(rows: slice) -> torch.Tensor:
        return weight.values[rows].view(torch.uint8) ^ 0x80

    columns = Columns.even(shape[1], None)
    return matrix(module, shape, Integers(8, columns, codes, lambda rows: most.values[rows][:, None] / 127, 128))


def _codes(module: Module[Entry], numbers: int, says: str) -> Entry:
    try:
        state = json.loads(bytes(module.parts[says].values[:].tolist()))
        outs, inner = map(int, state["shape"])
        block, nested, offset = (state.get(key, 0) for key in ("blocksize", "nested_blocksize", "nested_offset"))
        blocks = -(-outs * inner // int(block))
        above = -(-blocks // nested) if nested else 0
    except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise module.wrong(says, f"is no description of a matrix: {error!r}") from None
    if -(-outs * inner // 2) * 2 != numbers:
        raise module.wrong("weight", f"has {numbers // 2} bytes, its shape is {(outs, inner)}")
    module.part("weight.absmax", ("U8" if nested else "F32",), (blocks,), rule=f"blocks of {block}")
    if nested:
        module.part("weight.nested_absmax", ("F32",), (above,), rule=f"blocks of {nested} scales")
    parts = {part: module.parts[f"weight.{part}"] for part in ("absmax", "quant_map")}
    if nested:
        parts |= {part: module.parts[f"weight.{part}"] for part in ("nested_absmax", "nested_quant_map")}
    return matrix(module, (outs, inner), _Coded(module.parts["weight"], parts, (outs, inner), block, nested, offset))


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


def quantize_rows(weight: torch.Tensor) -> Quantized:
    """Round a floating-point matrix [outs, inner] to int8, each row's largest number to 127; in groups only because
    activations are rounded in the same."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    scale[scale == 0] = 1
    stored = (weight.float() / scale).round_().clamp_(-127, 127) + 128
    groups = weight.shape[1] // widest(weight.shape[1])
    return Quantized(8, 128, stored.to(torch.uint8), scale.expand(-1, groups))


def quantize(weight: torch.Tensor, kind: str) -> Codes | None:
    """Round a floating-point matrix [outs, inner] to the levels of ``kind``, each block's largest number to ± 1; None
    if its rows don't divide into blocks."""
    outs, inner = weight.shape
    block = math.gcd(inner, BLOCK)
    if block < 16:
        return None
    blocks = weight.float().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    table = TABLES[kind].to(weight.device)
    levels, order = table.sort(stable=True)
    nearest = torch.bucketize(blocks * (1 / scale.clamp(min=1e-38)), (levels[1:] + levels[:-1]) / 2)
    return Codes(order.to(torch.uint8)[nearest].view(outs, inner), table, scale.view(outs, -1))
