"""Log lines in the two formats, and which of them are written."""

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from tgi.core import telemetry


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Leave the logging of the test run as it was."""
    root, own = logging.getLogger(), logging.getLogger("tgi")
    before = root.handlers[:], root.level, own.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = before[0], before[1]
    own.setLevel(before[2])


def written(directives: str = "info", json_output: bool = False) -> io.StringIO:
    stream = io.StringIO()
    telemetry.setup("text_generation_router", directives, json_output, stream)
    return stream


def test_text() -> None:
    stream = written()
    logging.getLogger("tgi.router.app").info("took %d ms", 3)
    logging.getLogger("tgi.router.app").error("no")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z  INFO text_generation_router: took 3 ms", first)
    assert second.endswith("Z ERROR text_generation_router: no")


def test_json() -> None:
    stream = written(json_output=True)
    logging.getLogger("tgi.router.app").warning('two\nlines and "quotes"')
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "WARN",
        "fields": {"message": 'two\nlines and "quotes"'},
        "target": "text_generation_router",
    }


def test_an_exception_is_one_record_with_its_trace() -> None:
    stream = written(json_output=True)
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("tgi").exception("failed")
    message = json.loads(stream.getvalue())["fields"]["message"]
    assert message.startswith("failed\nTraceback") and message.endswith("ValueError: odd")


def test_libraries_speak_from_warnings_up_through_the_same_lines() -> None:
    stream = written()
    for name in ("uvicorn.error", "httpx"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("trouble of %s", name)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    lines = stream.getvalue().splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == ["trouble of uvicorn.error", "trouble of httpx"]
    assert "DeprecationWarning: old" in stream.getvalue() and "chatter" not in stream.getvalue()
    stream = written("debug")
    logging.getLogger("httpx").info("chatter")
    assert "chatter" in stream.getvalue()


@pytest.mark.parametrize(
    ("directives", "level"),
    [
        ("info", logging.INFO),
        ("WARN", logging.WARNING),
        ("off", logging.CRITICAL + 1),
        ("error,text_generation_router=debug", logging.DEBUG),
        ("text_generation_router=debug,error", logging.DEBUG),
        ("text_generation_launcher=debug", logging.INFO),
        ("text_generation_launcher=debug, warn", logging.WARNING),
    ],
)
def test_levels(directives: str, level: int) -> None:
    assert telemetry.level_for("text_generation_router", directives) == level


@pytest.mark.parametrize("directives", ["", "loud", "info,", "=info", "a=b=info,x=loud"])
def test_levels_that_cannot_be_read_are_named(directives: str) -> None:
    with pytest.raises(ValueError, match="is not a level"):
        telemetry.level_for("x", directives)
