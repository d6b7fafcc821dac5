"""The console commands: parse, call, print, and the exit codes 0 (done, or a signal), 1 (error) and 2 (usage)."""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence

from tgi.core import telemetry
from tgi.core.errors import StartupError

log = logging.getLogger(__name__)

_TARGET = "text_generation_launcher"
_LEVELS = {"TRACE": "trace", "DEBUG": "debug", "INFO": "info", "SUCCESS": "info", "WARNING": "warn", "ERROR": "error"}
"""``--logger-level`` names levels as TGI's Python side does."""
_ELSEWHERE = {
    "serve": "run `text-generation-launcher --model-id MODEL_ID`, which starts everything",
    "quantize": "serve weights that are quantized already, such as a GGUF file",
}


def launcher(argv: Sequence[str] | None = None) -> int:
    """``text-generation-launcher``."""
    started = time.monotonic()
    from tgi.launcher import flags
    from tgi.launcher.launch import launch

    options, warnings = flags.parse(sys.argv[1:] if argv is None else argv)
    telemetry.setup(_TARGET, options.log_level, options.json_output)
    for warning in warnings:
        log.warning("%s", warning)
    return _run(lambda: launch(options, started))


def server(argv: Sequence[str] | None = None) -> int:
    """``text-generation-server``: the subcommands of TGI that people run by hand."""
    parser = argparse.ArgumentParser(prog="text-generation-server", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, instead in _ELSEWHERE.items():
        commands.add_parser(name, help=f"not here: {instead}", add_help=False)
    download = commands.add_parser("download-weights", help="fetch a model into the cache", allow_abbrev=False)
    download.add_argument("model_id")
    download.add_argument("--revision")
    download.add_argument("--extension", default=".safetensors")
    download.add_argument("--logger-level", default="INFO", type=str.upper, choices=_LEVELS)
    for name in ("--json-output", "--auto-convert", "--trust-remote-code", "--merge-lora"):
        download.add_argument(name, action=argparse.BooleanOptionalAction, default=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in _ELSEWHERE:
        parser.error(f"`{arguments.command}` is not here: {_ELSEWHERE[arguments.command]}")
    if rest:
        download.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.extension != ".safetensors":
        download.error(f"`--extension` {arguments.extension} is not supported: only .safetensors files are served")
    for name in ("auto_convert", "trust_remote_code", "merge_lora"):
        if getattr(arguments, name):
            download.error(f"`--{name.replace('_', '-')}` is not supported yet")

    from tgi.launcher import flags
    from tgi.launcher.download import resolve_model
    from tgi.launcher.launch import store

    telemetry.setup(_TARGET, _LEVELS[arguments.logger_level], arguments.json_output)
    where = store(flags.cache_options())

    def fetch() -> None:
        files = resolve_model(arguments.model_id, arguments.revision, where)
        log.info("%s is in %s", arguments.model_id, files.folder)

    return _run(fetch)


def _run(work: Callable[[], None]) -> int:
    """Do the work; a signal ends it cleanly, an error is the last line on standard error."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        work()
    except StartupError as error:
        name = "" if type(error) is StartupError else f"{type(error).__name__}: "
        print(f"Error: {name}{error}", file=sys.stderr)
        return 1
    except OSError as error:  # the machine's own refusal: a full disk, too few descriptors
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(0)
