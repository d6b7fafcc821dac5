"""A model's reply, read piece by piece: what in it is reasoning, what are calls of tools, and what is text.

One parser for every format. Knows text and formats; knows no token, no template and no dialect.
"""

import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tgi.router.arguments import OddError, Reader, Schema
from tgi.router.formats import PLACE, Calls, Format, placed, words

MOST_CALLS = 16
"""Calls in one reply: a model that never stops calling is stopped there."""

_SPACE = " \t\r\n"

_KEYS = ('"arguments"', '"parameters"')
"""Models take one for the other."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a tool call grows by. The first delta of a call has its id and name."""

    index: int
    """Of the call among the calls of its answer."""
    arguments: str
    """JSON, or a part of it."""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Parsed:
    """What a reply grows by."""

    reasoning: str = ""
    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ReplyParser:
    """A reply, pushed piece by piece.

    However the reply is cut into pieces, the results add up to the same: what is done depends on the characters so far
    alone, and what could still become something else is held back. Takes any text: what is no call of a known tool is
    text. White space around reasoning and before calls belongs to neither, and is left out.
    """

    def __init__(self, format: Format, functions: Mapping[str, Schema], *, thinking: bool = False) -> None:
        """``functions``: the parameters' schemas by the names of the tools; without any, the reply has no calls.
        ``thinking``: the prompt has opened the reasoning already."""
        calls = format.calls
        self._format = calls
        self._reasoning = format.reasoning
        self._functions = functions
        self._names = {calls.called(name): name for name in functions}
        self._first = _head(calls, calls.opens, self._names)
        self._next = _head(calls, calls.between, self._names)
        self._tail, self._closes = _forms(calls.tail), _forms(calls.closes)
        self._trigger = words(calls.opens + calls.head)[0] if functions and not calls.anchored else ""
        self._dropped = format.reasoning.dropped if format.reasoning else ()
        self._reading: Literal["opening", "reasoning", "beginning", "text", "head", "arguments", "tail", "next"]
        self._reading = "reasoning" if thinking else "opening"
        self._trims = thinking
        """White space that comes next belongs to nothing."""
        self._held = ""
        """Read, and not yet known to be one thing or the other."""
        self._count = 0
        self._opened: tuple[str, str] | tuple[None, None] = None, None
        """Id and name for the next delta."""
        self._arguments: Reader
        self._out = Parsed()

    @property
    def thinking(self) -> bool:
        return self._reading == "reasoning"

    @property
    def complete(self) -> bool:
        """Whether there are calls, and all of them whole."""
        return self._count > 0 and self._reading != "arguments"

    def push(self, piece: str) -> Parsed:
        self._held += piece
        self._out = Parsed()
        while self._held and self._advance():
            pass
        return self._out

    def finish(self) -> Parsed:
        """The reply is at its end. Behind a call, what was held back is space or the beginning of another."""
        rest, self._held = self._held, ""
        if self._reading == "reasoning":
            return Parsed(reasoning=rest)
        return Parsed(text="" if self._reading in ("tail", "next") else rest)

    def _advance(self) -> bool:
        """One step on; False if it takes more text to know."""
        before = self._reading, len(self._held)
        match self._reading:
            case "opening":
                self._open()
            case "reasoning":
                self._reason()
            case "beginning":
                self._begin()
            case "text":
                self._tell()
            case "head":
                self._call()
            case "arguments":
                self._argue()
            case "tail":
                self._end()
            case "next":
                self._follow()
        return (self._reading, len(self._held)) != before

    def _open(self) -> None:
        """Reasoning comes first, or not at all."""
        found, end, possible = _match(self._held, [(self._reasoning.opens,)]) if self._reasoning else ([], 0, False)
        if found:
            self._take(end)
            self._reading, self._trims = "reasoning", True
        elif not possible:
            self._reading = "beginning"

    def _reason(self) -> None:
        assert self._reasoning is not None
        if self._trims:
            self._held = self._held.lstrip(_SPACE)
            self._trims = not self._held
        before, found, _ = self._held.partition(self._reasoning.closes)
        if found:
            self._take(len(before) + len(found))
            self._out.reasoning += before.rstrip(_SPACE)
            self._reading, self._trims = "beginning", True
        else:
            self._out.reasoning += self._take(_certain(self._held, (self._reasoning.closes,)))

    def _begin(self) -> None:
        """The answer begins: a call has to stand here, if nothing may stand before it."""
        if self._trims:
            self._held = self._held.lstrip(_SPACE)
            self._trims = not self._held
        if self._held:
            self._reading = "head" if self._functions and self._format.anchored else "text"

    def _tell(self) -> None:
        """Text, up to what begins a call, or to a mark that is to be left out."""
        marks = (*self._dropped, self._trigger) if self._trigger else self._dropped
        self._out.text += self._take(_certain(self._held, marks))
        rest = self._held.lstrip(_SPACE)
        for mark in self._dropped:
            if rest.startswith(mark):
                self._held = rest[len(mark) :]
                self._reading, self._trims = "beginning", True
                return
            if mark.startswith(rest):
                return
        if self._trigger and rest.startswith(self._trigger):
            self._reading = "head"

    def _call(self) -> None:
        """The way to a call's arguments; what doesn't lead there is text."""
        if self._enter(self._first):
            return
        if not self._format.anchored:  # another may begin behind its first character
            space = len(self._held) - len(self._held.lstrip(_SPACE))
            self._out.text += self._take(space + 1)
        self._reading = "text"

    def _follow(self) -> None:
        """Behind a call: another, or the end of all of them."""
        found, end, possible = _match(self._held, self._closes)
        if self._closes and len(found) == len(self._closes):
            self._take(end)
            self._reading = "text"
        elif not self._enter(self._next) and not (self._closes and possible):
            self._reading = "text"

    def _enter(self, head: "_Head") -> bool:
        """Whether this is the way to a call's arguments, or may be it: then more text is needed."""
        found, end, possible = _match(self._held, head.forms)
        if len(found) == len(head.forms):
            self._take(end - len(self._format.style.begins))
            name = self._names[found[head.name_at]]
            self._opened = self._new_id(name), name
            self._arguments = Reader(self._format.style, self._functions[name])
            self._count += 1
            self._reading = "arguments"
        return possible

    def _argue(self) -> None:
        try:
            grown, end = self._arguments.push(self._held)
        except OddError:
            self._reading = "text"
            return
        self._take(end or len(self._held))
        if grown or end:
            self._out.calls.append(CallDelta(self._count - 1, grown, *self._opened))
            self._opened = None, None
        if end:
            self._reading = "tail"

    def _end(self) -> None:
        found, end, possible = _match(self._held, self._tail)
        if len(found) == len(self._tail):
            self._take(end)
            self._reading = "next"
        elif not possible:
            self._reading = "text"

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _new_id(self, name: str) -> str:
        match self._format.ids:
            case "place":
                return f"functions.{name}:{self._count}"
            case "nine":
                return "".join(secrets.choice(_ALPHABET) for _ in range(9))
            case "call":
                return "call_" + secrets.token_hex(12)


