"""Log lines in TGI's two formats, text and JSON, on stdlib logging. Knows no process; each gives its own target.

What is logged may hold what clients or repositories sent: control characters are escaped, so that nobody can forge a
line or talk to a terminal.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
"""Level names of ``LOG_LEVEL`` as TGI writes them."""

ROUTER = "text_generation_router"
"""The target whose lines TGI writes in full: with module and place in the code, and as flat JSON."""

_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
_COLOURS = {"DEBUG": 34, "INFO": 32, "WARN": 33, "ERROR": 31}
_ROOT = str(Path(__file__).parents[2]) + "/"
_TARGET = re.compile(r"[\w:.-]+")
# Besides control characters: line separators, marks that turn the direction of writing, halves of characters.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Span:
    """What a line belongs to, given as ``extra={"span": Span(…)}``. Text is quoted, other values stand as they are."""

    name: str
    fields: Mapping[str, object]

    def __str__(self) -> str:
        fields = " ".join(
            f"{key}={_quoted(value) if isinstance(value, str) else escape(str(value))}"
            for key, value in self.fields.items()
        )
        return f"{self.name}{{{fields}}}" if fields else self.name


def escape(text: str) -> str:
    """On one line, with nothing that acts on a terminal."""
    return _UNFIT.sub(lambda found: repr(found[0])[1:-1], text)


def duration(seconds: float) -> str:
    """``1.234567ms``: as Rust writes durations, and so TGI's logs and spans."""
    nanoseconds = max(0, round(seconds * 1e9))
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if nanoseconds >= size:
            whole, rest = divmod(nanoseconds, size)
            fraction = str(size + rest)[1:].rstrip("0")
            return f"{whole}.{fraction}{unit}" if fraction else f"{whole}{unit}"
    return f"{nanoseconds}ns"


def level_for(target: str, directives: str) -> int:
    """The logging level that ``LOG_LEVEL`` sets for a target: ``level`` or a list like ``info,target=debug``.

    The directive of the target wins over the general one, wherever they stand. ValueError names what can't be read.
    """
    levels = dict(_read(directives))
    return levels.get(target, levels.get("", logging.INFO))


def _read(directives: str) -> Iterator[tuple[str, int]]:
    """(target, or "" for all, level)."""
    for directive in directives.split(","):
        name, separator, level = directive.strip().rpartition("=")
        if level.lower() not in LEVELS or (separator and not _TARGET.fullmatch(name)):
            raise ValueError(f"`{directive}` is not a level ({', '.join(LEVELS)}) or `target=level`")
        yield name, LEVELS[level.lower()]


class Formatter(logging.Formatter):
    """``2026-01-01T00:00:00.000000Z  INFO span{field="…"}: target: message``, or one JSON object per line."""

    def __init__(self, target: str, json_output: bool, colour: bool = False) -> None:
        super().__init__()
        self._target = target
        self._full = target == ROUTER
        self._json = json_output
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        timestamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        level = _NAMES.get(record.levelno, "ERROR")
        target = self._target
        if self._full and record.name.startswith("tgi.router."):
            target += record.name.removeprefix("tgi.router").replace(".", "::")
        place = record.pathname.removeprefix(_ROOT)
        span: Span | None = getattr(record, "span", None)
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._json:
            message = _whole(message)
            line: dict[str, Any] = {"timestamp": timestamp, "level": level}
            if self._full:
                line |= {"message": message, "target": target, "filename": place, "line_number": record.lineno}
            else:
                line |= {"fields": {"message": message}, "target": target}
            if span is not None:
                shown = {key: _whole(str(value)) for key, value in span.fields.items()} | {"name": span.name}
                line |= {"span": shown, "spans": [shown]}
            return msgspec.json.encode(line).decode()
        # Lines of one record after the first are indented: none of them can pass for a record.
        message = escape(message) if span else "\n  ".join(map(escape, message.split("\n")))
        if self._colour:
            timestamp, target, place = _dim(timestamp), _dim(target), _dim(place)
        level = f"{level:>5}" if not self._colour else f"\x1b[{_COLOURS[level]}m{level:>5}\x1b[0m"
        where = f"{target}: {place}:{record.lineno}" if self._full else target
        return f"{timestamp} {level} {f'{span}: ' if span else ''}{where}: {message}"


def setup(
    target: str,
    directives: str = "info",
    json_output: bool = False,
    stream: TextIO | None = None,
    colour: bool | None = None,
) -> None:
    """Send this process's log to ``stream`` (stdout), in colours if that is a terminal, or as ``colour`` says.

    Other libraries speak from warnings up, all of them at debug. The router's modules can have levels of their own:
    ``text_generation_router::server=warn`` is about the lines of requests.
    """
    stream = stream or sys.stdout
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter(target, json_output, stream.isatty() if colour is None else colour))
    level = level_for(target, directives)
    logging.basicConfig(
        handlers=[handler], level=level if level <= logging.DEBUG else max(level, logging.WARNING), force=True
    )
    logging.getLogger("tgi").setLevel(level)
    if target == ROUTER:
        for name, own in _read(directives):
            if name.startswith(f"{ROUTER}::"):
                logging.getLogger(f"tgi.router{name.removeprefix(ROUTER).replace('::', '.')}").setLevel(own)
    logging.captureWarnings(True)


def _quoted(text: str) -> str:
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _whole(text: str) -> str:
    """Without halves of characters, which JSON can't have."""
    return text.encode(errors="backslashreplace").decode()


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"
