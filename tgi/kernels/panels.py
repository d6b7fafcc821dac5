"""Matrices packed for the linear kernel, and the kernel. csrc/linear.h describes how panels lie in memory."""

from dataclasses import dataclass

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Finish, Form, Kind, Linear, Quantize
from tgi.kernels.program import empty, run

OUTPUTS = 32
"""Rows of a matrix come in twos of panels; the last are filled up with zeros."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [outs, inner]. Quantized: weight = (stored - zero) · scale + min, with one scale for ``group`` columns."""

    form: Form
    outs: int
    inner: int
    weight: torch.Tensor
    group: int = 0
    zero: int = 0
    scale: torch.Tensor | None = None
    """[panels, groups, 16] float32 or float16."""
    min: torch.Tensor | None = None

    def unpack(self) -> torch.Tensor:
        """The matrix in float32: the reference of all that is computed with it."""
        panels = -(-self.outs // OUTPUTS) * 2
        if self.form is Form.FP32:
            full = self.weight.view(panels, self.inner, 16).transpose(1, 2)
        elif self.form is Form.BF16:
            full = self.weight.view(panels, -1, 16, 2).transpose(1, 2).reshape(panels, 16, -1)[..., : self.inner]
        else:
            stored = self.weight.view(panels, -1, 16, 4)
            if self.form is Form.INT4:
                stored = torch.stack((stored & 15, stored >> 4), dim=2).view(panels, -1, 16, 4)
            full = stored.transpose(1, 2).reshape(panels, 16, -1).float() - self.zero
            assert self.scale is not None
            full = full * self.scale.float().transpose(1, 2).repeat_interleave(self.group, 2)
            if self.min is not None:
                full = full + self.min.float().transpose(1, 2).repeat_interleave(self.group, 2)
        return full.reshape(-1, self.inner)[: self.outs].float()


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


def linear(
    library: Library,
    panels: Panels,
    x: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    finish: Finish = Finish.STORE,
    alpha: float = 1.0,
) -> torch.Tensor:
    """float32 x [rows, inner] times the matrix → [rows, outs], or half as wide with Finish.GATE. bias: [panels · 16].

    Each row's result is bit-equal whatever the other rows are. Quantized: x is rounded to int8 in groups first.
    """
    assert x.dtype == torch.float32 and x.shape[1] == panels.inner and x.stride(1) == 1
    rows = x.shape[0]
    if out is None:
        out = empty(rows, panels.outs // 2 if finish is Finish.GATE else panels.outs)
    op = Linear(
        Kind.LINEAR,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weight=panels.weight.data_ptr(),
        bias=_address(bias),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        form=panels.form,
        inner=panels.inner,
        outs=panels.outs,
        finish=finish,
        alpha=alpha,
    )
    alive: tuple[object, ...] = (x, panels, bias, out)
    if panels.scale is not None:
        q, scale, total = quantize(library, x, panels.group)
        op.x, op.x_stride, op.x_scale, op.x_sum = q.data_ptr(), q.stride(0), scale.data_ptr(), total.data_ptr()
        op.sum_stride = total.stride(0)
        op.scale, op.min = panels.scale.data_ptr(), _address(panels.min)
        op.group, op.zero, op.half = panels.group, panels.zero, panels.scale.dtype == torch.float16
        alive = (*alive, q, scale, total)
    run(library, op, *alive)
    return out


def quantize(library: Library, x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [rows, size] → int8 [rows, size], and for each group its scale (float32) and its sum (int32)."""
    rows, size = x.shape
    q = empty(rows, size, torch.int8)
    scale, total = empty(rows, size // group), empty(rows, size // group, torch.int32)
    op = Quantize(
        Kind.QUANTIZE,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        q=q.data_ptr(),
        q_stride=q.stride(0),
        scale=scale.data_ptr(),
        sum=total.data_ptr(),
        sum_stride=total.stride(0),
        size=size,
        group=group,
    )
    run(library, op, x, q, scale, total)
    return q, scale, total


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % OUTPUTS))


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[outs, groups] → [panels, groups, 16]."""
    return _padded(values).view(-1, 16, values.shape[1]).transpose(1, 2).contiguous()
