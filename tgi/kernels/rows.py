"""Kernels that work on one row of activations at a time: embedding, norm, quantization."""

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Embed, Kind, Norm, Quantize
from tgi.kernels.panels import Panels, address
from tgi.kernels.program import empty, run


def embed(library: Library, panels: Panels, ids: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """The rows ``ids`` (int64 [rows]) of a matrix, in float32, times ``factor``."""
    out = empty(len(ids), panels.inner)
    op = Embed(
        Kind.EMBED,
        len(ids),
        ids=ids.data_ptr(),
        weight=panels.weight.data_ptr(),
        scale=address(panels.scale),
        min=address(panels.min),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        form=panels.form,
        size=panels.inner,
        group=panels.group,
        half=panels.half,
        zero=panels.zero,
        factor=factor,
    )
    run(library, op, panels)
    return out


def rms_norm(library: Library, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 [rows, size], [size] → x / rms(x) · weight."""
    rows, size = x.shape
    out = empty(rows, size)
    op = Norm(
        Kind.NORM,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        size=size,
        eps=eps,
    )
    run(library, op, weight)
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
    run(library, op)
    return q, scale, total
