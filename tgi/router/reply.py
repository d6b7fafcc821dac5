"""A model's reply, read piece by piece: what in it is reasoning, what are calls of tools, and what is text.

One parser for every format. Knows text and formats; knows no token, no template and no dialect.
"""

import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

from tgi.router.arguments import Reader, Schema
from tgi.router.formats import PLACE, PLACES, Calls, Format, placed, words
from tgi.router.lark import MOST_SPACE

MOST_CALLS = 16
"""Calls in one reply: a model that never stops calling is stopped there."""

_BITE = 1024
"""Characters that are looked at together, so that whatever comes the work for each is bounded."""

_SPACE = " \t\r\n"


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
    text. White space around reasoning, before calls, and behind the last one belongs to nothing and is left out. Where
    the arguments of a call stop making sense, the call stays as far as it came, and the rest is text.
    """

    def __init__(self, format: Format, functions: Mapping[str, Schema], *, thinking: bool = False) -> None:
        """``functions``: the parameters' schemas by the names of the tools; without any, the reply has no calls.
        ``thinking``: the prompt has opened the reasoning already."""
        calls, reasoning = format.calls, format.reasoning
        ways = (calls, *calls.also)
        self._format = calls
        self._reasoning = reasoning
        self._functions = functions
        self._names = {calls.called(name): name for name in functions}
        self._firsts = [_head(way, way.opens, self._names) for way in ways]
        self._nexts = [_head(way, way.between, self._names) for way in ways]
        self._tail, self._closes = _forms(calls.tail, calls), _forms(calls.closes, calls)
        self._triggers = tuple(words(way.opens + way.head)[0] for way in ways if functions and not calls.anchored)
        self._dropped = reasoning.dropped if reasoning else ()
        self._marks = _beginning((*self._dropped, *self._triggers))
        self._closing = _beginning((reasoning.closes,) if reasoning else ())
        self._reading: Literal[
            "opening", "reasoning", "beginning", "text", "head", "arguments", "tail", "next", "behind"
        ]
        self._reading = "reasoning" if thinking else "opening"
        self._trims = thinking
        """White space that comes next belongs to nothing."""
        self._held = ""
        """Read, and not yet known to be one thing or the other."""
        self._ids: list[str] = []
        """Of the calls so far."""
        self._broken = False
        """A call's arguments made no sense."""
        self._arguments: Reader
        self._thought: list[str] = []
        self._told: list[str] = []
        self._called: list[CallDelta] = []

    @property
    def thinking(self) -> bool:
        return self._reading == "reasoning"

    @property
    def complete(self) -> bool:
        """Whether there are calls, and all of them whole."""
        return bool(self._ids) and self._reading != "arguments" and not self._broken

    def push(self, piece: str) -> Parsed:
        if self._reading == "text" and self._marks is None:  # nothing can be held back, and nothing else come
            return Parsed(text=piece)
        for at in range(0, len(piece), _BITE):
            self._held += piece[at : at + _BITE]
            while self._held and self._advance():
                pass
        parsed = Parsed("".join(self._thought), "".join(self._told), self._called)
        self._thought, self._told, self._called = [], [], []
        return parsed

    def finish(self) -> Parsed:
        """The reply is at its end. Behind a call, what was held back is space or the beginning of another."""
        rest, self._held = self._held, ""
        if self._reading == "reasoning":
            return Parsed(reasoning=rest)
        return Parsed(text="" if self._reading in ("tail", "next", "behind") else rest)

    def _advance(self) -> bool:
        """One step on; False if it takes more text to know."""
        before = self._reading, len(self._held)
        match self._reading:
            case "text":
                self._tell()
            case "reasoning":
                self._reason()
            case "arguments":
                self._argue()
            case "opening":
                self._open()
            case "beginning":
                self._begin()
            case "head":
                self._call()
            case "tail":
                self._end()
            case "next":
                self._follow()
            case "behind":
                if self._held.lstrip(_SPACE) or len(self._held) > MOST_SPACE:
                    self._reading = "text"
        return (self._reading, len(self._held)) != before

    def _open(self) -> None:
        """Reasoning comes first, or not at all."""
        opens = [(word,) for word in words(self._reasoning.opens)] if self._reasoning else []
        found, end, possible = _match(self._held, opens)
        if opens and len(found) == len(opens):
            self._take(end)
            self._reading, self._trims = "reasoning", True
        elif not (opens and possible):
            self._reading = "beginning"

    def _reason(self) -> None:
        assert self._reasoning is not None
        self._trim()
        self._thought.append(self._take(_certain(self._held, self._closing)))
        rest = self._held.lstrip(_SPACE)
        if rest.startswith(self._reasoning.closes):
            self._held = rest[len(self._reasoning.closes) :]
            self._reading, self._trims = "beginning", True

    def _begin(self) -> None:
        """The answer begins: a call has to stand here, if nothing may stand before it."""
        self._trim()
        if self._held:
            self._reading = "head" if self._functions and self._format.anchored else "text"

    def _tell(self) -> None:
        """Text, up to what begins a call, or to a mark that is to be left out."""
        if self._marks is None:
            self._told.append(self._take(len(self._held)))
            return
        self._told.append(self._take(_certain(self._held, self._marks)))
        rest = self._held.lstrip(_SPACE)
        for mark in self._dropped:
            if rest.startswith(mark):
                self._held = rest[len(mark) :]
                self._reading, self._trims = "opening", True
                return
            if mark.startswith(rest):
                return
        if rest.startswith(self._triggers):
            self._reading = "head"

    def _call(self) -> None:
        """The way to a call's arguments; what doesn't lead there is text."""
        if self._enter(self._firsts):
            return
        if not self._format.anchored:  # another may begin behind its first character
            space = len(self._held) - len(self._held.lstrip(_SPACE))
            self._told.append(self._take(space + 1))
        self._reading = "text"

    def _follow(self) -> None:
        """Behind a call: another, or the end of all of them."""
        found, end, possible = _match(self._held, self._closes)
        if self._closes and len(found) == len(self._closes):
            self._take(end)
            self._reading = "behind"
        elif not self._enter(self._nexts) and not (self._closes and possible):
            self._reading = "text"

    def _enter(self, heads: Iterable["_Head"]) -> bool:
        """Whether one of these ways leads to a call's arguments, or may: then more text is needed."""
        tried = [(head, *_match(self._held, head.forms)) for head in heads]
        # What comes first in the text wins, which is what comes first in pieces of it.
        whole = min((way for way in tried if len(way[1]) == len(way[0].forms)), key=lambda way: way[2], default=None)
        if whole is None:
            return any(possible for _, _, _, possible in tried)
        head, found, end, _ = whole
        self._take(end - len(self._format.style.begins))
        name = self._names[found[head.name_at]]
        self._ids.append(self._new_id(name, None if head.place_at is None else int(found[head.place_at].strip('"'))))
        self._called.append(CallDelta(len(self._ids) - 1, "", self._ids[-1], name))
        self._arguments = Reader(self._format.style, self._functions[name])
        self._reading = "arguments"
        self._argue()
        return True

    def _argue(self) -> None:
        read = self._arguments.push(self._held)
        self._take(read.length)
        if read.grown:
            index = len(self._ids) - 1
            if self._called and self._called[-1].index == index:
                opened = self._called.pop()
                self._called.append(CallDelta(index, opened.arguments + read.grown, opened.id, opened.name))
            else:
                self._called.append(CallDelta(index, read.grown))
        if read.odd:
            self._reading, self._broken = "text", True
        elif read.ended:
            self._reading = "tail"

    def _end(self) -> None:
        found, end, possible = _match(self._held, self._tail)
        if len(found) == len(self._tail):
            self._take(end)
            self._reading = "next"
        elif not possible:
            self._reading = "text"

    def _trim(self) -> None:
        if self._trims:
            self._held = self._held.lstrip(_SPACE)
            self._trims = not self._held

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _new_id(self, name: str, place: int | None) -> str:
        """``place``: the call's number as the model wrote it."""
        match self._format.ids:
            case "place":
                place = len(self._ids) if place is None else place
                while (id := f"functions.{name}:{place}") in self._ids:
                    place += 1
                return id
            case "nine":
                return "".join(secrets.choice(_ALPHABET) for _ in range(9))
            case "call":
                return "call_" + secrets.token_hex(12)


