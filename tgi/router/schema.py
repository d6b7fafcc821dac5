"""JSON schemas as llguidance is to read them. What it would read otherwise than the standard does is written in another
way that says the same; what nobody enforces is refused, with its place. Knows where llguidance falls short, but doesn't
load it: what it refuses by itself is found in a trial.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from tgi.core.errors import VALIDATION, RequestError
from tgi.router.readers import referred

INVALID = "grammar is not valid: "
UNENFORCEABLE = "cannot compile regex from schema: "
"""TGI's words: what it makes of schemas is a regex."""

Place = tuple[str | int, ...]
"""Keys and indices that lead to a part of a schema."""

EXACT = 1 << 53
"""Integers beyond it are rounded where numbers are floats of 64 bits, as in llguidance."""

_SPACE = r" |\n[ \t]{0,40}"
"""White space in JSON as models write it, for schemas that leave it to us; unbounded, weak ones write nothing else."""

_ESCAPES = '"\\bfnrt'
"""JSON's escapes, of which no character has two. Spelled ``\\u0061`` the name ``a`` would pass for another property."""

_UNSPELLED = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that need another escape."""

_DATE = (
    r"(?:(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-(?:"
    r"(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){2}(?:\.[0-9]{1,9})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_NAME = r"[0-9a-zA-Z](?:-?[0-9a-zA-Z])*"
_HOST = rf"{_NAME}(?:\.{_NAME})*$"
_LABELS = r"[^.@]{1,63}(?:\.[^.@]{1,63})*$"
_LOCAL = r"[0-9a-zA-Z!#$%&'*+/=?^_`{|}~-]+"

FORMATS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "date": ({"pattern": f"^{_DATE}$"},),
    "time": ({"pattern": f"^{_TIME}$"},),
    "date-time": ({"pattern": f"^{_DATE}[tT]{_TIME}$"},),
    "hostname": ({"pattern": f"^{_HOST}"}, {"pattern": f"^{_LABELS}", "maxLength": 253}),
    "email": (
        {"pattern": rf"^{_LOCAL}(?:\.{_LOCAL})*@{_HOST}"},
        {"pattern": f"^[^@]{{1,64}}@{_LABELS}", "maxLength": 254},
    ),
    **dict.fromkeys(("binary", "password", "path"), ({},)),  # of pydantic and OpenAPI, say nothing of the text
    **dict.fromkeys(("duration", "ipv4", "ipv6", "uri", "uuid"), ()),
}
"""Format → schemas in its place, where llguidance's own is too wide: 29 February in any year, leap seconds in any
minute, labels of any length. Here no second is a leap second, and no address is a literal."""

_ONE = {
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
}
_LIST = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
_MAP = {"dependencies", "dependentSchemas", "patternProperties", "properties"}
_DEFINITIONS = {"$defs", "definitions"}

_UNREAD = {"disallow", "divisibleBy", "extends"}
"""Keywords of the first drafts, which llguidance passes over."""

_ANNOTATIONS = {"deprecated", "discriminator", "example", "externalDocs", "nullable", "xml"}
"""Keywords that say nothing, but keep llguidance from following a circular reference that they stand beside."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}
"""Keyword that llguidance refuses → values that say nothing."""

_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum")

_PATTERNS = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    )
}
"""Look-around that many clients send → the same without: zod's addresses of mail, which tools in TypeScript have."""

BINDING = (
    {"$dynamicRef", "$recursiveRef", "$ref", "format", "maxContains", "minContains", "pattern", "required", "type"}
    | {f"{bound}{what}" for bound in ("max", "min") for what in ("Items", "Length", "Properties")}
    | _ONE | _LIST | _MAP | _UNREAD | _NEUTRAL.keys() | set(_NUMBERS)
)  # fmt: skip
"""All keywords that can forbid a value. Others are notes, as the standard has it."""

