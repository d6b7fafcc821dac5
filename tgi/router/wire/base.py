"""Strict decoding of JSON bodies, and the numbers and the error that all routes share."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec checks no bound above 63 bits: ``validate`` does."""
I64 = Annotated[int, Meta(ge=-(2**63))]
"""As U64."""
F32 = Annotated[float, Meta(ge=-3.4028234663852886e38, le=3.4028234663852886e38)]

Body = TypeVar("Body")

_PATH = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
"""How msgspec ends a message: with the path of the wrong value. TGI begins with it."""


class Unreadable(Exception):
    """The body is not what the route takes. Answered in plain text, as TGI's HTTP layer does, not as its JSON error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Refusing(Struct, frozen=True, kw_only=True):
    """A part of a request with fields that this version refuses by name: see ``validate.refuse``."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Field → the values that ask for nothing, which are accepted."""


class OneOf(NamedTuple):
    """JSON of one of several types, which are told apart by the fields that each requires."""

    kinds: tuple[Any, ...]
    name: str = ""
    """What TGI calls it in an error."""


def decode(body: bytes, kind: type[Body], at: str = "") -> Body:
    """JSON to a request struct. No value is coerced, except integers to floats. ``at``: where in a larger body it lies.

    Raises Unreadable: 400 for what is not JSON, 422 for JSON of another type, with the path of the wrong value.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text, path = str(error), at
        if match := _PATH.fullmatch(text):
            text, path = match[1], ".".join(filter(None, (at, match[2])))
        raise _mistyped(f"{path}: {text}" if path else text) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from error


def decode_one(body: bytes, union: OneOf, at: str = "") -> Any:
    """The first of the union's types that the body is. Raises Unreadable: what is wrong as the first it means to be."""
    fields = decode(body, dict[str, Raw], at).keys()
    wrong: Unreadable | None = None
    for kind in union.kinds:
        if fields >= {field.encode_name for field in msgspec.structs.fields(kind) if field.required}:
            try:
                return decode(body, kind, at)
            except Unreadable as error:
                wrong = wrong or error
    untold = f"data did not match any variant of untagged enum {union.name}"
    raise wrong or _mistyped(f"{at}: {untold}" if at else untold)


def check_keys(body: bytes) -> None:
    """Refuse JSON with an object that has a key twice: of the two, parsers take one or the other. As ``decode``."""
    try:
        _KEYS.decode(body.decode())
    except _TwiceError as error:
        raise _mistyped(f"duplicate field `{error}`") from None
    except (ValueError, RecursionError) as error:
        raise _malformed(error) from error


class _TwiceError(Exception):
    """A key that an object has twice."""


def _distinct(members: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in members}) < len(members):
        ((key, _),) = Counter(key for key, _ in members).most_common(1)
        raise _TwiceError(key)


_KEYS = json.JSONDecoder(object_pairs_hook=_distinct, parse_int=str, parse_float=str)
"""Looks at keys alone. Takes as long as msgspec."""


def _malformed(error: Exception) -> Unreadable:
    return Unreadable(400, f"Failed to parse the request body as JSON: {error}")


def _mistyped(text: str) -> Unreadable:
    return Unreadable(422, f"Failed to deserialize the JSON body into the target type: {text}")


class ErrorResponse(Struct, frozen=True):
    """TGI's error, on every route that has no error shape of its own."""

    error: str
    error_type: str
