"""Matrices of small integers, each group of inputs of an output with a scale and a zero, and how files hold them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_SHRINKS = tuple(1 - step / 20 for step in range(10))
"""Parts of a group's range that are tried: its extremes may cost more than they are worth."""


@dataclass(frozen=True, slots=True)
class Ints:
    """(stored - zero) · scale."""

    bits: int
    stored: torch.Tensor
    """uint8 [outs, inner]."""
    scale: torch.Tensor
    """float16 [outs, groups]."""
    zero: torch.Tensor
    """uint8 [outs, groups]."""

    @property
    def values(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        outs, groups = self.scale.shape
        blocks = self.stored.view(outs, groups, -1).float() - self.zero.float()[..., None]
        return (blocks * self.scale.float()[..., None]).view(outs, -1)

    def divide(self, divisors: torch.Tensor) -> None:
        """Divide each row by a positive number [outs]: only scales change."""
        self.scale.copy_(self.scale.float() / divisors[:, None])


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that groups of weights are rounded to."""

    bits: int
    scale: torch.Tensor
    """float32 [...], as float16 holds it."""
    zero: torch.Tensor
    """float32 [...]."""

    @classmethod
    def between(cls, low: torch.Tensor, high: torch.Tensor, bits: int, *, sym: bool, least: int = 1) -> "Grid":
        """From ``low`` to ``high`` [...]. ``sym``: the zero is in the middle, and what is farther from 0 gets the side
        that has one step more, for which scales may be negative. ``least``: of zeros, for some files hold them less
        one."""
        top, middle = (1 << bits) - 1, 1 << bits - 1
        if sym:
            scale = _half(torch.where(high > -low, high, low) / -middle)
            return cls(bits, scale, torch.full_like(scale, middle))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _half((high - low) / top)
        return cls(bits, scale, (-low / scale).round().clamp(least, top))

    @classmethod
    def fit(cls, blocks: torch.Tensor, bits: int, *, sym: bool) -> "Grid":
        """For ``blocks`` [..., inputs]: that part of their range with the least squared error."""
        low, high = blocks.amin(-1), blocks.amax(-1)
        best, least = cls.between(low, high, bits, sym=sym), torch.full_like(low, float("inf"))
        for shrink in _SHRINKS:
            grid = cls.between(low * shrink, high * shrink, bits, sym=sym)
            errors = (grid.values(grid.round(blocks)) - blocks).square_().sum(-1)
            best = grid.where(errors < least, best)
            least = torch.minimum(errors, least)
        return best

    def where(self, chosen: torch.Tensor, other: "Grid") -> "Grid":
        """This grid for the groups that are ``chosen``, the ``other`` for the rest."""
        scale, zero = torch.where(chosen, self.scale, other.scale), torch.where(chosen, self.zero, other.zero)
        return Grid(self.bits, scale, zero)

    def round(self, blocks: torch.Tensor) -> torch.Tensor:
        """float32 [..., inputs] → the nearest integers, in float32."""
        steps = (blocks / self.scale[..., None]).round_().add_(self.zero[..., None])
        return steps.clamp_(0, (1 << self.bits) - 1)

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """Of integers [..., inputs]."""
        return (stored - self.zero[..., None]) * self.scale[..., None]

    def ints(self, stored: torch.Tensor) -> Ints:
        """Of a whole matrix: groups [outs, groups], integers [outs, groups, inputs]."""
        return Ints(self.bits, stored.flatten(1).to(torch.uint8), self.scale.half(), self.zero.to(torch.uint8))


def _half(scale: torch.Tensor) -> torch.Tensor:
    """As float16 holds it, and never 0."""
    near = scale.half().float()
    return torch.where(near == 0, 2.0**-24, near)


def gptq_tensors(ints: Ints) -> Mapping[str, torch.Tensor]:
    """Words of 32 bits along the inputs; zeros less one, along the outputs."""
    inner, groups = ints.stored.shape[1], ints.scale.shape[1]
    return {
        "qweight": _words(ints.stored.T, ints.bits),
        "qzeros": _words((ints.zero - 1), ints.bits).T.contiguous(),
        "scales": ints.scale.T.contiguous(),
        "g_idx": torch.arange(inner, dtype=torch.int32) // (inner // groups),
    }


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in which four bits of a word, from the lowest."""


def awq_tensors(ints: Ints) -> Mapping[str, torch.Tensor]:
    """Words of eight outputs of an input; zeros alike."""

    def words(values: torch.Tensor) -> torch.Tensor:
        """[outs, n] → [n, outs / 8]."""
        ordered = values.view(-1, 8, values.shape[1])[:, _AWQ_ORDER].flatten(0, 1)
        return _words(ordered, 4).T.contiguous()

    return {"qweight": words(ints.stored), "qzeros": words(ints.zero), "scales": ints.scale.T.contiguous()}


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns] → int32 [rows · bits / 32, columns]; the first row is in the lowest bits."""
    each = 32 // bits
    words = torch.zeros(values.shape[0] // each, values.shape[1], dtype=torch.int32, device=values.device)
    for place in range(each):
        words |= values[place::each].int() << place * bits
    return words
