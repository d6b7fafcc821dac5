"""How the text of a setting is read, on the command line and in the environment alike. Knows no setting."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from tgi.core import telemetry


@dataclass(frozen=True, slots=True)
class Kind:
    """How the text of a value is read. ``parse`` raises ValueError with what it expected."""

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    switch: bool = False
    """On the command line it stands without a value."""
    many: bool = False
    """Repeating it on the command line adds values."""


def text(metavar: str = "TEXT") -> Kind:
    def parse(value: str) -> str:
        if not value:
            raise ValueError("expected a value, not an empty string")
        return value

    return Kind(metavar, "", parse)


def integer(low: int = 0, high: int = 2**63 - 1) -> Kind:
    allowed = f"{low}..{high}" if high < 2**32 - 1 else f"{low}.."

    def parse(value: str) -> int:
        if not re.fullmatch(r"\+?[0-9]{1,19}", value) or not low <= (number := int(value)) <= high:
            raise ValueError(f"expected an integer {allowed}")
        return number

    return Kind("N", allowed, parse)


def _group(value: str) -> int:
    return -1 if value == "-1" else integer(1, 2**20).parse(value)


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """A finite float from ``low`` (or ``above`` it) to ``high``."""
    allowed = f"{'>' if above else ''}{low:g}..{high:g}" if high < float("inf") else f"{'>' if above else ''}{low:g}.."

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not (low < number if above else low <= number) or not number <= high or number == float("inf"):
            raise ValueError(f"expected a number {allowed}")
        return number

    return Kind("X", allowed, parse)


def choice(**meaning: Any) -> Kind:
    """One of the names, read as its meaning."""
    allowed = "|".join(meaning)

    def parse(value: str) -> Any:
        if value not in meaning:
            raise ValueError(f"expected {' or '.join(meaning)}")
        return meaning[value]

    return Kind("VALUE", allowed, parse)


def one_of(*names: str) -> Kind:
    return choice(**{name: name for name in names})


def list_of(item: Kind, *, many: bool = False) -> Kind:
    return Kind(
        f"{item.metavar},…", item.allowed, lambda value: tuple(item.parse(part) for part in value.split(",")), many=many
    )


def _collector(value: str) -> str:
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        fits = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        fits = False
    if not fits or not re.fullmatch("[!-~]+", value):
        raise ValueError("expected a URL such as http://localhost:4317")
    return value


def _header(value: str) -> str:
    if not re.fullmatch("[ -~]+", value):
        raise ValueError("expected printable ASCII characters")
    return value


def _label(value: str) -> str | None:
    return _header(value) if value else None


def _log_level(value: str) -> str:
    telemetry.level_for("", value)
    return value


_LOGGER_LEVELS = {
    "TRACE": "trace",
    "DEBUG": "debug",
    "INFO": "info",
    "SUCCESS": "info",
    "WARNING": "warn",
    "ERROR": "error",
}


def _logger_level(value: str) -> str:
    if value.upper() not in _LOGGER_LEVELS:
        raise ValueError(f"expected {' or '.join(_LOGGER_LEVELS)}")
    return _LOGGER_LEVELS[value.upper()]


def _path(value: str) -> str:
    if not re.fullmatch("/[!-~]*", value) or any(sign in value for sign in "{}?#%"):
        raise ValueError("expected a path such as `/predict`")
    return value


BOOLEAN = choice(true=True, false=False)
SWITCH = replace(BOOLEAN, metavar="", allowed="", switch=True)
ANY = Kind("TEXT", "", str)
BIT = choice(**{"true": True, "1": True, "false": False, "0": False})
COLLECTOR = Kind("URL", "", _collector)
"""Where traces go: TGI's Rust side wants a URL, its Python side takes a host and a port, too."""
GROUP = Kind("N", "-1|1..", _group)
HEADER = Kind("TEXT", "", _header)
"""The value of an HTTP header."""
LABEL = Kind("TEXT", "", _label)
"""What was built into an image, empty if nothing was."""
LOG_LEVEL = Kind("LEVEL", "|".join(telemetry.LEVELS), _log_level)
LOGGER_LEVEL = Kind("LEVEL", "|".join(_LOGGER_LEVELS), _logger_level)
"""As TGI's Python side names it; read as ``LOG_LEVEL`` would have it."""
PATH = Kind("PATH", "", _path)
"""Of a route, without parameters."""
