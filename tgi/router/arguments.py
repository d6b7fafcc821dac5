"""The styles in which models write the arguments of a call: how they are spelled, read piece by piece as JSON, and held
to a JSON schema by a grammar. Knows JSON schemas; knows no format of calls and no request.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tgi.core.errors import RequestError
from tgi.router.lark import Lark
from tgi.router.readers import DEEPEST, Bare, Literals, OddError, Put, Reading, plain, referred, spelled
from tgi.router.schema import BINDING, are_apart, enforced

Schema = Mapping[str, Any]
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python's ``json.dumps`` writes it, which models have seen most of."""


class UnenforceableError(Exception):
    """Something in a schema can't be held to; the text says what and where."""


class Style(Protocol):
    @property
    def marks(self) -> str:
        """What it spells that a tokenizer may have special tokens for."""

    @property
    def begins(self) -> str:
        """How all arguments begin, as far as that is the same; it is sent to the reader, too."""

    def spell(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model would have written them."""

    def read(self, put: Put, schema: Schema) -> Reading:
        """Read arguments from their first character to their last. Raises OddError."""

    def rule(self, lark: Lark, schema: dict[str, Any], lenient: bool) -> str:
        """Arguments that obey the schema of an object. ``lenient``: what can't be enforced is left out; otherwise it
        raises UnenforceableError."""


class Read(NamedTuple):
    grown: str
    """JSON that the arguments grow by."""
    length: int
    """How much of the text they are."""
    ended: bool
    """The last character was read."""
    odd: bool
    """What comes next makes no sense."""


class Reader:
    """Reads one call's arguments."""

    def __init__(self, style: Style, schema: Schema) -> None:
        self._out: list[str] = []
        self._run = style.read(self._out.append, schema)
        next(self._run)

    def push(self, text: str) -> Read:
        length, ended, odd = len(text), False, False
        for at, character in enumerate(text):
            try:
                self._run.send(character)
            except StopIteration:
                length, ended = at + 1, True
                break
            except OddError:
                length, odd = at, True
                break
        grown = "".join(self._out)
        self._out.clear()
        return Read(grown, length, ended, odd)


# --- JSON ------------------------------------------------------------------------------------------------------------


class Json:
    """As it is."""

    marks = ""
    begins = "{"

    def spell(self, arguments: Mapping[str, Any]) -> str:
        return spelled(arguments)

    def read(self, put: Put, schema: Schema) -> Reading:
        return plain(put)

    def rule(self, lark: Lark, schema: dict[str, Any], lenient: bool) -> str:
        return lark.json(_json_schema(schema, lenient))


def _json_schema(schema: Schema, lenient: bool, path: str = "$") -> str:
    """As llguidance is to read it; ``path``: where in the whole it stands."""
    try:
        return enforced({"x-guidance": LAYOUT | {"lenient": lenient}, **schema})
    except RequestError as error:
        raise UnenforceableError(error.detail.replace("at `$", f"at `{path}")) from None


def _unspelled(path: str) -> UnenforceableError:
    return UnenforceableError(f"`{path}` can't be enforced as this model writes calls")


# --- One by one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keyed:
    """Each argument under its name, in the order of the schema's properties."""

    opens: str
    key: tuple[str, str]
    """What stands before and behind a name."""
    separator: str
    closes: str
    quotes: tuple[str, str] | None = None
    """What stands around a string; None: JSON's quotation marks."""
    raw: bool = False
    """Strings reach from ``quotes[0]`` to ``quotes[1]`` without any sign that they are strings, and so do other values,
    as JSON: the schema tells."""
    inner: bool = False
    """Objects and lists in arguments are written like the arguments, with braces and brackets; otherwise as JSON."""
    words: tuple[str, str, str] = ("true", "false", "null")

    @property
    def marks(self) -> str:
        return "".join((*self.key, self.closes, *(self.quotes or ())))

    @property
    def begins(self) -> str:
        return self.opens or self.key[0][:1]  # with which ``closes`` begins, too

    def spells(self, name: str) -> bool:
        """Whether it can tell an argument of this name."""
        if self.raw:
            return self.key[1].strip().split("\n")[0] not in name and name != ""
        return name.strip() == name != "" and not any(mark in name for mark in (*"{}[](),\"'", self.key[1]))

    def spell(self, arguments: Mapping[str, Any]) -> str:
        members = (f"{self.key[0]}{name}{self.key[1]}{self._spell(value)}" for name, value in arguments.items())
        return self.opens + self.separator.join(members) + self.closes

    def read(self, put: Put, schema: Schema) -> Reading:
        if self.raw and self.quotes is not None:
            return Bare(put, self.key, self.quotes[1], self.closes, schema).read()
        return Literals(put, self.opens, self.key[1], self.closes, self.quotes).read()

    def rule(self, lark: Lark, schema: dict[str, Any], lenient: bool) -> str:
        whole = referred(schema, schema)
        if not isinstance(whole, dict) or ("$ref" in schema and schema.keys() & BINDING - {"$ref", "type"}):
            raise _unspelled("$.$ref")
        members = _Schema(self, lark, schema, lenient).members(whole, "$")
        return f"{lark.spelled(self.opens)} {members} {lark.spelled(self.closes)}"

    def _spell(self, value: Any) -> str:
        if self.raw:
            assert self.quotes is not None
            return self.quotes[0] + (value if isinstance(value, str) else spelled(value)) + self.quotes[1]
        if isinstance(value, str):
            return spelled(value) if self.quotes is None else self.quotes[0] + value + self.quotes[1]
        if value is True or value is False or value is None:
            return self.words[(True, False, None).index(value)]
        if isinstance(value, Mapping):
            names = (name if self.inner else spelled(name) for name in value)
            colon = self.key[1] if self.inner else ": "
            inner = (f"{name}{colon}{self._spell(item)}" for name, item in zip(names, value.values(), strict=True))
            return "{" + self.separator.join(inner) + "}"
        if isinstance(value, list):
            return "[" + self.separator.join(map(self._spell, value)) + "]"
        return spelled(value)


JSON = Json()
PYTHON = Keyed("", ("", "="), ", ", ")", words=("True", "False", "None"))
GEMMA = Keyed("{", ("", ":"), ",", "}", quotes=("<escape>", "<escape>"), inner=True)
GEMMA4 = Keyed("{", ("", ":"), ",", "}", quotes=('<|"|>', '<|"|>'), inner=True)
QWEN = Keyed("", ("<parameter=", ">\n"), "\n", "\n</function>", quotes=("", "\n</parameter>"), raw=True)
GLM = Keyed("", ("<arg_key>", "</arg_key>\n<arg_value>"), "\n", "\n</tool_call>", quotes=("", "</arg_value>"), raw=True)


class _Schema:
    """A schema on its way to the grammar of one style."""

    def __init__(self, style: Keyed, lark: Lark, root: Schema, lenient: bool) -> None:
        self._style = style
        self._lark = lark
        self._root = root
        self._lenient = lenient
        self._named: dict[str, str] = {}
        """Reference → the rule for what it leads to."""

    def members(self, schema: Schema, path: str, depth: int = 0) -> str:
        """The properties of an object, those that aren't required with or without, in the schema's order."""
        self._only(schema, path, {"type", "properties", "required", "additionalProperties"})
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _unspelled(path)
        if any(not isinstance(name, str) or name not in properties for name in required):
            self._refuse(f"{path}.required")
        if not properties and (others := schema.get("additionalProperties", True)) is not False:
            return self._others(others, path, depth)
        # Others than those named are never written, whether they may be or not.
        # From the last to the first: what may follow when nothing stands there yet, and behind a member.
        first = more = '""'
        for name, value in reversed(properties.items()):
            if not self._style.spells(name):
                raise _unspelled(f"{path}.properties.{name}")
            key = name.join(self._style.key)
            value = self._lark.either([self._value(value, f"{path}.properties.{name}", depth)])
            # A separator by itself could be taken for the beginning of what closes the arguments.
            separated = f"{self._lark.spelled(self._style.separator + key)} {value} {more}"
            begun = f"{self._lark.spelled(key)} {value} {more}"
            if name not in required:
                separated, begun = f"{separated} | {more}", f"{begun} | {first}"
            first, more = self._lark.rule(begun), self._lark.rule(separated)
        return first

    def _others(self, schema: Any, path: str, depth: int) -> str:
        """Members of any name."""
        (before, behind), lark = self._style.key, self._lark
        value = self._value(schema, f"{path}.additionalProperties", depth + 1)
        named = lark.rule(f"{_NAME} {lark.spelled(behind)} {value}")
        begun, separated = lark.spelled(before), lark.spelled(self._style.separator + before)
        return lark.rule(f"({begun} {named} ({separated} {named})*)?")

    def _value(self, schema: Any, path: str, depth: int) -> str:
        """A value, and what closes it."""
        style, lark = self._style, self._lark
        if depth > DEEPEST:
            raise _unspelled(path)
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise _unspelled(path)
        if "$ref" in schema:
            return self._referred(schema, path)
        opens, closes = style.quotes or ("", "")
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and choices:
            self._only(schema, path, {"type", "enum", "const"})
            return lark.either(lark.spelled(style._spell(choice)) for choice in choices)
        kind = schema.get("type", next((kind for key, kind in _KINDS.items() if key in schema), None))
        for several in ("anyOf", "oneOf"):
            if several in schema and not (style.raw or kind):
                self._only(schema, path, {several})
                if not isinstance(schema[several], list) or not schema[several]:
                    raise _unspelled(f"{path}.{several}")
                if several == "oneOf" and not self._are_apart(schema[several]):
                    self._refuse(f"{path}.{several}")
                return lark.either(
                    self._value(one, f"{path}.{several}[{at}]", depth + 1) for at, one in enumerate(schema[several])
                )
        if isinstance(kind, list) and not style.raw:
            return lark.either(self._value({**schema, "type": one}, path, depth + 1) for one in kind)
        if kind == "string" and style.quotes is not None:
            text = self._regexes(schema, path)
            closed = lark.bounded(text, closes) if text else lark.closed([closes.strip()])
            return f"{lark.spelled(opens) if opens else ''} {closed}"
        if kind == "boolean" and not style.raw:
            return lark.either(map(lark.spelled, style.words[:2]))
        if kind == "null" and not style.raw:
            return lark.spelled(style.words[2])
        if kind == "object" and style.inner:
            return f'"{{" {self.members(schema, path, depth + 1)} "}}"'
        if kind == "array" and style.inner:
            self._only(schema, path, {"type", "items"})
            item = lark.rule(self._value(schema.get("items", {}), f"{path}.items", depth + 1))
            return f'"[" ({item} ({lark.spelled(style.separator)} {item})*)? "]"'
        if style.inner and kind not in ("integer", "number"):
            self._only(schema, path, set())
            return self._anything(path)
        refers = '"$ref"' in json.dumps(schema)
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if refers and key in self._root}
        value = lark.json(_json_schema({**definitions, **schema}, self._lenient, path))
        return f"{value} {lark.spelled(closes)}" if style.raw else value

    def _referred(self, schema: Schema, path: str) -> str:
        """What a reference to a part of the whole leads to, itself perhaps."""
        reference = schema["$ref"]
        found = referred(self._root, schema)
        if schema.keys() & BINDING - {"$ref"} or found is None:
            raise _unspelled(f"{path}.$ref")
        if reference not in self._named:
            self._named[reference] = self._lark.name()
            place = reference.replace("#", "$").replace("/", ".")
            self._lark.rule(self._value(found, place, 0), self._named[reference])
        return self._named[reference]

    def _are_apart(self, options: Any) -> bool:
        """Whether no value is of two of these schemas: told by types, or by a property of one value."""
        return are_apart([referred(self._root, option) for option in options])

    def _anything(self, path: str) -> str:
        """Any value."""
        if "" not in self._named:
            self._named[""] = self._lark.name()
            kinds = ("string", "number", "boolean", "null", "array", "object")
            self._lark.rule(" | ".join(self._value({"type": kind}, path, 0) for kind in kinds), self._named[""])
        return self._named[""]

    def _regexes(self, schema: Schema, path: str) -> list[str]:
        """What a string has to match as a whole; none for any string."""
        self._only(schema, path, {"type", "minLength", "maxLength", "pattern", "format"})
        enforced = json.loads(_json_schema(schema, self._lenient, path))
        found: list[str] = []
        for part in (enforced, *enforced.get("allOf", [])):
            least, most = part.get("minLength", 0), part.get("maxLength", "")
            if least or most != "":
                found.append(f"(.|\\n){{{least},{most}}}")
            whole = _whole(str(part["pattern"])) if "pattern" in part else ""
            if whole is None:
                self._refuse(f"{path}.pattern")
            elif whole:
                found.append(whole)
            if (format := str(part.get("format", ""))) in _FORMATS:
                found.append(_FORMATS[format])
            elif "format" in part:
                self._refuse(f"{path}.format")
        return found

    def _only(self, schema: Schema, path: str, known: set[str]) -> None:
        for key in sorted(schema.keys() & BINDING - known):
            self._refuse(f"{path}.{key}")

    def _refuse(self, path: str) -> None:
        if not self._lenient:
            raise _unspelled(path)


