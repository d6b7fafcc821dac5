"""Root-mean-square normalisation."""

import torch
from torch.nn.functional import rms_norm

from tgi.kernels.library import Library
from tgi.kernels.rows import rms_norm as native_rms_norm
from tgi.layers.checkpoint import Checkpoint


class RMSNorm:
    """x / rms(x) · w over the last axis (Zhang & Sennrich, arXiv 1910.07467)."""

    __slots__ = ("_eps", "_library", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float, library: Library | None = None) -> None:
        self._weight = weight
        self._eps = eps
        self._library = library

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, size: int, eps: float) -> "RMSNorm":
        return cls(checkpoint.vector(f"{name}.weight", size), eps, checkpoint.library)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._library is not None:
            return native_rms_norm(self._library, x, self._weight, self._eps)
        return rms_norm(x, self._weight.shape, self._weight, self._eps)
