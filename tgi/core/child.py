"""What the launcher's children have in common: their arguments, their log, and the pipe on which they report."""

import argparse
import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tgi.core import telemetry
from tgi.core.config import Settings
from tgi.core.errors import StartupError
from tgi.core.messages import Failed, Ready, Status

log = logging.getLogger(__name__)

Report = Callable[[Status], None]
"""Tell the launcher how it goes."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one child is given that others aren't: descriptors that it has inherited, and its number."""

    listen: int | None = None
    """The server's listening socket."""
    rank: int = 0
    lines: Sequence[int] = ()
    """Sockets to the other ranks if this is the first, else the one to that."""
    memory: int | None = None
    """A file in memory that ranks share, or routers."""
    worker: int = 0
    """Its number among the routers."""


Serve = Callable[[Settings, Place, Report], None]
"""The child's whole life."""

_GARBAGE = 20_000
"""New objects before the collector looks for cycles: the messages of one step of many streams are no reason to."""


def run(target: str, serve: Serve, argv: Sequence[str] | None = None) -> int:
    """Parse ``--settings PATH --status-fd N`` and what a Place is made of, serve, and return the exit code.

    Whatever ends the child early is reported as Failed, in words for the operator.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--line-fds", type=int, nargs="*", default=())
    parser.add_argument("--memory-fd", type=int)
    parser.add_argument("--worker", type=int, default=0)
    arguments = parser.parse_args(argv)
    settings = Settings.read(arguments.settings)
    # What ranks tell of their loading is the same for all.
    level = "error" if arguments.rank else settings.log_level
    telemetry.setup(target, level, settings.json_output, colour=settings.log_colorize)

    def report(status: Status) -> None:
        if isinstance(status, Ready):
            gc.freeze()
            gc.set_threshold(_GARBAGE)
            gc.enable()
        os.write(arguments.status_fd, msgspec.json.encode(status) + b"\n")

    # What is made before it is ready lives as long as the process. To look for cycles in it takes a sixth of the start,
    # and later it would come between two tokens.
    gc.disable()
    try:
        place = Place(arguments.listen_fd, arguments.rank, arguments.line_fds, arguments.memory_fd, arguments.worker)
        serve(settings, place, report)
    except StartupError as error:
        report(Failed(str(error)))
        return 1
    except Exception as error:
        log.exception("this should not happen")
        report(Failed(f"{type(error).__name__}: {error}"))
        return 1
    return 0
