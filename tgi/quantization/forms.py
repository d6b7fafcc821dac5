"""Matrices of float8 numbers and of codes into a table, with scales: what a parser makes and a kernel multiplies."""

import math
from collections.abc import Callable
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
        return replace(self, values=self.values[:, run], scale=_cut(self.scale, run, self.shape[1]))

    def dequantize(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        return _scaled(self.values.float(), self.scale)


@dataclass(frozen=True, slots=True)
class Codes:
    """table[codes] · scale, with one scale for each group of columns of a row: NF4, FP4, MXFP4, NVFP4."""

    codes: torch.Tensor
    """uint8 [outs, inner], below 16."""
    table: torch.Tensor
    """float32 [16]."""
    scale: torch.Tensor
    """float32 [outs, groups]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """``pick`` chooses or reorders rows, alike for all parts."""
        return replace(self, codes=pick(self.codes), scale=pick(self.scale))

    def columns(self, run: slice) -> "Codes":
        """A run of columns; where it cuts groups, all become smaller."""
        return replace(self, codes=self.codes[:, run], scale=_cut(self.scale, run, self.shape[1]))

    def dequantize(self) -> torch.Tensor:
        """float32 [outs, inner]."""
        return _scaled(self.table[self.codes.int()], self.scale)


def _scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[outs, inner], [outs, groups] → [outs, inner]."""
    outs, groups = scale.shape
    return (values.view(outs, groups, -1) * scale[..., None]).view_as(values)


def _cut(scale: torch.Tensor, run: slice, inner: int) -> torch.Tensor:
    """The scales [outs, groups] of a run of the columns."""
    start, stop, _ = run.indices(inner)
    group = inner // scale.shape[1]
    if start // group == (stop - 1) // group:
        return scale[:, start // group, None]
    size = math.gcd(group, start, stop)
    return scale.repeat_interleave(group // size, 1)[:, start // size : stop // size]
