"""Strict decoding of JSON bodies, and the numbers and the error that all routes share."""

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec checks no bound above 63 bits: ``validate`` does."""
F32 = Annotated[float, Meta(ge=-3.4028234663852886e38, le=3.4028234663852886e38)]

Body = TypeVar("Body")

_PATH = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
"""How msgspec ends a message: with the path of the wrong value. TGI begins with it."""


class Unreadable(Exception):
    """The body is not what the route takes. Answered in plain text, as TGI's HTTP layer does, not as its JSON error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def decode(body: bytes, kind: type[Body]) -> Body:
    """JSON to a request struct. No value is coerced, except integers to floats.

    Raises Unreadable: 400 for what is not JSON, 422 for JSON of another type, with the path of the wrong value.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = _PATH.sub(r"\2: \1", str(error))
        raise Unreadable(422, f"Failed to deserialize the JSON body into the target type: {text}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(400, f"Failed to parse the request body as JSON: {error}") from error


class ErrorResponse(Struct, frozen=True):
    """TGI's error, on every route that has no error shape of its own."""

    error: str
    error_type: str
