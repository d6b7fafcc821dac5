"""The gated feed-forward block."""

import torch
from torch.nn.functional import silu

from tgi.layers.linear import ColumnLinear, RowLinear


class GatedMLP:
    """down(silu(gate(x)) · up(x)), gate and up in one product (SwiGLU; Shazeer, arXiv 2002.05202)."""

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: ColumnLinear, down: RowLinear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(silu_mul(gate, up))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up. Each element's value is independent of its place.

    torch's own CPU silu is not: the vector loop and the scalar loop behind it round differently, and where one ends
    depends on the batch and the number of threads. exp and division round alike in both.
    """
    if gate.device.type != "cpu":
        return silu(gate) * up
    denominator = gate.neg().exp_().add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)