_REGEX = re.compile(r"\\.|\.|\[(\^?)((?:\\.|[^\]\\])*)\]", re.DOTALL)
"""What is read otherwise in other languages: an escape, any character, a class."""
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+[:)]")
_SPACES = r"\t-\r \u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
_MORE_SPACES = _SPACES + r"\x1c-\x1f\u{85}\u{feff}"
_SETS = {
    "": {r"\s": f"[{_SPACES}]", r"\S": f"[^{_MORE_SPACES}]"},
    "^": {r"\s": f"[{_MORE_SPACES}]", r"\S": f"[^{_SPACES}]"},
}
"""Escapes → what they mean in JavaScript, Python and Rust alike; in a negated class, what they mean in any."""

_WHITE = r"(?:[ \n\r\t]|\\[nrt]|\\x(?:20|0[9aAdD]))"
_BLANK = rf"(?:{_WHITE}|\[{_WHITE}+\]|\(\?:|[()|?*+]|\{{[0-9]+(?:,[0-9]*)?\}})*"
"""How a regex is written that matches white space only."""

_GUIDANCE = {
    "coerce_one_of": None,
    "item_separator": re.compile(f"{_BLANK},{_BLANK}"),
    "key_separator": re.compile(f"{_BLANK}:{_BLANK}"),
    "lenient": None,
    "whitespace_flexible": None,
    "whitespace_pattern": re.compile(_BLANK),
}
"""What a schema may say of the layout, and how it is written."""


def enforced(schema: Mapping[str, Any]) -> str:
    """The schema as llguidance is to read it: all of it will be enforced, or refused, there or here.

    ``x-guidance`` is llguidance's: white space, and ``lenient``, which passes over what can't be enforced. Raises
    RequestError for what is refused here.
    """
    try:
        whole = msgspec.json.decode(msgspec.json.encode(schema), type=dict[str, Any])
    except RecursionError:
        raise _refused(f"{INVALID}it is nested too deeply") from None
    guidance = _guidance(whole.pop("x-guidance", {}))
    for place, part in _reached(whole):
        options = None if "anyOf" in part else part.get("oneOf")
        if isinstance(options, list) and not any("$id" in found for _, found in _all(whole)):
            _tell_apart(whole, part, options)
        if "$id" in part and "$ref" in part and part is not whole:
            problem: str | None = "`$id` beside `$ref` means different things in different drafts"
        else:
            problem = next(_problems(part), None)
        if problem is not None and guidance.get("lenient") is not True:
            raise _refused(f"{UNENFORCEABLE}{problem} at `{path(place)}`")
        _rewrite(part)
    return msgspec.json.encode(whole | {"x-guidance": guidance}).decode()


