"""Matrices as they are held between the format they are stored in and the kernel that multiplies them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from tgi.quantization import forms
from tgi.quantization.forms import Codes, Float8, cut

T = TypeVar("T", covariant=True)


class Rows(Protocol[T]):
    """A tensor on CPU, all of it or some rows of it; may be a view of a file, or be made when it is asked for."""

    def __getitem__(self, rows: slice, /) -> T: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, as it is stored or as a format makes it of stored ones."""

    path: Path
    shape: tuple[int, ...]
    bytes: int
    kind: str
    """Number format of ``values``, as safetensors names it."""
    values: Rows[torch.Tensor]
    stored: "Rows[torch.Tensor | Packed] | None" = None
    """The same quantized, if it is stored so. Rows of a stack are then counted through all its matrices."""
    turned: bool = False
    """What ``stored`` has rows of is the transpose of ``values``."""
    order: torch.Tensor | None = None
    """int64 [inner]: the input that each of its columns is of, where they are not in the order of inputs."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """(stored - zero) · scale + min, with one scale, and perhaps one min, for each group of columns of a row."""

    bits: int
    """4 or 8."""
    zero: int
    stored: torch.Tensor
    """uint8 [outs, inner], below 2**bits."""
    scale: torch.Tensor
    """float16 or float32 [outs, groups]."""
    min: torch.Tensor | None = None
    order: torch.Tensor | None = None
    """int64 [inner]: the input that each column is of, where they are not in the order of inputs."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.stored.shape[1] // self.scale.shape[1]

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Quantized":
        """``pick`` chooses or reorders rows, alike for all parts."""
        least = None if self.min is None else pick(self.min)
        return replace(self, stored=pick(self.stored), scale=pick(self.scale), min=least)

    def columns(self, run: slice) -> "Quantized | torch.Tensor":
        """Those of a run of inputs. Where it cuts groups, all become smaller; plain if inputs are in another order."""
        inner = self.shape[1]
        if run.indices(inner)[:2] == (0, inner):
            return self
        if self.order is not None:
            return self.dequantize()[:, run]
        least = None if self.min is None else cut(self.min, run, inner)
        return replace(self, stored=self.stored[:, run], scale=cut(self.scale, run, inner), min=least)

    def dequantize(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        outs, inner = self.shape
        values = (self.stored.view(outs, -1, self.group).float() - self.zero) * self.scale.float()[..., None]
        if self.min is not None:
            values = values + self.min.float()[..., None]
        values = values.view(outs, inner)
        return values if self.order is None else torch.empty_like(values).index_copy_(1, self.order, values)

    def like(self, form: "Quantized") -> "Quantized":
        """The same numbers in the ``form`` of another matrix, which holds them exactly."""
        if self._form == form._form:
            return self
        times = self.group // form.group
        least = self.min
        if form.min is not None:
            least = torch.zeros_like(self.scale) if least is None else least
            least = least.to(form.min.dtype).repeat_interleave(times, 1)
        scale = self.scale.to(form.scale.dtype).repeat_interleave(times, 1)
        return Quantized(form.bits, form.zero, self.stored + (form.zero - self.zero), scale, least, self.order)

    def stack(self, parts: "Sequence[Quantized]") -> "Quantized":
        """One above the other, in this form."""
        parts = [part.like(self) for part in parts]
        mins = [part.min for part in parts if part.min is not None]
        return replace(
            self,
            stored=torch.cat([part.stored for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            min=torch.cat(mins) if mins else None,
            order=parts[0].order,
        )

    @property
    def _form(self) -> tuple[object, ...]:
        return self.bits, self.zero, self.group, self.scale.dtype, self.min is not None


Packed = Quantized | Float8 | Codes


@dataclass(frozen=True, slots=True)
class Dequantized:
    """A quantized matrix in float32."""

    stored: "Rows[torch.Tensor | Packed]"

    def __getitem__(self, rows: slice) -> torch.Tensor:
        part = self.stored[rows]
        return part if isinstance(part, torch.Tensor) else part.dequantize()


def common(parts: Sequence[Packed]) -> Packed | None:
    """A matrix of no rows in the narrowest form that holds all parts exactly; None if there is none."""
    integers = [part for part in parts if isinstance(part, Quantized)]
    others = [part for part in parts if not isinstance(part, Quantized)]
    if integers and others:
        return None
    return _common(integers) if integers else forms.common(others)


def _common(parts: Sequence[Quantized]) -> Quantized:
    zeros = {p.zero for p in parts}  # the largest is 128 wherever all 256 values occur
    bits = 4 if all(p.bits == 4 for p in parts) and len(zeros) == 1 else 8
    dtype = torch.float32 if any(p.scale.dtype == torch.float32 for p in parts) else torch.float16
    inner = parts[0].shape[1]
    scale = torch.empty(0, inner // math.gcd(*(p.group for p in parts)), dtype=dtype)
    least = scale if any(p.min is not None for p in parts) else None
    return Quantized(bits, max(zeros), torch.empty(0, inner, dtype=torch.uint8), scale, least)


def stack(parts: Sequence[Any], form: Packed) -> Packed:
    """One matrix above the other, in the ``form`` that all have in common, as one order of columns."""
    return form.stack(parts)


def one_order(orders: Sequence[torch.Tensor | None]) -> bool:
    """Whether all are the same; None: that of inputs."""
    if any(order is None for order in orders):
        return all(order is None for order in orders)
    return all(
        torch.equal(order, other) for order, other in pairwise(orders) if order is not None and other is not None
    )


def quantize(weight: torch.Tensor, bits: int) -> Quantized | None:
    """Round a floating-point matrix [outs, inner] to ``bits``; None if its rows don't divide into groups.

    8 bits: scale such that a group's largest number becomes 127. 4 bits: of a few scales around that, the one with the
    least squared error.
    """
    outs, inner = weight.shape
    group = next((size for size in (32, 16) if inner % size == 0), None)
    if group is None:
        return None
    blocks = weight.float().view(outs, -1, group)
    if bits == 8:
        scale = (blocks.abs().amax(-1) / 127).half()
        return _rounded(blocks, scale, 8)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, least = torch.zeros_like(extreme, dtype=torch.float16), torch.full_like(extreme, float("inf"))
    for steps in (-8.5, -8.25, -8.0, -7.75, -7.5, -7.25, -7.0, -6.75):
        scale = (extreme / steps).half()
        errors = (_round(blocks, scale, 8) * scale.float()[..., None] - blocks).square_().sum(-1)
        better = errors < least
        best, least = torch.where(better, scale, best), torch.where(better, errors, least)
    return _rounded(blocks, best, 4)


def _round(blocks: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    divisor = scale.float()
    inverse = torch.where(divisor == 0, 0.0, 1 / divisor)
    return (blocks * inverse[..., None]).round_().clamp_(-half, half - 1)


def _rounded(blocks: torch.Tensor, scale: torch.Tensor, bits: int) -> Quantized:
    half = 1 << bits - 1
    stored = (_round(blocks, scale, half) + half).to(torch.uint8).flatten(1)
    return Quantized(bits, half, stored, scale)
