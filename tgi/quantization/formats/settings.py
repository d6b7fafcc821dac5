"""Reading a quantization_config: every key is read, known to change nothing, or refused by name. No torch."""

import logging
import re
from typing import Any

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw, integer

log = logging.getLogger(__name__)

WHERE = "config.json: quantization_config"


def wrong(key: str, what: str) -> StartupError:
    return StartupError(f"{WHERE}: {key}: {what}")


def only(method: str, raw: Raw, keys: str) -> None:
    """A warning for each other key."""
    for key in sorted(set(raw) - set(keys.split()) - {"quant_method", "method"}):
        log.warning("%s: %s is unknown for %s and has no effect", WHERE, key, method)


def one_of(raw: Raw, key: str, *values: object) -> None:
    """StartupError if it is another; the first is what a missing key means."""
    value = raw.get(key, values[0])
    if not any(value is known or (type(value) is type(known) and value == known) for known in values):
        raise wrong(key, f"{value!r} is not implemented")


def bits_of(raw: Raw, key: str, *known: int) -> int:
    bits: int = integer(raw, key)
    if bits not in known:
        raise wrong(key, f"{bits} is not implemented; known: {', '.join(map(str, known))}")
    return bits


def group_of(raw: Raw, key: str = "group_size") -> int | None:
    """Inputs that share a scale; None: all."""
    group = raw.get(key, -1)
    if type(group) is not int or (group < 1 and group != -1):
        raise wrong(key, f"expected -1 or a positive integer, got {group!r}")
    return None if group == -1 else group


def names_of(raw: Raw, key: str) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong(key, f"expected a list of names, got {names!r}")
    return tuple(names)


def object_of(raw: Raw, key: str) -> dict[str, Any]:
    """A missing or null one is empty."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(key, f"expected an object, got {value!r}")
    return value


def text_of(raw: Raw, key: str, default: str) -> str:
    """In lower case."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong(key, f"expected a name, got {value!r}")
    return value.lower()


def pattern_of(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise wrong(key, f"{pattern!r} is no pattern: {error}") from None
