"""Normalisation over the last axis.

Triton's kernels compute it where they run, and are only imported there.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import layer_norm, rms_norm

from tgi.kernels import rows
from tgi.kernels.library import Library
from tgi.kernels.triton import runs_on
from tgi.layers.checkpoint import Checkpoint
from tgi.parallel import Group


class RMSNorm:
    """x / rms(x) · w (Zhang & Sennrich, arXiv 1910.07467)."""

    __slots__ = ("_eps", "_library", "_triton", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float, library: Library | None = None) -> None:
        self._weight = weight
        self._eps = eps
        self._library = library
        self._triton = library is None and runs_on(weight.device)

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, size: int, eps: float, offset: float = 0.0) -> "RMSNorm":
        """``offset``: what the checkpoint leaves away from the weight."""
        return cls(checkpoint.vector(f"{name}.weight", size) + offset, eps, checkpoint.library)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._normed(x)

    def add(self, into: torch.Tensor, x: torch.Tensor) -> None:
        """Add the norm of ``x`` to ``into``."""
        self._normed(x, into, add=True)

    def replace(self, x: torch.Tensor) -> None:
        """Put the norm of ``x``, which may be some columns of a tensor, in its place."""
        self._normed(x, x)

    def of_sum(self, into: torch.Tensor, x: torch.Tensor, factor: float, behind: "RMSNorm | None") -> torch.Tensor:
        """Add ``factor · x``, or its norm ``behind`` a block, to ``into``, and return the norm of that: one kernel of
        Triton's."""
        from tgi.kernels.triton.rows import add_norm

        first = None if behind is None else (behind._weight, behind._eps)
        return add_norm(into, x, factor, self._weight, self._eps, first)

    def _normed(self, x: torch.Tensor, out: torch.Tensor | None = None, *, add: bool = False) -> torch.Tensor:
        if self._library is not None:
            return rows.rms_norm(self._library, x, self._weight, self._eps, out=out, add=add)
        if self._triton:
            from tgi.kernels.triton.rows import norm

            return norm(x, self._weight, None, self._eps, out=out, add=add)
        normed = rms_norm(x, self._weight.shape, self._weight, self._eps)
        if out is None:
            return normed
        return out.add_(normed) if add else out.copy_(normed)


class SharedNorm:
    """An RMSNorm over the numbers of all ranks."""

    __slots__ = ("_group", "_library", "_norm", "_own", "_widths")

    def __init__(
        self, weight: torch.Tensor, eps: float, group: Group, widths: Sequence[int], library: Library | None
    ) -> None:
        """``weight``: of all numbers; ``widths``: how many each rank has."""
        self._norm = RMSNorm(weight, eps, library)
        self._group = group
        self._widths = widths
        self._library = library
        begin = sum(widths[: group.rank])
        self._own = slice(begin, begin + widths[group.rank])

    def replace(self, x: torch.Tensor) -> None:
        """Put the norm of this rank's ``x``, which may be some columns of a tensor, in its place."""
        if self._group.size == 1:
            self._norm.replace(x)
            return
        whole = self._group.all_gather(x, self._widths)
        self._norm.replace(whole)
        if self._library is not None:
            rows.copy(self._library, whole[:, self._own], x)
        else:
            x.copy_(whole[:, self._own])


class LayerNorm:
    """(x - mean) / deviation · w + b (Ba, Kiros & Hinton, arXiv 1607.06450).

    w and b of [parts, size]: the last axis of x is as many parts, each normed by itself.
    """

    __slots__ = ("_bias", "_eps", "_library", "_triton", "_weight")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, library: Library | None = None
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps
        self._library = library
        self._triton = library is None and runs_on(weight.device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        size: int,
        eps: float,
        *,
        weight: bool = True,
        bias: bool = True,
        offset: float = 0.0,
    ) -> "LayerNorm":
        """``offset``: what the checkpoint leaves away from the weight."""
        factor = torch.ones(size, dtype=checkpoint.compute, device=checkpoint.device)
        if weight:
            factor = checkpoint.vector(f"{name}.weight", size) + offset
        return cls(factor, checkpoint.vector(f"{name}.bias", size) if bias else None, eps, checkpoint.library)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._normed(x)

    def replace(self, x: torch.Tensor) -> None:
        """Put the norm of ``x``, which may be some columns of a tensor, in its place."""
        self._normed(x, x)

    def _normed(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._library is not None:
            return rows.layer_norm(self._library, x, self._weight, self._bias, self._eps, out=out)
        if self._triton:
            from tgi.kernels.triton.rows import norm

            return norm(x, self._weight, self._bias, self._eps, center=True, out=out)
        if self._weight.dim() == 1:
            normed = layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)
        else:
            parts = layer_norm(x.reshape(-1, *self._weight.shape), self._weight.shape[-1:], eps=self._eps)
            parts.mul_(self._weight)
            normed = (parts if self._bias is None else parts.add_(self._bias)).flatten(-2)
        return normed if out is None else out.copy_(normed)
