"""Bytes done of a total, as a bar on a terminal and as log lines anywhere else."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

_QUIET = 0.5
"""Seconds that work may take before it is worth a bar."""
_INTERVAL = 5.0
"""Seconds between log lines."""


def size(count: int) -> str:
    """``1.5 GB``: powers of ten, as disks and download pages count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class Progress:
    """``with Progress("Downloading x", total) as progress: progress.reach(done)``."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._due = time.monotonic() + (_QUIET if sys.stderr.isatty() else _INTERVAL)
        self._bar: Any = None  # rich's, imported only where a bar is shown

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, count: int) -> None:
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        self._done = done
        if self._bar is not None:
            self._bar.update(0, completed=done)
        elif time.monotonic() >= self._due:
            if sys.stderr.isatty():
                self._bar = _bar(self._title, self._total)
                self._bar.update(0, completed=done)
            else:
                self._due = time.monotonic() + _INTERVAL
                log.info(
                    "%s: %s of %s (%d %%)",
                    self._title,
                    size(done),
                    size(self._total),
                    100 * done // max(self._total, 1),
                )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(title: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=total)
    bar.start()
    return bar
