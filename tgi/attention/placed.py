"""A step's segments in device memory, where kernels that run later read them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tgi.attention.base import Segment

PADDING = Segment(-1, 1, ())
"""A token of nobody: nothing is stored for it, and it attends to nothing."""


class Placed(NamedTuple):
    """Segments as tensors, int32; those of one token come first. Their places stay the same from step to step if the
    runtime wants it, so that a captured graph finds each step's: kernels take lengths from here alone.
    """

    starts: torch.Tensor
    """[segments + 1]: place of each segment's first token on the token axis, and behind them the number of tokens."""
    contexts: torch.Tensor
    """[segments]: position of its first token; -1 for padding."""
    firsts: torch.Tensor
    """[segments]: where its pages begin …"""
    pages: torch.Tensor
    """… among these; a segment of n tokens has those of all positions below context + n."""
    rows: torch.Tensor
    """[tokens]: the segment of each."""
    singles: int
    """Segments of one token."""

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Placed":
        """In memory of their own."""
        starts, contexts, firsts, pages, rows = (
            torch.tensor(part, dtype=torch.int32, device=device) for part in lists(segments)
        )
        return cls(starts, contexts, firsts, pages, rows, singles(segments))


def lists(segments: Sequence[Segment]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """The tensors of Placed, in their order."""
    starts, contexts, firsts = [0], [], []
    pages: list[int] = []
    rows: list[int] = []
    for at, segment in enumerate(segments):
        starts.append(starts[-1] + segment.length)
        contexts.append(segment.start)
        firsts.append(len(pages))
        pages += segment.blocks
        rows += [at] * segment.length
    return starts, contexts, firsts, pages, rows


def singles(segments: Sequence[Segment]) -> int:
    """Segments of one token that stand before all others."""
    return next((at for at, segment in enumerate(segments) if segment.length > 1), len(segments))
