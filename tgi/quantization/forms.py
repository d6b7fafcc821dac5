"""Matrices of float8 numbers and of codes into a table, with scales: what a parser makes and a kernel multiplies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Float8:
    """values · scale, with one scale for each group of columns of a row."""

    values: torch.Tensor
    """float8_e4m3fn or float8_e5m2 [outs, inner]."""
    scale: torch.Tensor
    """float32 [outs, groups]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] // self.scale.shape[1]

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Float8":
        """``pick`` chooses or reorders rows, alike for all parts."""
        return replace(self, values=pick(self.values), scale=pick(self.scale))

    def columns(self, run: slice) -> "Float8":
        """A run of columns; where it cuts groups, all become smaller."""
        return replace(self, values=self.values[:, run], scale=cut(self.scale, run, self.shape[1]))

    def stack(self, parts: "Sequence[Float8]") -> "Float8":
        """One above the other, in groups as large as these."""
        values = torch.cat([part.values for part in parts])
        return replace(self, values=values, scale=_stacked(parts, self.group))

    def dequantize(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        return _scaled(self.values.float(), self.scale)


@dataclass(frozen=True, slots=True)
class Codes:
    """table[codes] · scale · factor, with one scale for each group of columns of a row, and a factor for the row: NF4,
    FP4, MXFP4, NVFP4."""

    codes: torch.Tensor
    """uint8 [outs, inner], below 16."""
    table: torch.Tensor
    """float32 [16]."""
    scale: torch.Tensor
    """float32 or float16 [outs, groups]."""
    factor: torch.Tensor | None = None
    """float32 [outs, 1]; None: 1."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """``pick`` chooses or reorders rows, alike for all parts."""
        factor = None if self.factor is None else pick(self.factor)
        return replace(self, codes=pick(self.codes), scale=pick(self.scale), factor=factor)

    def columns(self, run: slice) -> "Codes":
        """A run of columns; where it cuts groups, all become smaller."""
        return replace(self, codes=self.codes[:, run], scale=cut(self.scale, run, self.shape[1]))

    def stack(self, parts: "Sequence[Codes]") -> "Codes":
        """One above the other, in groups as large as these."""
        codes = torch.cat([part.codes for part in parts])
        factors = [part.factor for part in parts if part.factor is not None]
        return replace(
            self, codes=codes, scale=_stacked(parts, self.group), factor=torch.cat(factors) if factors else None
        )

    def alike(self, other: "Codes") -> bool:
        """Whether codes and scales mean the same."""
        kinds = [(part.scale.dtype, part.factor is None) for part in (self, other)]
        return kinds[0] == kinds[1] and torch.equal(self.table, other.table)

    def dequantize(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        values = _scaled(self.table[self.codes.int()], self.scale)
        return values if self.factor is None else values * self.factor


def _scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[outs, inner], [outs, groups] → [outs, inner]."""
    outs, groups = scale.shape
    return (values.view(outs, groups, -1) * scale[..., None]).view_as(values)


def cut(scale: torch.Tensor, run: slice, inner: int) -> torch.Tensor:
    """The scales [outs, groups] of a run of the ``inner`` columns; where it cuts groups, of smaller ones."""
    start, stop, _ = run.indices(inner)
    group = inner // scale.shape[1]
    if start // group == (stop - 1) // group:
        return scale[:, start // group, None]
    size = math.gcd(group, start, stop)
    return scale.repeat_interleave(group // size, 1)[:, start // size : stop // size]


def common(parts: Sequence[Float8 | Codes]) -> Float8 | Codes | None:
    """A matrix of no rows in the form that holds all parts exactly; None if their numbers mean different things."""
    first = parts[0]
    for part in parts:
        if isinstance(part, Float8) and isinstance(first, Float8) and part.values.dtype == first.values.dtype:
            continue
        if isinstance(part, Codes) and isinstance(first, Codes) and part.alike(first):
            continue
        return None
    groups = first.shape[1] // math.gcd(*(part.group for part in parts))
    return replace(first.rows(lambda part: part[:0]), scale=torch.empty(0, groups, dtype=first.scale.dtype))


def _stacked(parts: Sequence[Float8] | Sequence[Codes], group: int) -> torch.Tensor:
    """Scales [outs, groups] of groups that divide all others."""
    return torch.cat([part.scale.repeat_interleave(part.group // group, 1) for part in parts])
