"""Feed-forward blocks."""

import torch

from tgi.core.model_config import Activation, ModelShape
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.linear import ColumnLinear, RowLinear


class GatedMLP:
    """down(act(gate(x)) · up(x)), gate and up in one product (SwiGLU, GEGLU; Shazeer, arXiv 2002.05202)."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: ColumnLinear, down: RowLinear, activation: Activation) -> None:
        """``gate_up`` is loaded as ``gated``."""
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        shape: ModelShape,
        activation: Activation,
        *,
        bias: bool = False,
        packed: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> "GatedMLP":
        """Gate, up and down of the module ``name``; the first two may be ``packed`` in gate_up_proj."""
        gate, up, down = names
        hidden, inner = shape.hidden, shape.intermediate
        parts: dict[str, tuple[int, ...]] = {f"{name}.{gate}": (inner,), f"{name}.{up}": (inner,)}
        if packed:
            parts = {f"{name}.gate_up_proj": (inner, inner)}
        gate_up = ColumnLinear.load(checkpoint, parts, hidden, bias=bias, gated=True)
        return cls(gate_up, RowLinear.load(checkpoint, f"{name}.{down}", hidden, inner, bias=bias), activation)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        return self._down(self._gate_up.gate(x, self._activation))

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        self._down.add(into, self._gate_up.gate(x, self._activation), factor)


class PlainMLP:
    """down(act(up(x)))."""

    __slots__ = ("_activation", "_down", "_up")

    def __init__(self, up: ColumnLinear, down: RowLinear, activation: Activation) -> None:
        self._up = up
        self._down = down
        self._activation = activation

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        shape: ModelShape,
        activation: Activation,
        *,
        up: str,
        down: str,
        bias: bool,
        transposed: bool = False,
    ) -> "PlainMLP":
        """``up``, ``down``: the modules."""
        hidden, inner = shape.hidden, shape.intermediate
        return cls(
            ColumnLinear.load(checkpoint, {up: (inner,)}, hidden, bias=bias, transposed=transposed),
            RowLinear.load(checkpoint, down, hidden, inner, bias=bias, transposed=transposed),
            activation,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        return self._down(self._up.method.activated(x, self._activation))

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        self._down.add(into, self._up.method.activated(x, self._activation), factor)
