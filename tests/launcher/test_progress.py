"""How far a download or a load has come: a bar on a terminal, log lines anywhere else."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from tgi.launcher import progress
from tgi.launcher.progress import Progress, size

SCRIPT = """
import time
from tgi.launcher import progress
progress._QUIET = 0
with progress.Progress("Loading weights", 4_000_000) as bar:
    for done in (1_000_000, 2_000_000, 3_000_000):
        bar.reach(done)
        time.sleep(0.2)
"""


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "Loading weights" in text and "━" in text and "/4.0 MB" in text
    assert text.rstrip().endswith("\x1b[2K"), "nothing of it stays"


def test_log_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), Progress("Loading weights", 4_000_000) as bar:
        for now in (1.0, 4.9, 5.1, 6.0, 9.9, 10.2):
            bar.reach(int(now * 100_000))
    assert [record.message for record in caplog.records] == [
        "Loading weights: 510.0 kB of 4.0 MB (12 %)",
        "Loading weights: 1.0 MB of 4.0 MB (25 %)",
    ]


def test_work_of_a_moment_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("Loading weights", 3) as bar:
        bar.add(1)
        bar.add(2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5 * 10**12, "5.0 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
