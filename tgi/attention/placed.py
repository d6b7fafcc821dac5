"""A step's segments in device memory, where kernels that run later read them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from numpy.typing import ArrayLike, NDArray

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
        starts, contexts, rows, firsts, pages = (torch.from_numpy(part).to(device) for part in arrays([segments]))
        return cls(starts, contexts, firsts, pages, rows, singles(segments))


def arrays(kinds: Sequence[Sequence[Segment]]) -> list[NDArray[numpy.int32]]:
    """Of segments that have other pages for each kind of layer: starts, contexts, rows, each kind's firsts, and all
    pages, as in Placed."""
    lengths = numpy.array([segment.length for segment in kinds[0]], numpy.int32)
    contexts = numpy.array([segment.start for segment in kinds[0]], numpy.int32)
    rows = numpy.repeat(numpy.arange(len(lengths), dtype=numpy.int32), lengths)
    pages = [numpy.asarray(segment.blocks, numpy.int32) for segments in kinds for segment in segments]
    firsts = _begins([len(part) for part in pages])[:-1].reshape(len(kinds), -1)
    return [_begins(lengths), contexts, rows, *firsts, numpy.concatenate(pages)]


def _begins(lengths: ArrayLike) -> NDArray[numpy.int32]:
    """Where runs of these lengths begin that lie one behind the other, and where the last ends."""
    return numpy.concatenate(([0], numpy.cumsum(lengths))).astype(numpy.int32)


def singles(segments: Sequence[Segment]) -> int:
    """Segments of one token that stand before all others."""
    return next((at for at, segment in enumerate(segments) if segment.length > 1), len(segments))
