"""Arguments of calls as models write them, read as JSON, one character after the other.

A reading is a generator that is sent characters and puts out JSON; it returns with the last character of the arguments.
So what it makes of them can't depend on how the text was cut. Knows JSON schemas; knows no style and no format.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any
from urllib.parse import unquote

Put = Callable[[str], None]
Reading = Generator[None, str, None]

DEEPEST = 64
"""Levels of objects and lists; what is deeper is no call."""

_SPACE = " \t\r\n"


class OddError(Exception):
    """The character that was sent can't stand there."""


def spelled(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(put: Put) -> Reading:
    """JSON: the model's own characters, as they come, but for line ends and the like in strings, which it may have left
    as they are."""
    depth, in_string, escaped = 0, False, False
    while True:
        character = yield
        put(_inner(character) if in_string and character < " " else character)
        if escaped:
            escaped = False
        elif in_string:
            escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return


class Literals:
    """Names and literals: Python's, JSON's, and Gemma's with its own quotation marks."""

    def __init__(self, put: Put, opens: str, colon: str, closes: str, quotes: tuple[str, str] | None) -> None:
        """``colon``: what stands behind a name; ``quotes``: around a string, beside the usual ones."""
        self._put = put
        self._opens, self._colon, self._closes, self._quotes = opens, colon, closes, quotes
        self._next = ""
        """The character that is looked at."""

    def read(self) -> Reading:
        self._put("{")
        for expected in self._opens:
            yield from self._advance()
            if self._next != expected:
                raise OddError
        yield from self._advance()
        yield from self._members(self._closes, self._colon, 0)

    def _advance(self) -> Reading:
        self._next = yield

    def _space(self) -> Reading:
        while self._next in _SPACE:
            self._next = yield

    def _members(self, closes: str, colon: str, depth: int) -> Reading:
        """``name colon value, …`` up to ``closes``, at which it stops looking, as JSON without the first brace."""
        first = True
        yield from self._space()
        while self._next != closes:
            if not first:
                if self._next != ",":
                    raise OddError
                yield from self._advance()
                yield from self._space()
                if self._next == closes:  # Python's last comma
                    break
            name = yield from self._name(colon)
            self._put(f'{"" if first else ", "}"{name}": ')
            yield from self._value(depth)
            yield from self._space()
            first = False
        self._put("}")

    def _name(self, colon: str) -> Generator[None, str, str]:
        """As it stands in a JSON string."""
        read: list[str] = []
        if self._next in "\"'":
            yield from self._quoted(self._next, read.append)
            yield from self._space()
        else:
            while self._next != colon:
                if self._next in "{}[](),":
                    raise OddError
                read.append(self._next)
                yield from self._advance()
            read = [_inner("".join(read).strip())]
            if not read[0]:
                raise OddError
        if self._next != colon:
            raise OddError
        yield from self._advance()
        yield from self._space()
        return "".join(read)

    def _value(self, depth: int) -> Reading:
        """A value; afterwards the character behind it is looked at."""
        if depth > DEEPEST:
            raise OddError
        if self._quotes is not None and self._next == self._quotes[0][0]:
            yield from self._marked(*self._quotes)
        elif self._next in "\"'":
            self._put('"')
            yield from self._quoted(self._next, self._put)
            self._put('"')
        elif self._next == "{":
            self._put("{")
            yield from self._advance()
            yield from self._members("}", ":", depth + 1)
            yield from self._advance()
        elif self._next == "[":
            yield from self._list(depth)
        else:
            yield from self._word()

    def _list(self, depth: int) -> Reading:
        self._put("[")
        yield from self._advance()
        yield from self._space()
        first = True
        while self._next != "]":
            if not first:
                if self._next != ",":
                    raise OddError
                yield from self._advance()
                yield from self._space()
                if self._next == "]":
                    break
                self._put(", ")
            yield from self._value(depth + 1)
            yield from self._space()
            first = False
        self._put("]")
        yield from self._advance()

    def _quoted(self, quote: str, put: Put) -> Reading:
        """Put out what a quotation mark ends, as it stands in a JSON string."""
        while (character := (yield)) != quote:
            if character != "\\":
                put(_inner(character))
                continue
            character = yield
            if character in "uxU":
                code = ""
                for _ in range({"x": 2, "u": 4, "U": 8}[character]):
                    code += yield
                put(_unicode(code))
            else:
                put(_inner(_ESCAPES.get(character, character)))
        yield from self._advance()

    def _marked(self, opens: str, closes: str) -> Reading:
        for expected in opens[1:]:
            if (yield) != expected:
                raise OddError
        self._put('"')
        yield from _upto((closes,), lambda text: self._put(_inner(text)))
        self._put('"')
        yield from self._advance()

    def _word(self) -> Reading:
        word = ""
        while self._next not in ",)]}" + _SPACE:
            if len(word) == _LONGEST_WORD or self._next in "([{\"'":
                raise OddError
            word += self._next
            yield from self._advance()
        if word in _PYTHON:
            word = spelled(_PYTHON[word])
        elif not _is_json(word):
            if not word:
                raise OddError
            word = spelled(word)  # a string whose quotation marks were forgotten
        self._put(word)


class Bare:
    """Names and values that end at marks, and whose types the schema knows."""

    def __init__(self, put: Put, key: tuple[str, str], ends: str, closes: str, schema: Mapping[str, Any]) -> None:
        """``key``: what stands around a name; ``ends``: behind a value."""
        self._put = put
        self._key, self._ends, self._closes = key, ends, closes
        self._schema = schema
        self._whole = referred(schema, schema)

    def read(self) -> Reading:
        before, closes, ends = self._key[0], self._closes.strip(), self._ends
        # Models leave out line ends, or write more of them.
        named, *behind = self._key[1].split("\n")
        skipped, marks = "\n" if behind == [""] else "", tuple({ends: None, ends.strip(): None})
        self._put("{")
        separator = ""
        while (yield from _one_of((before, closes))) == before:
            name: list[str] = []
            yield from _upto((named,), name.append)
            for mark in filter(None, behind):
                yield from _one_of((mark,))
            self._put(f"{separator}{spelled(''.join(name))}: ")
            separator = ", "
            if self._is_text("".join(name)):
                self._put('"')
                yield from _upto(marks, lambda piece: self._put(_inner(piece)), skipped)
                self._put('"')
            else:
                text = yield from self._json(marks, skipped)
                self._put(text.strip() if _is_json(text) else spelled(_PYTHON.get(text.strip(), text)))
        self._put("}")

    def _json(self, marks: tuple[str, ...], skipped: str) -> Generator[None, str, str]:
        """A value, which a mark in one of its strings doesn't end."""
        whole, within = "", False
        while True:
            read: list[str] = []
            mark = yield from _upto(marks, read.append, "" if whole else skipped)
            part = "".join(read)
            within ^= sum(found == '"' for found in _QUOTES.findall(part)) % 2 == 1
            whole += part
            if not (within and whole.lstrip()[:1] in ("{", "[", '"')):
                return whole
            whole += mark

    def _is_text(self, name: str) -> bool:
        properties = self._whole.get("properties") if isinstance(self._whole, dict) else None
        schema = referred(self._schema, properties.get(name) if isinstance(properties, dict) else None)
        if not isinstance(schema, dict):
            return False
        choices = schema.get("enum", [schema.get("const")])
        return schema.get("type") == "string" or (
            isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        )


def referred(root: Mapping[str, Any], schema: Any) -> Any:
    """A part of a schema, or what it refers to in the whole; None for what isn't there or only leads back to itself."""
    for _ in range(DEEPEST):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema
        start, *steps = str(schema["$ref"]).split("/")
        schema = root if start == "#" else None
        for step in steps:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return None


def _one_of(marks: tuple[str, ...]) -> Generator[None, str, str]:
    """Skip white space, and then one of these, none of which begins another."""
    read = ""
    while read not in marks:
        character = yield
        if read or character not in _SPACE:
            read += character
            if not any(mark.startswith(read) for mark in marks):
                raise OddError
    return read


_QUOTES = re.compile(r'\\.|"', re.DOTALL)


def _upto(marks: tuple[str, ...], put: Put, skipped: str = "") -> Generator[None, str, str]:
    """Put out what stands before the first of these marks, as soon as it can't be a mark; without what is to be skipped
    at the beginning. Returns the mark; of those that end together the first counts."""
    firsts = {mark[0] for mark in marks}
    longest = max(map(len, marks))
    held = yield
    held = held.removeprefix(skipped)
    while True:
        if (mark := next(filter(held.endswith, marks), None)) is not None:
            put(held[: -len(mark)])
            return mark
        # Never more is held than the beginning of a mark.
        keep = 0
        if len(held) > 1 or held in firsts:
            sizes = range(min(len(held), longest - 1), 0, -1)
            keep = next((size for size in sizes if any(mark.startswith(held[-size:]) for mark in marks)), 0)
        if keep < len(held):
            put(held[: len(held) - keep])
            held = held[len(held) - keep :]
        held += yield


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


_PYTHON = {"True": True, "False": False, "None": None}

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}

_LONGEST_WORD = 400
"""Characters of a number."""


def _inner(text: str) -> str:
    """Text as it stands in a JSON string."""
    return spelled(text)[1:-1]


def _unicode(code: str) -> str:
    """An escape's hexadecimal digits as they stand in a JSON string; halves of a pair stay what they are."""
    try:
        number = int(code, 16)
    except ValueError:
        raise OddError from None
    if 0xD800 <= number < 0xE000:
        return f"\\u{number:04x}"
    return _inner(chr(number)) if number < 0x110000 else "\\ufffd"


def _no_constant(name: str) -> None:
    raise ValueError(name)
