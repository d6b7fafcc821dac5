"""What a layer needs to take its weights: the checkpoint's tensors by name, and where they go."""

from dataclasses import dataclass
from typing import Protocol

import torch

from tgi.parallel import Group


class Tensors(Protocol):
    """A checkpoint. Reading the same tensor twice is an error, so that none is forgotten or mistaken."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on CPU in its stored dtype, read-only; StartupError if missing or of another shape."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors with their destination."""

    tensors: Tensors
    dtype: torch.dtype
    device: torch.device
    group: Group

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A whole one-dimensional tensor, alike on all ranks."""
        return self.empty(size).copy_(self.tensors.take(name, (size,)))
