"""Kernels of mixtures of experts: which expert a row goes to, products with the matrices of many, and their sum."""

from dataclasses import dataclass

import torch

from tgi.kernels.library import Library
from tgi.kernels.linear import multiply
from tgi.kernels.ops import Act, Arrange, Experts, Finish, Kind, Mix, Pick, Route, Score
from tgi.kernels.panels import Panels, address
from tgi.kernels.program import empty, run, vector


def route(
    library: Library,
    products: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    per_token: int,
    score: Score,
    jitter: float = 0.0,
    groups: int = 1,
    groups_per_token: int = 1,
    group_best: int = 1,
    norm: float = 0.0,
    norm_least: float = 0.0,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, experts], [experts] → weights float32, experts int32: each [rows, per_token], the best first.

    The options are those of core/model_config.py's Routing. Of equal scores the first is better.
    """
    assert products.stride(1) == 1
    rows, experts = products.shape
    weights = vector(rows * per_token, torch.float32)
    chosen = vector(rows * per_token, torch.int32)
    op = Route(
        Kind.ROUTE,
        rows,
        x=products.data_ptr(),
        x_stride=products.stride(0),
        bias=address(bias),
        chosen=chosen.data_ptr(),
        weight=weights.data_ptr(),
        experts=experts,
        per_token=per_token,
        score=score,
        groups=groups,
        groups_per_token=groups_per_token,
        group_best=group_best,
        jitter=jitter,
        norm=norm,
        norm_least=norm_least,
        factor=factor,
    )
    run(library, op, bias)
    return weights.view(rows, per_token), chosen.view(rows, per_token)


@dataclass(frozen=True, slots=True)
class Pairs:
    """A step's pairs of a row and one of its experts, in the order of experts."""

    first: torch.Tensor
    """int32 [experts + 1]: where each expert's begin."""
    place: torch.Tensor
    """int32 [rows, per_token]: where each pair is."""
    row: torch.Tensor
    """int32 [pairs]: what row each has."""


def arrange(library: Library, chosen: torch.Tensor, experts: int) -> Pairs:
    """Of ``chosen``, int32 [rows, per_token]."""
    rows, per_token = chosen.shape
    assert chosen.is_contiguous()
    first, place, row = (vector(size, torch.int32) for size in (experts + 1, rows * per_token, rows * per_token))
    op = Arrange(
        Kind.ARRANGE,
        rows,
        chosen=chosen.data_ptr(),
        first=first.data_ptr(),
        place=place.data_ptr(),
        row=row.data_ptr(),
        experts=experts,
        per_token=per_token,
    )
    run(library, op)
    return Pairs(first, place.view(rows, per_token), row)


def pick(library: Library, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The rows ``place``, int32 [n], of x float32 [rows, size] → [n, size]."""
    out = empty(len(place), x.shape[1])
    op = Pick(
        Kind.PICK,
        len(place),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        place=place.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        size=x.shape[1],
    )
    run(library, op)
    return out


def linear(
    library: Library,
    panels: Panels,
    x: torch.Tensor,
    first: torch.Tensor,
    *,
    finish: Finish = Finish.STORE,
    act: Act = Act.NONE,
) -> torch.Tensor:
    """The rows of each expert times its matrix: as kernels/linear.py's, with matrix e for the rows first[e] to
    first[e + 1] of x."""
    out = empty(len(x), panels.outs // 2 if finish is Finish.GATE else panels.outs)
    op = Experts(
        Kind.EXPERTS,
        out=out.data_ptr(),
        out_stride=out.stride(0),
        finish=finish,
        act=act,
        alpha=1.0,
        first=first.data_ptr(),
        experts=panels.count,
    )
    multiply(library, op, panels, x, None, first)
    return out


def mix(
    library: Library,
    x: torch.Tensor,
    weights: torch.Tensor,
    place: torch.Tensor | None = None,
    *,
    into: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """``factor`` times Σ weights[row, i] · x[place[row, i]] for each row; added to ``into`` if that is given.

    Without ``place`` each row has its own of x, and one weight.
    """
    out = empty(len(weights), x.shape[1]) if into is None else into
    rows, size = out.shape
    assert weights.is_contiguous() and (place is None or place.is_contiguous())
    op = Mix(
        Kind.MIX,
        rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        place=address(place),
        weight=weights.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        size=size,
        per_token=weights.shape[1],
        add=into is not None,
        factor=factor,
    )
    run(library, op)
    return out
