"""What the scheduler hands to the runner for one chunk, and what it gets back. Data only.

Structs, because each step makes several for each row: a frozen dataclass takes five times as long to make.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from tgi.core.messages import Submit, Token


class Work(msgspec.Struct, frozen=True, gc=False):
    """Compute ``length`` tokens of a request from position ``start``; all before it is in the cache."""

    submit: Submit
    tokens: Sequence[int]
    """All ids of the request, prompt and generated; not to be changed. The last to compute may be missing: one that the
    step before draws."""
    start: int
    length: int
    told: int
    """Log-probabilities of tokens at positions from here on are wanted, and of none before."""
    samples: bool
    """Whether the chunk's last token gives the next one."""
    blocks: "Sequence[array[int]]"
    """For each kind of layer the pages of the request in order: signed 32-bit numbers whose memory a kernel may read
    during the step. Pages that no token of the chunk sees mean nothing."""
    scratch: dict[str, Any]
    """Belongs to the request and dies with it: what the runtime remembers of it, always possible to rebuild."""

    @property
    def scored(self) -> range:
        """Positions of the tokens that are known already and whose log-probabilities the chunk gives."""
        return range(max(self.told, self.start + 1), min(self.start + self.length + 1, len(self.tokens)))


class Masks(msgspec.Struct, frozen=True):
    """What may come next where a grammar decides it."""

    rows: Sequence[int]
    """Places of those that have a grammar, among all that the masks are handed over with."""
    bits: Any
    """numpy uint8 [rows, at least an eighth of the vocabulary]: bit t % 8 of byte t // 8 says that token t may come."""

    def of(self, places: Sequence[int]) -> "Masks | None":
        """Those of some places, in the order of these."""
        rows = {place: row for row, place in enumerate(places)}
        own = [at for at, place in enumerate(self.rows) if place in rows]
        if not own:
            return None
        bits = self.bits if len(own) == len(self.rows) else self.bits[own]
        return Masks([rows[self.rows[at]] for at in own], bits)


class Orders(msgspec.Struct, frozen=True, array_like=True):
    """One step as ranks other than the first need it: they compute, and draw nothing. Numbers are int32 in memory."""

    token_ids: bytes
    drawn: list[tuple[int, int]]
    """Of these, places in what the first rank has drawn, as in Batch."""
    segments: list[list[tuple[int, int, bytes]]]
    """For each kind of layer, of each request (position of its first token, tokens, pages)."""
    rows: bytes
    """Places of the tokens whose logits are wanted."""
    first: int
    """Of these rows so many are made into logits at first."""
    captures: bool = False
    """No step, but the next graph is to be captured."""


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """What the device made of one chunk."""

    tokens: Sequence[Token] = ()
    """One for each position in ``Work.scored``, and behind them what was drawn, if the work samples."""
    embedding: Sequence[float] = ()
    """Of the whole prompt, once the chunk reaches its end, if the request asked for ``pooling``."""
    error: str | None = None
    """The request can't go on; others can."""