def children(part: Mapping[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The subschemas right in a schema, definitions last."""
    for key in sorted(part, key=_DEFINITIONS.__contains__):
        value = part[key]
        if isinstance(value, dict):
            if key in _MAP or key in _DEFINITIONS:
                yield from (((key, name), item) for name, item in value.items() if isinstance(item, dict))
            elif key in _ONE:
                yield (key,), value
        elif isinstance(value, list) and key in _LIST:
            yield from (((key, index), item) for index, item in enumerate(value) if isinstance(item, dict))


def path(place: Place) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)


def pointer(place: Place) -> str:
    """As JSON pointers (RFC 6901) are written in a URI."""
    return "".join("/" + quote(str(key).replace("~", "~0").replace("/", "~1"), safe="") for key in place)


def _reached(schema: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The schema and all in it that has a say: definitions only if something refers to them. Parts may be changed as
    they come, but stay where they are."""
    every = list(_all(schema))
    references = [part["$ref"] for _, part in every if isinstance(part.get("$ref"), str)]
    bases = [((), schema), *(found for found in every if "$id" in found[1] and found[1] is not schema)]
    # Which part a name leads to is not for us to tell.
    by_name = len(bases) > 1 or any(reference.partition("/")[0] != "#" for reference in references if reference != "#")
    left = every[::-1] if by_name else [((), schema)]
    seen = set[int]()
    while left:
        place, part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        inner = [(place + keys, child) for keys, child in children(part) if keys[0] not in _DEFINITIONS]
        if isinstance(reference := part.get("$ref"), str):
            inner += (found for base in bases for found in _referred(base, reference))
        left += reversed(inner)


def _all(schema: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    left: list[tuple[Place, dict[str, Any]]] = [((), schema)]
    while left:
        place, part = left.pop()
        yield place, part
        left += ((place + keys, child) for keys, child in children(part))


def _referred(base: tuple[Place, Any], reference: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """What a JSON pointer leads to, which may lie where no schema is looked for."""
    place, found = base
    for key in unquote(reference.partition("#")[2]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            place, found = (*place, key), found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            place, found = (*place, int(key)), found[int(key)]
        else:
            return
    if isinstance(found, dict):
        yield place, found


def are_apart(options: Sequence[Any]) -> bool:
    """Whether no value is of two of these schemas, as far as types and the values of properties tell."""
    if not all(isinstance(option, dict) for option in options):
        return False
    return all(_differ(one, other) for at, one in enumerate(options) for other in options[:at])


def _tell_apart(whole: dict[str, Any], part: dict[str, Any], options: list[Any]) -> None:
    """Of several schemas llguidance is to see that no value is of two, but it looks behind no references. A
    discriminator is a property that all must have (OpenAPI 3.1, 4.8.25), though pydantic leaves it to its default."""
    found = [referred(whole, option) for option in options]
    discriminator = part.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    for at, option in enumerate(found):
        if not isinstance(option, dict) or not isinstance(properties := option.get("properties"), dict):
            continue
        required = option.get("required", [])
        if isinstance(name, str) and name in properties and isinstance(required, list) and name not in required:
            options[at] = options[at] | {"required": [name, *required]}
            found[at] = option | {"required": [name, *required]}
    if any(isinstance(option, dict) and "$ref" in option for option in options) and are_apart(found):
        part["anyOf"] = part.pop("oneOf")


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether they are of different types or constants, or of objects that must have a property that differs so."""
    ours, theirs = _values(one), _values(other)
    if ours and theirs:
        return not ours & theirs
    kinds, others = _types(one), _types(other)
    if not kinds & others:
        return bool(kinds and others)
    if kinds != {"object"} or others != {"object"}:
        return False
    our, their = _tags(one), _tags(other)
    return any(not our[name] & their[name] for name in our.keys() & their.keys())


def _tags(schema: Mapping[str, Any]) -> dict[str, set[str]]:
    """The properties that must be there and whose values are listed."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    tags = {name: _values(tag) for name, tag in properties.items() if name in required and isinstance(tag, dict)}
    return {name: values for name, values in tags.items() if values}


def _values(schema: Mapping[str, Any]) -> set[str]:
    """All there are, if the schema lists strings."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    listed = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    return set(choices) if listed else set()


def _types(schema: Mapping[str, Any]) -> set[str]:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    return {"number" if kind == "integer" else str(kind) for kind in kinds}


def _rewrite(part: dict[str, Any]) -> None:
    """Say the same so that llguidance reads it, in place."""
    # In older drafts keywords of newer ones say nothing; nobody who writes one means that.
    part.pop("$schema", None)
    for key in _ANNOTATIONS & part.keys():
        del part[key]
    for key, values in _NEUTRAL.items():
        if key in part and any(part[key] == value and type(part[key]) is type(value) for value in values):
            del part[key]
    if "additionalItems" in part:
        # Says something beside a list of items only, and is read only right behind it.
        rest = part.pop("additionalItems")
        if isinstance(items := part.get("items"), list):
            del part["items"]
            part |= {"items": items, "additionalItems": rest}
    for key, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        # Draft 4.
        if part.get(exclusive) is True and key in part:
            part[exclusive] = part.pop(key)
        elif part.get(exclusive) is False:
            del part[exclusive]
    if part.get("required") is False:
        # Draft 3.
        del part["required"]
    if isinstance(pattern := part.get("pattern"), str):
        pattern = _PATTERNS.get(pattern, pattern)
        part["pattern"] = pattern if _FLAGS.search(pattern) else _REGEX.sub(_agreed, pattern)
    if isinstance(format := part.get("format"), str) and (instead := FORMATS.get(format)):
        del part["format"]
        before = part.get("allOf", [])
        part["allOf"] = [*before, *map(dict, instead)] if isinstance(before, list) else before


def _problems(part: dict[str, Any]) -> Iterator[str]:
    """What llguidance would pass over."""
    if unread := sorted(_UNREAD & part.keys()):
        yield f"Unimplemented keys: {json.dumps(unread)}"
    if "x-guidance" in part:
        yield "`x-guidance` is of the whole schema"
    if part.get("required") is True:
        yield "`required` is no list of names"
    if part.get("format") == "unknown":
        yield "Unknown format: unknown"
    if isinstance(part.get("items"), list) and "prefixItems" in part:
        yield "`items` is a list beside `prefixItems`"
    for key in _NUMBERS:
        for value in _scalars(part.get(key)):
            if isinstance(value, int) and abs(value) > EXACT:
                yield f"`{key}` has an integer beyond 2^53"
            if isinstance(value, str) and _UNSPELLED.search(value):
                yield f"`{key}` has a control character"
    least, required = part.get("minProperties"), part.get("required", ())
    # Names of no property of the schema's may come twice, and are counted twice.
    if isinstance(least, int) and isinstance(required, list | tuple) and least > len(set(map(str, required))) + 1:
        yield "`minProperties` is more than one above the number of `required` properties"
    patterns = part.get("patternProperties")
    for pattern in (part.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        if isinstance(pattern, str) and _ambiguous(pattern):
            yield f"in the regex {pattern!r} a `[`, `]`, `&&`, `--` or `~~` inside brackets needs a backslash"


def _scalars(value: Any) -> Iterator[Any]:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        else:
            yield value


def _ambiguous(pattern: str) -> bool:
    """Whether JavaScript, which the standard means, reads a class otherwise than Rust, which does arithmetic in it."""
    classes = (match[2] for match in _REGEX.finditer(pattern) if match[2] is not None)
    return any(not inside or re.search(r"\[|&&|--|~~", _ESCAPED.sub("x", inside)) for inside in classes)


def _agreed(match: re.Match[str]) -> str:
    """Part of a regex so that all languages agree; but Rust's and Python's ``.`` is also JavaScript's ends of lines
    U+2028 and U+2029, without which masks take thirty times as long."""
    text, negated, inside = match[0], match[1], match[2]
    if inside is not None:
        return f"[{negated}{_ESCAPED.sub(lambda escape: _SETS[negated].get(escape[0], escape[0]), inside)}]"
    return r"[^\n\r]" if text == "." else _SETS[""].get(text, text)


def _guidance(given: Any) -> dict[str, Any]:
    """``x-guidance`` with what is ours. Raises RequestError for what would not come out as JSON."""
    if not isinstance(given, dict):
        raise _refused(f"{INVALID}`x-guidance` is an object")
    guidance = {
        key: value.replace(r"\s", r"[ \t\r\n]") if isinstance(value, str) else value for key, value in given.items()
    }
    for key, value in guidance.items():
        if key not in _GUIDANCE:
            raise _refused(f"{INVALID}unknown field `{key}` in `x-guidance`")
        written = _GUIDANCE[key]
        if written is None and not isinstance(value, bool):
            raise _refused(f"{INVALID}`{key}` in `x-guidance` is true or false")
        if written is not None and not (isinstance(value, str) and written.fullmatch(value)):
            raise _refused(f"{INVALID}`{key}` in `x-guidance` must match nothing but white space and what separates")
    if not guidance.keys() & {"whitespace_flexible", "whitespace_pattern"}:
        guidance["whitespace_pattern"] = _SPACE
    return guidance | {"json_allowed_escapes": _ESCAPES}


def _refused(detail: str) -> RequestError:
    return RequestError(VALIDATION, detail)