_ALPHABET = string.ascii_letters + string.digits

Forms = Sequence[tuple[str, ...]]
"""For each word of a spelling, what may stand for it; "" where it may be missing."""


class _Head(NamedTuple):
    """What leads to a call's arguments, word by word."""

    forms: Forms
    name_at: int
    place_at: int | None
    """Where the model numbers its calls."""


def _head(calls: Calls, before: str, names: Iterable[str]) -> _Head:
    """``before``: what stands before this call."""
    begin, middle = words(before + calls.head), words(calls.middle)
    place = next((at for at, word in enumerate([*begin, PLACE, *middle]) if PLACE in word and at != len(begin)), None)
    rest = _forms(calls.middle, calls) + ([(calls.style.begins,)] if calls.style.begins else [])
    return _Head([*_forms(before + calls.head, calls), tuple(names), *rest], len(begin), place)


def _forms(spelling: str, calls: Calls) -> list[tuple[str, ...]]:
    return [_numbers(word) if PLACE in word else calls.forms.get(word, (word,)) for word in words(spelling)]


@cache
def _numbers(word: str) -> tuple[str, ...]:
    return tuple(placed(word, place) for place in range(PLACES))


def _match(text: str, forms: Forms) -> tuple[list[str], int, bool]:
    """The words at the beginning of a text, each one of its form, with white space before them or not.

    Returns (words found, where the last ends, whether the text is or may become all of them).
    """
    found: list[str] = []
    end = 0
    for form in forms:
        rest = text[end:].lstrip(_SPACE)
        at = len(text) - len(rest)
        if at - end > MOST_SPACE:
            return found, end, False
        if any(len(word) > len(rest) and word.startswith(rest) for word in form):
            return found, end, True
        word = max((word for word in form if rest.startswith(word)), key=len, default=None)
        if word is None:
            return found, end, False
        found.append(word)
        end = at + len(word) if word else end
    return found, end, True


@cache
def _beginning(marks: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds the first of these in a text, or at its end as much of one as is there."""

    def spelled(mark: str) -> str:
        return re.escape(mark[0]) + (f"(?:\\Z|{spelled(mark[1:])})" if len(mark) > 1 else "")

    return re.compile("|".join(map(spelled, marks))) if marks else None


def _certain(text: str, marks: re.Pattern[str] | None) -> int:
    """How much of a text stands before the first mark, or what may become one, and the space before it."""
    found = marks.search(text) if marks else None
    before = text[: found.start()] if found else text
    return max(len(before.rstrip(_SPACE)), len(before) - MOST_SPACE)
