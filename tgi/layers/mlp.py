"""The gated feed-forward block."""

import torch

from tgi.layers.linear import ColumnLinear, RowLinear


class GatedMLP:
    """down(silu(gate(x)) · up(x)), gate and up in one product (SwiGLU; Shazeer, arXiv 2002.05202)."""

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: ColumnLinear, down: RowLinear) -> None:
        """``gate_up`` is loaded as ``gated``."""
        self._gate_up = gate_up
        self._down = down

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        self._down.add(into, self._gate_up.gate(x), factor)
