"""The residual stream: what blocks add to, and norms are taken of."""

import torch

from tgi.layers.norm import RMSNorm


class Stream:
    """Of a step's tokens."""

    __slots__ = ("_triton", "_waiting", "x")

    def __init__(self, x: torch.Tensor, *, triton: bool) -> None:
        """``x``: [tokens, hidden]; a block's product may add to it. ``triton``: what is added by itself waits for the
        next norm, with which it is one kernel."""
        self.x = x
        self._triton = triton
        self._waiting: tuple[torch.Tensor, float, RMSNorm | None] | None = None

    def seen(self, norm: RMSNorm | None) -> torch.Tensor:
        """What the next block takes: the stream, or its norm."""
        if norm is not None and self._waiting is not None:
            product, factor, behind = self._waiting
            self._waiting = None
            return norm.of_sum(self.x, product, factor, behind)
        self._add()
        return self.x if norm is None else norm(self.x)

    def add(self, product: torch.Tensor, factor: float = 1.0, norm: RMSNorm | None = None) -> None:
        """Add ``factor`` times what a block made, or the ``norm`` of it."""
        self._add()
        self._waiting = product, factor, norm
        if not self._triton:
            self._add()

    def _add(self) -> None:
        if self._waiting is None:
            return
        product, factor, norm = self._waiting
        self._waiting = None
        if norm is None:
            self.x.add_(product, alpha=factor)
        else:
            norm.add(self.x, product)
