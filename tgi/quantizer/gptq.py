"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and those that are left make up for
what the rounding did to the product."""

import torch

from tgi.quantization.base import dense
from tgi.quantizer.ints import Grid, Ints

_BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""
_STRIP = 256
"""Columns of the Hessian that are computed at once, down to the diagonal: below, it is the same."""
_TOKENS = 4096
"""Whose share of the Hessian is computed at once."""
_FIRST = 1 / 8
"""What the first token of a sequence counts, as a share of all."""


def hessian(x: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Of the squared error of a product with ``x`` [tokens, inner]: [inner, inner], up to a factor.

    ``length``: of the sequences that ``x`` is made of. The first token of each then counts as many: all others attend
    to it strongly (Xiao et al., arXiv 2309.17453), so that an error there is one everywhere.
    """
    inner = x.shape[1]
    upper = x.new_zeros(inner, inner)
    for part in torch.split(x, _TOKENS):
        rows = part.T.contiguous()
        for start in range(0, inner, _STRIP):
            own = slice(start, start + _STRIP)
            upper[: own.stop, own] += dense(rows[own], None)(rows[: own.stop])
    found = upper.triu() + upper.triu(1).T
    if length is not None:
        first = x[::length]
        found += length * _FIRST * (first.T @ first)
    return found.div_(len(x))


def quantize(
    weight: torch.Tensor,
    curvature: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    sym: bool,
    damp: float,
    act_order: bool,
) -> Ints:
    """Round ``weight`` [outs, inner] so that its product with inputs of this ``curvature`` changes little.

    None: nothing is known of the inputs, and each number is rounded by itself. ``damp``: what is added to the diagonal,
    as a share of its mean. ``act_order``: columns of large inputs come first; grids are then fixed before, so that
    groups stay runs of neighbours. Raises ArithmeticError.
    """
    outs, inner = weight.shape
    if curvature is None:
        grid = Grid.fit(weight.view(outs, -1, group), bits, sym=sym)
        return grid.ints(grid.round(weight.view(outs, -1, group)))
    columns, curvature = weight.T.clone(memory_format=torch.contiguous_format), curvature.clone()
    unused = curvature.diagonal() == 0
    curvature.diagonal()[unused] = 1
    columns[unused] = 0
    order = torch.arange(inner, device=weight.device)
    grids = list[Grid]()
    if act_order:
        order = curvature.diagonal().argsort(descending=True)
        grids = [Grid.fit(block.T, bits, sym=sym) for block in torch.split(columns, group)]
        columns, curvature = columns[order], curvature[order][:, order]
    upper = _root(curvature, damp)
    numbers, divisors = order.tolist(), upper.diagonal().tolist()
    stored = torch.empty_like(columns)
    block = max(_BLOCK // group, 1) * group if group <= _BLOCK else _BLOCK
    for start in range(0, inner, block):
        stop = min(start + block, inner)
        errors = torch.empty_like(columns[start:stop])
        for at in range(start, stop):
            if not act_order and at % group == 0:
                grids.append(Grid.fit(columns[at : at + group].T, bits, sym=sym))
            grid = grids[numbers[at] // group]
            own = columns[at, :, None]
            steps = grid.round(own)
            stored[at] = steps[:, 0]
            errors[at - start] = error = (own - grid.values(steps))[:, 0] / divisors[at]
            columns[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    scale, zero = torch.stack([grid.scale for grid in grids], 1), torch.stack([grid.zero for grid in grids], 1)
    return Grid(bits, scale, zero).ints(stored[order.argsort()].T.reshape(outs, -1, group))


def _root(curvature: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; damped more if it takes that. Raises ArithmeticError."""
    mean = curvature.diagonal().mean()
    while damp * mean < float("inf"):
        curvature.diagonal().add_(damp * mean)
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        damp *= 10
    raise ArithmeticError("its inputs on the calibration text are not finite")
