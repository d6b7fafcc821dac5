"""The ranks that hold one model together. Today there is one: nothing is sliced and nothing is sent."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the ranks of one model. Layers slice by it at load and call it in their forward."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size != 1:
            raise NotImplementedError(f"{self.size} ranks: tensor parallelism is not implemented")

    def shard(self, size: int) -> slice:
        """This rank's run of an axis of ``size``."""
        return slice(0, size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's ``x``, in place."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` side by side on the last axis."""
        return x
