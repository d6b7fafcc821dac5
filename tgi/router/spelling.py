"""Grammars as llguidance reads them: schemas and what clients write in Lark or GBNF as it would enforce them, what it
would pass over refused. Knows llguidance; knows no request.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from tgi.router.grammar import Wish
from tgi.router.schema import enforced

_LARK = re.compile(r"^\s*(?:%llguidance\b|start\s*(?:\[[^\]\n]*\]\s*)?:(?!:=))", re.MULTILINE)

_GBNF_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)

_LARK_PART = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*|(?P<json>%json)\s*|(?P<options>%llguidance)\s*'
    r"|\b(?P<attribute>stop|temperature)\s*="
)
_OPTIONS = {"allow_initial_skip", "no_forcing"}
_JSON = json.JSONDecoder()


class Part(msgspec.Struct, omit_defaults=True):
    """One of the grammars that make up one; the first is where a text begins."""

    name: str | None = None
    lark_grammar: str | None = None
    json_schema: Any = None
    """As an object, or as text (Raw)."""


class Parts(msgspec.Struct):
    grammars: list[Part]


def composed(wish: Wish, *, forcing: bool = True) -> str:
    """The grammar as llguidance reads it. Raises ValueError for what is no grammar, RequestError for a schema that
    can't be enforced, RecursionError for one that is nested too deeply.

    ``forcing``: where all that can follow is one text, its tokens are the tokenizer's. Not for vocabularies that don't
    spell every text: there the tokens of a longer text may do what those of the one can't.
    """
    text = wish.text
    if wish.format == "llguidance" and not wish.frame and forcing:
        return text
    match wish.format:
        case "json_schema":
            parts = [Part(json_schema=msgspec.Raw(enforced(msgspec.json.decode(text)).encode()))]
        case "regex":
            parts = msgspec.json.decode(LLMatcher.grammar_from_regex(text), type=Parts).grammars
        case "choice":
            # As one terminal: of alternatives in a rule there can be 2000.
            options = " | ".join(map(json.dumps, msgspec.json.decode(text, type=list[str])))
            parts = [Part(lark_grammar=f"start: CHOICE\nCHOICE: {options}")]
        case "grammar":
            parts = [Part(lark_grammar=_lark(text))]
        case "llguidance" if text.startswith("{"):
            parts = msgspec.json.decode(text, type=Parts).grammars
        case "llguidance":
            parts = [Part(lark_grammar=text)]
    if wish.frame:
        parts[0].name = "answer"
        parts.insert(0, Part("frame", wish.frame))
    if not forcing:
        first = parts[0]
        lark = first.lark_grammar or f"start: %json {msgspec.json.encode(first.json_schema).decode()}"
        parts[0] = Part(first.name, f'%llguidance {{"no_forcing": true}}\n{lark}')
    return msgspec.json.encode(Parts(parts)).decode()


def _lark(text: str) -> str:
    """Lark of Lark or GBNF."""
    if _LARK.search(text) is None and "::=" in text:
        try:
            return gbnf_to_lark(_GBNF_PART.sub(lambda part: _ESCAPE.sub(_unescaped(part[0][0]), part[0]), text))
        except Exception as error:  # the converter raises nothing more specific
            raise ValueError(str(error)) from None
    parts, at = list[str](), 0
    while (found := _LARK_PART.search(text, at)) is not None:
        if found["attribute"]:
            raise ValueError(f"`{found['attribute']}` is not supported in grammars")
        parts.append(text[at : found.end()])
        at = found.end()
        if found["json"] or found["options"]:
            value, end = _JSON.raw_decode(text, at)
            if found["options"] and isinstance(value, dict) and (unknown := sorted(value.keys() - _OPTIONS)):
                raise ValueError(f"`{unknown[0]}` is not supported in %llguidance")
            schema = {} if value is True else value
            parts.append(enforced(schema) if found["json"] and isinstance(schema, dict) else text[at:end])
            at = end
    return "".join(parts) + text[at:]


def _unescaped(mark: str) -> Callable[[re.Match[str]], str]:
    """Characters for their numbers, which the converter loses, in the part of GBNF that begins with ``mark``."""

    def plain(escape: re.Match[str]) -> str:
        number = escape[1] or escape[2] or escape[3]
        if number is None or mark == "#":
            return escape[0]
        char = chr(int(number, 16))
        if mark == "[" and char.isascii():
            return f"\\x{ord(char):02x}"
        return f"\\{char}" if char in '"\\' else char

    return plain
