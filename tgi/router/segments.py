"""What an assistant says, cut into segments: reasoning, stretches of text, and tool calls, in the order in which they
come.

For dialects whose answers are lists of items: steps become their events, segments the items of their answers, so that
streams and whole answers agree. Knows no dialect.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from tgi.router.conversation import Said
from tgi.router.pipeline import Piece
from tgi.router.wire.openai import FinishReason

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Segment:
    index: int
    """Among the segments of its answer."""
    kind: Kind
    call_id: str = ""
    name: str = ""
    """Of the tool."""
    parts: list[str] = field(default_factory=list)
    """What it has grown by: reasoning, text, or a call's arguments."""
    pieces: list[Piece] = field(default_factory=list)
    """The tokens of a text."""
    cut: bool = False
    """The answer ran out of tokens in it."""

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Begin(NamedTuple):
    segment: Segment


class Grow(NamedTuple):
    segment: Segment
    text: str
    """Never empty."""
    pieces: list[Piece]
    """The tokens of it, if it is text."""


class End(NamedTuple):
    segment: Segment


class Finish(NamedTuple):
    reason: FinishReason


Step = Begin | Grow | End | Finish


class Answer(Protocol):
    """One answer on its way, such as a conversation of one choice."""

    async def follow(self, hear: Callable[[Said], None], /) -> None: ...


async def follow(answer: Answer, hear: Callable[[Step], None]) -> None:
    """Call ``hear`` with each step: the segments, one after the other, and why the answer ends."""
    cutter = _Cutter()

    def cut(said: Said) -> None:
        for step in cutter.push(said):
            hear(step)

    await answer.follow(cut)


async def whole(answer: Answer) -> tuple[list[Segment], FinishReason]:
    """One answer, to its end."""
    steps: list[Step] = []
    await follow(answer, steps.append)
    *_, reason = (step.reason for step in steps if isinstance(step, Finish))
    return [step.segment for step in steps if isinstance(step, End)], reason


class _Cutter:
    def __init__(self) -> None:
        self._count = 0
        self._open: Segment | None = None
        self._unseen: list[Piece] = []
        """Tokens that have shown nothing yet. At the end these are stop strings and end tokens, and part of no text."""

    def push(self, said: Said) -> Iterator[Step]:
        self._unseen.append(said.piece)
        if said.reasoning:
            if self._open is None or self._open.kind != "reasoning":
                yield from self._begin("reasoning")
            yield from self._grow(said.reasoning, [])
            self._unseen = self._unseen[-1:]
        if said.text:
            if self._open is None or self._open.kind != "text":
                yield from self._begin("text")
                self._unseen = _leading_to(said.text, self._unseen)
            yield from self._grow(said.text, self._unseen)
            self._unseen = []
        for delta in said.calls:
            self._unseen = []
            if delta.id is not None:
                yield from self._begin("call", delta.id, delta.name or "")
            if delta.arguments:
                yield from self._grow(delta.arguments, [])
        if said.finish is not None:
            if self._open is None:  # nothing was said: clients look for a text all the same
                yield from self._begin("text")
            yield from self._end(cut=said.finish == "length")
            yield Finish(said.finish)

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Step]:
        yield from self._end()
        self._open = Segment(self._count, kind, call_id, name)
        self._count += 1
        yield Begin(self._open)

    def _grow(self, text: str, pieces: list[Piece]) -> Iterator[Step]:
        assert self._open is not None
        self._open.parts.append(text)
        self._open.pieces += pieces
        yield Grow(self._open, text, pieces)

    def _end(self, *, cut: bool = False) -> Iterator[Step]:
        if self._open is not None:
            self._open.cut = cut
            yield End(self._open)
            self._open = None


def _leading_to(text: str, pieces: list[Piece]) -> list[Piece]:
    """Without the marks and the space before the text that begins: they are part of nothing."""
    first = 0
    while first < len(pieces) - 1 and not text.startswith(pieces[first].text):
        first += 1
    return pieces[first:]
