"""ggml's blocks of numbers (the GGUF format): read as they are where our kernels have the form, or dequantized."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tgi.quantization.quantized import Quantized

_NUMPY = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file, whose rows are read when they are asked for."""

    data: Any
    """numpy uint8, flat: its blocks, row by row."""
    kind: str
    """ggml's name of the type."""
    shape: tuple[int, ...]
    order: Any = None
    """Of rows, where the file has its own. ["pairs", heads]: those of a head that rotate together lie side by side: 0,
    half, 1, half + 1, … They are read as 0, 1, …, half, half + 1, … ["groups", [heads, kv heads]]: all queries, all
    keys, all values. They are read as the queries of a kv head, its key and its value, and so for the next."""
    shift: float = 0.0
    """To be added, to what is no matrix."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """These rows, or elements of a vector, in floating point; plain numbers may be a view of the file."""
        if len(self.shape) == 1:
            return torch.from_numpy(self._values(self.data)[self._places(rows)] + np.float32(self.shift))
        blocks = self.blocks(rows)
        if self.kind == "BF16":
            return torch.from_numpy(blocks.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self._values(blocks))

    def blocks(self, rows: slice) -> Any:
        """Of these rows of a matrix: numpy uint8 [rows, bytes of one]."""
        return self.data.reshape(self.shape[0], -1)[self._places(rows)]

    def _places(self, rows: slice) -> Any:
        """Where these rows are."""
        stored = np.arange(self.shape[0])
        match self.order:
            case ["pairs", heads]:
                return stored.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)[rows]
            case ["groups", [heads, kv_heads]]:
                q, k, v = np.split(stored.reshape(heads + 2 * kv_heads, -1), [heads, heads + kv_heads])
                return np.concatenate([part.reshape(kv_heads, -1) for part in (q, k, v)], axis=1).reshape(-1)[rows]
        return rows

    def _values(self, blocks: Any) -> Any:
        """In floating point, with as many axes."""
        if self.kind in _NUMPY:
            return blocks.view(_NUMPY[self.kind])
        from gguf import GGMLQuantizationType, dequantize

        return dequantize(blocks, GGMLQuantizationType[self.kind])


@dataclass(frozen=True, slots=True)
class Kept:
    """The same, but matrices of integers with scales that our kernels multiply stay such."""

    tensor: Stored

    def __getitem__(self, rows: slice) -> torch.Tensor | Quantized:
        if self.tensor.kind not in _PARSERS or len(self.tensor.shape) != 2:
            return self.tensor[rows]
        block, parse = _PARSERS[self.tensor.kind]
        blocks = self.tensor.blocks(rows)
        return parse(torch.from_numpy(blocks.reshape(len(blocks), -1, block)))


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte ``at`` of each block: [outs, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[outs, blocks, 16] bytes → [outs, blocks · 32]: a block's lower halves first, then its upper ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)


def _q8_0(blocks: torch.Tensor) -> Quantized:
    """32 int8 behind a scale."""
    return Quantized(8, 128, (blocks[..., 2:] ^ 0x80).flatten(1), _half(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> Quantized:
    """32 numbers of 4 bits, less 8, behind a scale."""
    return Quantized(4, 8, _nibbles(blocks[..., 2:]), _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Quantized:
    """32 numbers of 4 bits behind a scale and a minimum."""
    return Quantized(4, 0, _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2))


def _fifth(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fifth bits, four bytes at byte ``at`` of each block: [outs, blocks · 32] of 0 or 16."""
    bits = blocks[..., at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1) << 4


def _q5_0(blocks: torch.Tensor) -> Quantized:
    """Like Q4_0 with a fifth bit, less 16."""
    return Quantized(8, 16, _nibbles(blocks[..., 6:]) | _fifth(blocks, 2), _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Quantized:
    """Like Q4_1 with a fifth bit."""
    return Quantized(8, 0, _nibbles(blocks[..., 8:]) | _fifth(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight scales and eight minima of 6 bits in 12 bytes: [outs, blocks, 8] each."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=-1)
    least = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), dim=-1)
    return scale, least


def _q4_k(blocks: torch.Tensor) -> Quantized:
    """256 numbers of 4 bits in eight groups, whose scales and minima are multiples of the block's."""
    scale, least = _k_scales(blocks[..., 4:16])
    stored = blocks[..., 16:].view(*blocks.shape[:2], 4, 32)
    stored = torch.stack((stored & 15, stored >> 4), dim=-2).flatten(1)
    return Quantized(4, 0, stored, *_multiples(blocks, scale, least))


def _q5_k(blocks: torch.Tensor) -> Quantized:
    """Like Q4_K with a fifth bit."""
    scale, least = _k_scales(blocks[..., 4:16])
    fifth = blocks[..., 16:48, None] >> torch.arange(8, dtype=torch.uint8) & 1
    stored = blocks[..., 48:].view(*blocks.shape[:2], 4, 32)
    stored = torch.stack((stored & 15, stored >> 4), dim=-2).flatten(2) | fifth.transpose(-1, -2).flatten(2) << 4
    return Quantized(8, 0, stored.flatten(1), *_multiples(blocks, scale, least))


def _multiples(blocks: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _half(blocks, 0).float()[..., None] * scale
    minima = _half(blocks, 2).float()[..., None] * least
    return scales.flatten(1), -minima.flatten(1)


def _q6_k(blocks: torch.Tensor) -> Quantized:
    """256 numbers of 6 bits, less 32, in sixteen groups, whose scales are multiples of the block's."""
    outs, count = blocks.shape[:2]
    low = blocks[..., :128].view(outs, count, 2, 1, 64)
    high = blocks[..., 128:192].view(outs, count, 2, 1, 32)
    low = torch.cat((low & 15, low >> 4), dim=3).view(outs, count, 2, 4, 32)
    high = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    scale = blocks[..., 192:208].view(torch.int8).float() * _half(blocks, 208).float()[..., None]
    return Quantized(8, 32, (low | high << 4).flatten(1), scale.flatten(1))


_PARSERS = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""Type → bytes of a block, and what reads it."""
