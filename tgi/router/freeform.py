"""Grammars that clients write themselves, in Lark or in GBNF, as llguidance is to read them: what it would pass over is
refused. Knows llguidance, which turns GBNF into Lark; knows no request.
"""

import json
import re
from collections.abc import Callable

from llguidance.gbnf_to_lark import gbnf_to_lark

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


def lark_of(text: str) -> str:
    """Raises ValueError for what is neither, and RequestError for a schema in it that can't be enforced."""
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
            if found["options"] and (unknown := sorted(set(value) - _OPTIONS)):
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
