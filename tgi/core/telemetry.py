"""Log lines in TGI's two formats, text and JSON, on stdlib logging. Knows no process; each gives its own target."""

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

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

_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}


def level_for(target: str, directives: str) -> int:
    """The logging level that ``LOG_LEVEL`` sets for a target: ``level`` or a list like ``info,target=debug``.

    The directive of the target wins over the general one, wherever they stand. ValueError names what can't be read.
    """
    general, own = logging.INFO, None
    for directive in directives.split(","):
        name, separator, level = directive.strip().rpartition("=")
        if level.lower() not in LEVELS or (separator and not name):
            raise ValueError(f"`{directive}` is not a level ({', '.join(LEVELS)}) or `target=level`")
        if name == target:
            own = LEVELS[level.lower()]
        elif not name:
            general = LEVELS[level.lower()]
    return general if own is None else own


class Formatter(logging.Formatter):
    """``2026-01-01T00:00:00.000000Z  INFO target: message``, or one JSON object per line."""

    def __init__(self, target: str, json_output: bool) -> None:
        super().__init__()
        self._target = target
        self._json = json_output

    def format(self, record: logging.LogRecord) -> str:
        timestamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        level = _NAMES.get(record.levelno, "ERROR")
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if not self._json:
            return f"{timestamp} {level:>5} {self._target}: {message}"
        line = {"timestamp": timestamp, "level": level, "fields": {"message": message}, "target": self._target}
        return msgspec.json.encode(line).decode()


def setup(target: str, directives: str = "info", json_output: bool = False, stream: TextIO | None = None) -> None:
    """Send this process's log to ``stream`` (stdout). Other libraries speak from warnings up, all of them at debug."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(Formatter(target, json_output))
    level = level_for(target, directives)
    logging.basicConfig(
        handlers=[handler], level=level if level <= logging.DEBUG else max(level, logging.WARNING), force=True
    )
    logging.getLogger("tgi").setLevel(level)
    logging.captureWarnings(True)
