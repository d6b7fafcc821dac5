"""Kernels that work on one row of activations at a time: embedding, norm, quantization."""

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Embed, Kind, Norm, Pick, Quantize
from tgi.kernels.panels import Panels, address
from tgi.kernels.program import empty, run


def embed(
    library: Library,
    panels: Panels,
    ids: torch.Tensor,
    factor: float = 1.0,
    first: int = 0,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows ``first + ids`` (int64 [rows]) of a matrix, in float32, times ``factor``, zeros where there is none;
    added to ``into`` if that is given. Its columns are in the order of inputs."""
    assert panels.order is None
    out = empty(len(ids), panels.inner) if into is None else into
    op = Embed(
        Kind.EMBED,
        len(ids),
        ids=ids.data_ptr(),
        weight=panels.weight.data_ptr(),
        scale=address(panels.scale),
        min=address(panels.min),
        table=address(panels.table),
        factors=address(panels.factors),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        form=panels.form,
        size=panels.inner,
        group=panels.group,
        half=panels.half,
        zero=panels.zero,
        first=first,
        count=panels.outs,
        add=into is not None,
        factor=factor,
    )
    run(library, op, panels)
    return out


def rms_norm(
    library: Library,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """float32 [rows, size], [size] → x / rms(x) · weight, written to ``out`` if that is given, or added to it.

    ``out`` may be ``x``. ``weight`` of [parts, size]: rows are as many parts, each normed by itself.
    """
    return _norm(library, x, weight, None, eps, out, center=False, add=add)


def layer_norm(
    library: Library,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """The same with (x - mean) / deviation · weight + bias; ``bias`` is shaped as ``weight``."""
    return _norm(library, x, weight, bias, eps, out, center=True, add=add)


def _norm(
    library: Library,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    *,
    center: bool,
    add: bool,
) -> torch.Tensor:
    rows, width = x.shape
    assert weight.numel() == width and weight.is_contiguous()
    out = empty(rows, width) if out is None else out
    op = Norm(
        Kind.NORM,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weight=weight.data_ptr(),
        bias=address(bias),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        size=weight.shape[-1],
        parts=width // weight.shape[-1],
        center=center,
        add=add,
        eps=eps,
    )
    run(library, op, weight, bias)
    return out


def copy(library: Library, x: torch.Tensor, out: torch.Tensor) -> None:
    """float32 [rows, size] into ``out``, which has its shape."""
    rows, size = x.shape
    op = Pick(
        Kind.PICK,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        size=size,
    )
    run(library, op)


def quantize(
    library: Library,
    x: torch.Tensor,
    group: int,
    order: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [rows, size] → int8 [rows, size], and for each group its scale (float32) and its sum (int32).

    ``order``, int32 [matrices, size]: the numbers of x are taken in this order first; of several matrices that of m for
    the rows first[m] to first[m + 1].
    """
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
        matrices=0 if order is None else len(order),
        order=address(order),
        first=address(first),
    )
    run(library, op, order)
    return q, scale, total
