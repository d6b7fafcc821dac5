"""Matrices packed for the linear kernel. csrc/linear.h describes how panels lie in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tgi.kernels.ops import Form

FLOAT8 = {Form.E4M3: torch.float8_e4m3fn, Form.E5M2: torch.float8_e5m2}

OUTPUTS = 32
"""Rows of a matrix come in twos of panels; the last are filled up with zeros."""


@dataclass(frozen=True, slots=True)
class Panels:
    """One matrix [outs, inner], or several one behind the other.

    INT8, INT4: (stored - zero) · scale + min; E4M3, E5M2: stored · scale; CODES: table[stored] · scale · factor; with
    one scale for each ``group`` columns.
    """

    form: Form
    outs: int
    inner: int
    weight: torch.Tensor
    group: int = 0
    zero: int = 0
    scale: torch.Tensor | None = None
    """[panels, groups, 16] float32 or float16."""
    min: torch.Tensor | None = None
    table: torch.Tensor | None = None
    """float32 [16]."""
    factors: torch.Tensor | None = None
    """float32 [panels, 16]; None: 1."""
    count: int = 1
    """Of matrices."""
    order: torch.Tensor | None = None
    """int32 [count, inner]: the input that each column is of, where the columns are not in the order of inputs."""

    @property
    def rows(self) -> int:
        """Outputs of a matrix with those that fill up."""
        return -(-self.outs // OUTPUTS) * OUTPUTS

    @property
    def half(self) -> bool:
        """Whether scales are float16."""
        return self.scale is not None and self.scale.dtype == torch.float16

    def unpack(self) -> torch.Tensor:
        """The matrices in float32, one below the other: the reference of all that is computed with them."""
        panels = self.count * self.rows // 16
        if self.form is Form.FP32:
            full = self.weight.view(panels, self.inner, 16).transpose(1, 2)
        elif self.form is Form.BF16:
            full = self.weight.view(panels, -1, 16, 2).transpose(1, 2).reshape(panels, 16, -1)[..., : self.inner]
        else:
            assert self.scale is not None
            full = self._stored(panels) * self.scale.float().transpose(1, 2).repeat_interleave(self.group, 2)
            if self.min is not None:
                full = full + self.min.float().transpose(1, 2).repeat_interleave(self.group, 2)
            if self.factors is not None:
                full = full * self.factors[..., None]
        full = full.reshape(self.count, self.rows, self.inner)[:, : self.outs].float()
        if self.order is not None:
            full = torch.empty_like(full).scatter_(2, self.order.long()[:, None].expand_as(full), full)
        return full.reshape(-1, self.inner)

    def _stored(self, panels: int) -> torch.Tensor:
        """float32 [panels, 16, inner]: what is multiplied by the scales."""
        if self.form in FLOAT8:
            weight = self.weight.view(FLOAT8[self.form]).view(panels, -1, 2, 16, 2)
            return weight.permute(0, 3, 1, 4, 2).reshape(panels, 16, -1).float()
        stored = self.weight.view(panels, -1, 16, 4)
        if self.table is not None:
            nibbles = torch.stack((stored & 15, stored >> 4), dim=-1)
            return self.table[nibbles.transpose(1, 2).reshape(panels, 16, -1).int()]
        if self.form is Form.INT4:
            stored = torch.stack((stored & 15, stored >> 4), dim=2).view(panels, -1, 16, 4)
        return stored.transpose(1, 2).reshape(panels, 16, -1).float() - self.zero


def pack(matrix: torch.Tensor) -> Panels:
    """Of a float32 or bfloat16 ``matrix`` [outs, inner], as it is."""
    outs, inner = matrix.shape
    if matrix.dtype == torch.float32:
        weight = _padded(matrix).view(-1, 16, inner).transpose(1, 2).contiguous()
        return Panels(Form.FP32, outs, inner, weight)
    assert matrix.dtype == torch.bfloat16
    padded = torch.nn.functional.pad(_padded(matrix), (0, inner % 2))
    weight = padded.view(-1, 16, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return Panels(Form.BF16, outs, inner, weight)


def pack_quantized(
    stored: torch.Tensor, scale: torch.Tensor, min: torch.Tensor | None, *, bits: int, zero: int
) -> Panels:
    """Of stored: uint8 [outs, inner] below 2**bits; scale and min: float [outs, groups]."""
    outs, inner = stored.shape
    blocks = _padded(stored).view(-1, 16, inner // 4, 4).transpose(1, 2)
    if bits == 4:
        blocks = blocks[:, 0::2] | blocks[:, 1::2] << 4
    return Panels(
        Form.INT4 if bits == 4 else Form.INT8,
        outs,
        inner,
        blocks.contiguous(),
        inner // scale.shape[1],
        zero,
        _grouped(scale),
        None if min is None else _grouped(min),
    )


def pack_float8(values: torch.Tensor, scale: torch.Tensor) -> Panels:
    """Of values: float8_e4m3fn or float8_e5m2 [outs, inner]; scale: float [outs, groups] of a multiple of 4 columns.

    Where e4m3fn has no number, the whole group will have none.
    """
    outs, inner = values.shape
    form = next(form for form, dtype in FLOAT8.items() if dtype == values.dtype)
    group = inner // scale.shape[1]
    broken = values.float().isnan().view(outs, -1, group).any(-1)
    blocks = _padded(values.view(torch.uint8)).view(-1, 16, inner // 4, 2, 2).permute(0, 2, 4, 1, 3)
    scale = _grouped(scale.masked_fill(broken, torch.nan))
    return Panels(form, outs, inner, blocks.contiguous(), group, scale=scale)


def pack_codes(
    codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None = None
) -> Panels:
    """Of codes: uint8 [outs, inner] below 16; table: float32 [16]; scale: float [outs, groups] of a multiple of 8
    columns; factor: float32 [outs, 1]."""
    outs, inner = codes.shape
    pairs = _padded(codes).view(-1, 16, inner // 8, 4, 2)
    blocks = (pairs[..., 0] | pairs[..., 1] << 4).transpose(1, 2)
    group = inner // scale.shape[1]
    factors = None if factor is None else _padded(factor).view(-1, 16)
    return Panels(
        Form.CODES, outs, inner, blocks.contiguous(), group, scale=_grouped(scale), table=table, factors=factors
    )


def assemble(parts: Iterable[Panels], outs: int, count: int = 1) -> Panels:
    """One matrix of ``outs`` rows, or ``count`` of them, from panels that follow one another. Each goes to its place
    before the next is made."""
    panels = count * -(-outs // OUTPUTS) * OUTPUTS // 16
    whole: Panels | None = None
    at = 0
    for part in parts:
        if whole is None:
            rooms: dict[str, Any] = {name: _room(getattr(part, name), panels) for name in _PARTS}
            whole = replace(part, outs=outs, count=count, **rooms)
        for name in _PARTS:
            if (into := getattr(whole, name)) is not None:
                into[at : at + len(part.weight)] = getattr(part, name)
        at += len(part.weight)
    assert whole is not None and at == panels
    return whole


_PARTS = ("weight", "scale", "min", "factors")
"""What there is of each panel."""


def _room(like: torch.Tensor | None, panels: int) -> torch.Tensor | None:
    return None if like is None else torch.empty(panels, *like.shape[1:], dtype=like.dtype)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where its memory begins, for a kernel; None for none."""
    return None if tensor is None else tensor.data_ptr()


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % OUTPUTS))


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[outs, groups] → [panels, groups, 16]."""
    return _padded(values).view(-1, 16, values.shape[1]).transpose(1, 2).contiguous()
