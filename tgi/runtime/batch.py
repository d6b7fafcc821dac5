"""A step's chunks as tensors: one flat token axis, no padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tgi.attention.base import Segment
from tgi.core.plan import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one chunk behind the other."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    segments: list[Segment]

    logit_rows: torch.Tensor
    """Indices into T: the last token of each chunk that samples, in order, then those that score a known token."""
    scored_ids: torch.Tensor
    """The known tokens that the latter score; both lie in the works' order, as ``Work.scored`` has them."""

    @classmethod
    def build(cls, works: Sequence[Work], device: torch.device) -> "Batch":
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        rows: list[int] = []
        scoring: list[int] = []
        scored: list[int] = []
        for work in works:
            end = work.start + work.length
            ids += work.tokens[work.start : end]
            positions += range(work.start, end)
            segments.append(Segment(work.start, work.length, work.blocks))
            if work.samples:
                rows.append(len(ids) - 1)
            if known := work.scored:
                first = len(ids) - end
                scoring += (first + position - 1 for position in known)
                scored += (work.tokens[position] for position in known)
        # One transfer for all.
        packed = torch.tensor(ids + positions + rows + scoring + scored).to(device, non_blocking=True)
        tokens, behind = len(ids), len(packed) - len(scored)
        return cls(packed[:tokens], packed[tokens : 2 * tokens], segments, packed[2 * tokens : behind], packed[behind:])
