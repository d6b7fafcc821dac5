"""Root-mean-square normalisation."""

import torch
from torch.nn.functional import rms_norm

from tgi.layers.checkpoint import Checkpoint


class RMSNorm:
    """x / rms(x) · w over the last axis (Zhang & Sennrich, arXiv 1910.07467)."""

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._shape = weight.shape
        self._eps = eps

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, size: int, eps: float) -> "RMSNorm":
        return cls(checkpoint.vector(f"{name}.weight", size), eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._shape, self._weight, self._eps)