_ALPHABET = string.ascii_letters + string.digits


class _Head(NamedTuple):
    """What leads to a call's arguments, word by word."""

    forms: list[tuple[str, ...]]
    name_at: int


def _head(calls: Calls, before: str, names: Iterable[str]) -> _Head:
    """``before``: what stands before this call."""
    begin = _forms(before + calls.head)
    rest = _forms(calls.middle) + ([(calls.style.begins,)] if calls.style.begins else [])
    return _Head([*begin, tuple(names), *rest], len(begin))


def _forms(spelling: str) -> list[tuple[str, ...]]:
    """For each word, what may stand for it."""
    return [
        _KEYS
        if word in _KEYS
        else tuple(placed(word, place) for place in range(MOST_CALLS))
        if PLACE in word
        else (word,)
        for word in words(spelling)
    ]


def _match(text: str, forms: Sequence[tuple[str, ...]]) -> tuple[list[str], int, bool]:
    """The words at the beginning of a text, each one of its form, with white space before them or not.

    Returns (words found, where the last ends, whether the text is or may become all of them).
    """
    found: list[str] = []
    end = 0
    for form in forms:
        at = len(text) - len(text[end:].lstrip(_SPACE))
        rest = text[at:]
        if any(len(word) > len(rest) and word.startswith(rest) for word in form):
            return found, end, True
        word = max((word for word in form if rest.startswith(word)), key=len, default=None)
        if word is None:
            return found, end, False
        found.append(word)
        end = at + len(word)
    return found, end, True


def _certain(text: str, marks: Sequence[str]) -> int:
    """How much of a text stands before the first of these marks, or what may become one, and the space before it."""
    firsts = {mark[0] for mark in marks}
    for at, character in enumerate(text):
        if character in firsts and any(text.startswith(mark, at) or mark.startswith(text[at:]) for mark in marks):
            return len(text[:at].rstrip(_SPACE))
    return len(text.rstrip(_SPACE)) if marks else len(text)
