"""The linear kernel: rows times a packed matrix."""

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Act, Finish, Form, Kind, Linear
from tgi.kernels.panels import Panels, address
from tgi.kernels.program import empty, run
from tgi.kernels.rows import quantize


def linear(
    library: Library,
    panels: Panels,
    x: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    finish: Finish = Finish.STORE,
    act: Act = Act.NONE,
    alpha: float = 1.0,
    cap: float = 0.0,
) -> torch.Tensor:
    """float32 x [rows, inner] times the matrix → [rows, outs], or half as wide with Finish.GATE. bias: [panels · 16].

    act: on the product, or on its gate. cap: if not 0, values become cap · tanh(value / cap), or with Act.CLIP the
    nearest within ± cap. Each row's result is bit-equal whatever the other rows are. With INT8 and INT4, x is rounded
    to int8 in groups first.
    """
    if out is None:
        out = empty(x.shape[0], panels.outs // 2 if finish is Finish.GATE else panels.outs)
    op = Linear(Kind.LINEAR, out=out.data_ptr(), out_stride=out.stride(0), finish=finish, act=act, alpha=alpha, cap=cap)
    multiply(library, op, panels, x, bias)
    return out


def multiply(
    library: Library,
    op: Linear,
    panels: Panels,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    first: torch.Tensor | None = None,
) -> None:
    """Do ``op``, whose result is described, for x [rows, inner] and the matrix; ``first``: of each matrix's rows."""
    assert x.dtype == torch.float32 and x.shape[1] == panels.inner and x.stride(1) == 1
    op.rows = x.shape[0]
    op.x, op.x_stride = x.data_ptr(), x.stride(0)
    op.weight, op.bias = panels.weight.data_ptr(), address(bias)
    op.form, op.inner, op.outs = panels.form, panels.inner, panels.outs
    op.scale, op.min, op.table = address(panels.scale), address(panels.min), address(panels.table)
    op.factors = address(panels.factors)
    op.group, op.zero, op.half = panels.group, panels.zero, panels.half
    if panels.form in (Form.INT8, Form.INT4):
        q, scale, total = quantize(library, x, panels.group, panels.order, first)
        op.x, op.x_stride, op.x_scale, op.x_sum = q.data_ptr(), q.stride(0), scale.data_ptr(), total.data_ptr()
        op.sum_stride = total.stride(0)
    run(library, op, panels, bias)
