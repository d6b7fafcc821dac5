"""The console commands: parse, call, print, and the exit codes 0 (done, or a signal), 1 (error) and 2 (usage).

``detect-watermark`` has grep's: 0 (found), 1 (not found) and 2 (anything else).
"""

import argparse
import logging
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

from tgi.core import telemetry
from tgi.core.errors import StartupError
from tgi.launcher import flags
from tgi.launcher.flags import Command, Options

log = logging.getLogger(__name__)


def launcher(argv: Sequence[str] | None = None) -> int:
    """``text-generation-launcher``."""
    started = time.monotonic()
    from tgi.launcher.launch import launch

    options = _options("launcher", "text_generation_launcher", argv)
    return _run(lambda: launch(options, started))


def router(argv: Sequence[str] | None = None) -> int:
    """``text-generation-router``."""
    started = time.monotonic()
    from tgi.launcher.apart import serve_router

    words = list(sys.argv[1:] if argv is None else argv)
    if words[-1:] == ["print-schema"]:
        flags.parse(words[:-1], command="router")
        return subprocess.call([sys.executable, "-m", "tgi.router.openapi"])
    options = _options("router", telemetry.ROUTER, words)
    return _run(lambda: serve_router(options, started))


def server(argv: Sequence[str] | None = None) -> int:
    """``text-generation-server``: the subcommands of TGI that people run by hand."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="text-generation-server", allow_abbrev=False)
    parser.add_argument("command", choices=("serve", "download-weights", "detect-watermark", "quantize"))
    command: Command = parser.parse_args(words[:1]).command
    started = time.monotonic()
    log_to = sys.stderr if command == "detect-watermark" else sys.stdout
    options = _options(command, "text_generation_server", words[1:], log_to)
    if command == "detect-watermark":
        return _run(lambda: _detect(options), failed=2, stopped=2)
    if command == "serve":
        from tgi.launcher.apart import serve_engine

        return _run(lambda: serve_engine(options, started))
    if command == "quantize":
        return _run(lambda: _quantize(options), stopped=1)
    return _run(lambda: _download(options))


def _download(options: Options) -> None:
    from tgi.launcher.download import resolve_model
    from tgi.launcher.launch import store

    files = resolve_model(options.model_id, options.revision, store(options))
    log.info("%s is in %s", options.model_id, files.folder)


def _detect(options: Options) -> int:
    from tgi.launcher.detect import detect_watermark
    from tgi.launcher.launch import store

    return 0 if detect_watermark(options, store(options)) else 1


def _quantize(options: Options) -> int:
    from tgi.launcher.launch import store
    from tgi.launcher.quantize import quantize

    return quantize(options, store(options))


def _options(command: Command, target: str, argv: Sequence[str] | None, log_to: TextIO | None = None) -> Options:
    """The command's options; the log speaks from here on."""
    options, warnings = flags.parse(sys.argv[1:] if argv is None else argv, command=command)
    telemetry.setup(target, options.log_level, options.json_output, log_to, options.log_colorize)
    for warning in warnings:
        log.warning("%s", warning)
    return options


def _run(work: Callable[[], int | None], *, failed: int = 1, stopped: int = 0) -> int:
    """Do the work; it may return the status. A signal ends it cleanly; an error is the last line on standard error."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(stopped)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        return work() or 0
    except StartupError as error:
        name = "" if type(error) is StartupError else f"{type(error).__name__}: "
        print(f"Error: {name}{error}", file=sys.stderr)
        return failed
    except OSError as error:  # the machine's own refusal: a full disk, too few descriptors
        print(f"Error: {error}", file=sys.stderr)
        return failed
    except Exception:  # a bug, whose status must not pass for a verdict
        traceback.print_exc()
        return failed