_KINDS = {"properties": "object", "additionalProperties": "object", "required": "object", "items": "array"}
"""Keyword → what a schema is of that has it and no type."""


_HEX = "[0-9a-fA-F]"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HOURS = "T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S)"
_DAYS = "([0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D)"
_URI = r"([a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_SCHEME, _HOST = "[a-zA-Z][a-zA-Z0-9+.-]*", r"([a-zA-Z0-9._~-]+)"
_FORMATS: Mapping[str, str] = {
    "duration": f"P([0-9]+W|{_DAYS}({_HOURS})?|{_HOURS})",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "|".join(
        [f"({_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}", "::"]
        + [f"({_HEX}{{1,4}}:){{{n}}}(:{_HEX}{{1,4}}){{1,{7 - n}}}" for n in range(1, 7)]
    ),
    "uri": rf"{_SCHEME}:(//{_HOST}(:[0-9]{{1,5}})?(/{_URI}*)*|{_URI}+(/{_URI}*)*)(\?({_URI}|[/?])*)?(#({_URI}|[/?])*)?",
    "uuid": f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
}
"""Format → what a whole string of it is, where llguidance's own is to be had for JSON only. A URI's host is a name."""

_NAME = r"/[\p{L}\p{N}_.$@-]+/"
"""Of a member that no schema names."""


def _whole(pattern: str) -> str | None:
    """A regex for the whole of a text, out of one for any part of it. None if that takes more than a look."""
    begun, ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begun : len(pattern) - ended]
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", inner)
    if re.search(r"[\^$]|\(\?[^:]", plain):
        return None
    while (shorter := re.sub(r"\([^()]*\)", "x", plain)) != plain:
        plain = shorter
    if "|" in plain and (begun or ended):
        return None
    return f"{'' if begun else _ANYTHING}({inner}){'' if ended else _ANYTHING}"


_ANYTHING = r"(.|\n)*"
