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
    loggers = [logging.getLogger(name) for name in (None, "tgi", "tgi.router.server")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


ROUTER, LAUNCHER = "text_generation_router", "text_generation_launcher"
SPAN = {"span": telemetry.Span("generate", {"total_time": "1ms", "seed": 'a "b"\n', "parameters": 3})}


def written(
    directives: str = "info", json_output: bool = False, target: str = LAUNCHER, colour: bool | None = None
) -> io.StringIO:
    stream = io.StringIO()
    telemetry.setup(target, directives, json_output, stream, colour)
    return stream


def test_text() -> None:
    stream = written()
    logging.getLogger("tgi.launcher.launch").info("took %d ms", 3)
    logging.getLogger("tgi.launcher.launch").error("no", extra=SPAN)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z  INFO text_generation_launcher: took 3 ms", first)
    span = r'generate{total_time="1ms" seed="a \"b\"\n" parameters=3}'
    assert second.endswith(f"Z ERROR {span}: text_generation_launcher: no")


def test_the_router_s_text_says_where_it_comes_from() -> None:
    stream = written(target=ROUTER)
    logging.getLogger("tgi.router.dialects.chat").info("one")
    logging.getLogger("uvicorn").warning("two")
    first, second = stream.getvalue().splitlines()
    place = r"tests/launcher/test_telemetry\.py:\d+"
    assert re.fullmatch(rf".*Z  INFO text_generation_router::dialects::chat: {place}: one", first)
    assert re.fullmatch(rf".*Z  WARN text_generation_router: {place}: two", second)


def test_json() -> None:
    stream = written(json_output=True)
    logging.getLogger("tgi.launcher.launch").warning('two\nlines and "quotes"')
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "WARN",
        "fields": {"message": 'two\nlines and "quotes"'},
        "target": "text_generation_launcher",
    }


def test_the_router_s_json_is_flat() -> None:
    stream = written(json_output=True, target=ROUTER)
    logging.getLogger("tgi.router.server").info("Success", extra=SPAN)
    line = json.loads(stream.getvalue())
    assert list(line) == ["timestamp", "level", "message", "target", "filename", "line_number", "span", "spans"]
    assert line["level"] == "INFO" and line["message"] == "Success"
    assert line["target"] == "text_generation_router::server"
    assert line["filename"] == "tests/launcher/test_telemetry.py" and line["line_number"] > 0
    assert line["span"] == {"total_time": "1ms", "seed": 'a "b"\n', "parameters": "3", "name": "generate"}
    assert line["spans"] == [line["span"]]


def test_an_exception_is_one_record_with_its_trace() -> None:
    stream = written(json_output=True)
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("tgi").exception("failed")
    message = json.loads(stream.getvalue())["fields"]["message"]
    assert message.startswith("failed\nTraceback") and message.endswith("ValueError: odd")


@pytest.mark.parametrize("target", [ROUTER, LAUNCHER])
def test_nobody_forges_a_line_or_talks_to_a_terminal(target: str) -> None:
    forged = "x\n2026-01-01T00:00:00.000000Z  INFO fine\r\x1b[2J\x9b\u2028\u202e\ud800\x00\x85"
    stream = written(target=target)
    logging.getLogger("tgi").info("%s", forged)
    first, second = stream.getvalue().split("\n")[:-1]
    assert first.endswith(": x") and second.startswith("  2026")
    assert second.endswith(r"fine\r\x1b[2J\x9b\u2028\u202e\ud800\x00\x85")
    stream = written(target=target)
    logging.getLogger("tgi").info("%s", forged, extra={"span": telemetry.Span("a", {"b": forged, "c": Shown(forged)})})
    assert len(stream.getvalue().splitlines()) == 1 and stream.getvalue().count(r"x\n2026") == 3
    assert not set("\x1b\r\x9b") & set(stream.getvalue())
    stream = written(target=target, json_output=True)
    logging.getLogger("tgi").info("%s", forged)
    line = json.loads(stream.getvalue())
    assert (line if target == ROUTER else line["fields"])["message"] == forged.replace("\ud800", r"\ud800")
    assert stream.getvalue().count("\n") == 1


class Shown:
    """Written by ``str``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def test_colours_are_for_terminals() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, colour, coloured in (
        (io.StringIO(), None, False),
        (io.StringIO(), True, True),
        (Terminal(), None, True),
        (Terminal(), False, False),
    ):
        telemetry.setup(ROUTER, stream=stream, colour=colour)
        logging.getLogger("tgi").warning("x")
        assert ("\x1b[33m WARN\x1b[0m" in stream.getvalue()) is coloured
        assert ("\x1b" in stream.getvalue()) is coloured


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ns"),
        (-1, "0ns"),
        (2e-9, "2ns"),
        (999e-9, "999ns"),
        (1e-6, "1µs"),
        (1.5e-6, "1.5µs"),
        (0.001234567, "1.234567ms"),
        (0.01005, "10.05ms"),
        (1, "1s"),
        (61.000000001, "61.000000001s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert telemetry.duration(seconds) == text


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


def test_a_module_of_the_router_can_have_a_level_of_its_own() -> None:
    for target, lines in ((ROUTER, ["b"]), (LAUNCHER, ["a", "b"])):
        logging.getLogger("tgi.router.server").setLevel(logging.NOTSET)
        stream = written("info,text_generation_router::server=warn", target=target)
        logging.getLogger("tgi.router.server").info("a")
        logging.getLogger("tgi.router.app").info("b")
        assert [line[-1] for line in stream.getvalue().splitlines()] == lines


@pytest.mark.parametrize("directives", ["", "loud", "info,", "=info", "a=b=info,x=loud", "a[generate]=info"])
def test_levels_that_cannot_be_read_are_named(directives: str) -> None:
    with pytest.raises(ValueError, match="is not a level"):
        telemetry.level_for("x", directives)
