"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and those that are left make up for
what the rounding did to the product."""

import torch

from tgi.quantizer.ints import Grid, Ints

_BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""


def hessian(x: torch.Tensor) -> torch.Tensor:
    """Of the squared error of a product with ``x`` [tokens, inner]: [inner, inner], up to a factor."""
    return x.T @ x / len(x)


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
    weight, curvature = weight.clone(), curvature.clone()
    unused = curvature.diagonal() == 0
    curvature.diagonal()[unused] = 1
    weight[:, unused] = 0
    order = curvature.diagonal().argsort(descending=True) if act_order else torch.arange(inner, device=weight.device)
    grids = list[Grid]()
    if act_order:
        grids = [Grid.fit(block, bits, sym=sym) for block in weight.view(outs, -1, group).unbind(1)]
        weight, curvature = weight[:, order], curvature[order][:, order]
    upper = _root(curvature, damp)
    stored = torch.empty_like(weight)
    block = max(_BLOCK // group, 1) * group if group <= _BLOCK else _BLOCK
    for start in range(0, inner, block):
        stop = min(start + block, inner)
        errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            if not act_order and column % group == 0:
                grids.append(Grid.fit(weight[:, column : column + group], bits, sym=sym))
            grid = grids[int(order[column]) // group]
            own = weight[:, column : column + 1]
            stored[:, column : column + 1] = steps = grid.round(own)
            error = (own - grid.values(steps)) / upper[column, column]
            weight[:, column:stop] -= error * upper[column, column:stop]
            errors[:, column - start] = error[:, 0]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    scale, zero = torch.stack([grid.scale for grid in grids], 1), torch.stack([grid.zero for grid in grids], 1)
    stored = stored[:, order.argsort()]
    return Grid(bits, scale, zero).ints(stored.view(outs, -1, group))


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
