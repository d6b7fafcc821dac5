"""A step's chunks as one flat token axis, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tgi.attention.base import Segment
from tgi.attention.placed import PADDING
from tgi.core.plan import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one chunk behind the other."""

    token_ids: list[int]
    """[T]; 0 for those that the step before draws."""
    drawn: list[tuple[int, int]]
    """Of these, places in T and in what was drawn."""
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
        drawn: list[tuple[int, int]] = []
        positions: list[int] = []
        segments: list[list[Segment]] = [[] for _ in works[0].blocks]
        last: list[int] = []
        rows: list[int] = []
        scored: list[int] = []
        for work in works:
            start, length, tokens = work.start, work.length, work.tokens
            end = start + length
            if length == 1:
                if start == len(tokens):
                    drawn.append((len(ids), work.scratch["drawn"]))
                    ids.append(0)
                else:
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
        return cls(ids, drawn, positions, segments, works, last, rows, scored)

    @classmethod
    def padding(cls, size: int, kinds: int) -> "Batch":
        """So many tokens that are nobody's. ``kinds``: of layers."""
        return cls([0] * size, [], [0] * size, [[PADDING] * size] * kinds, (), [], [], [])

    def padded(self, size: int) -> "Batch":
        """With such behind, up to ``size`` in all."""
        more = Batch.padding(size - len(self.token_ids), len(self.segments))
        segments = [own + others for own, others in zip(self.segments, more.segments, strict=True)]
        ids, positions = self.token_ids + more.token_ids, self.positions + more.positions
        return replace(self, token_ids=ids, positions=positions, segments=segments)
