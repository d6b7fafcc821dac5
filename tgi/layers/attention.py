"""What happens to a layer's packed projection before attention: q and k are normed and rotated."""

from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

from tgi.layers.checkpoint import Checkpoint
from tgi.layers.rotary import Angles, rotate


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over every head of q and k at once, each kind with its own weight."""

    weight: torch.Tensor
    """[heads + kv heads, head dim]."""
    eps: float

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, heads: int, kv_heads: int, dim: int, eps: float) -> "HeadNorm":
        q, k = (checkpoint.vector(f"{name}.{kind}_norm.weight", dim) for kind in "qk")
        return cls(torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1))), eps)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """[tokens, heads + kv heads, head dim] → the same."""
        return rms_norm(heads, heads.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Turn:
    """One layer's share of a step: how q, k and v are made of the projection. A kernel may read the fields instead."""

    heads: int
    kv_heads: int
    angles: Angles | None
    norm: HeadNorm | None

    def __call__(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, (heads + 2 kv heads) · head dim] → q [tokens, heads, head dim]; k, v, the kv heads likewise."""
        packed = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, -1)
        turning, v = packed[:, : -self.kv_heads], packed[:, -self.kv_heads :]
        if self.norm is not None:
            turning = self.norm(turning)
        if self.angles is not None:
            turning = rotate(turning, self.angles)
        return turning[:, : self.heads], turning[:, self.heads :], v
