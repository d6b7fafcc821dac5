"""A step's chunks as one flat token axis, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

from tgi.attention.base import Segment
from tgi.core.plan import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one chunk behind the other."""

    token_ids: list[int]
    """[T]."""
    positions: list[int]
    """[T]."""
    segments: list[list[Segment]]
    """For each kind of layer."""
    works: Sequence[Work]
    """One for each segment."""

    last_rows: list[int]
    """Places in T of the last token of each chunk that samples, in the works' order."""
    scored_rows: list[int]
    """Those before a known token that is to be scored, likewise."""
    scored_ids: list[int]
    """These known tokens."""

    @classmethod
    def build(cls, works: Sequence[Work]) -> "Batch":
        ids: list[int] = []
        positions: list[int] = []
        segments: list[list[Segment]] = [[] for _ in works[0].blocks]
        last: list[int] = []
        rows: list[int] = []
        scored: list[int] = []
        for work in works:
            start, length, tokens = work.start, work.length, work.tokens
            end = start + length
            if length == 1:
                ids.append(tokens[start])
                positions.append(start)
            else:
                ids += tokens[start:end]
                positions += range(start, end)
            for kind, blocks in zip(segments, work.blocks, strict=True):
                kind.append(Segment(start, length, blocks))
            if work.samples:
                last.append(len(ids) - 1)
            if work.told < len(tokens) and (known := work.scored):
                first = len(ids) - end
                rows += (first + position - 1 for position in known)
                scored += (tokens[position] for position in known)
        return cls(ids, positions, segments, works, last, rows, scored)
