"""The launcher with an engine that can be broken: ``python -m tests.serve.fragile OPTION…``.

It is the real one, but for its steps: they take a while, so that there is time to disturb them, and a prompt with the
token POISON ends the process with its tenth token; one with HANG makes the first step of all hang.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tgi import cli
from tgi.core import child
from tgi.core.config import Settings
from tgi.core.plan import Work
from tgi.launcher import launch
from tgi.launcher.shards import shards

SLOWLY = 0.004
"""Seconds that a step takes at least."""


def engine() -> int:
    from tgi.engine.process import serve

    return child.run("text_generation_engine", lambda settings, *rest: serve(_weaken(settings), *rest))


def _weaken(settings: Settings) -> Settings:
    from tgi.runtime.runner import Runner

    poison, hang = (int(os.environ.get(name, -1)) for name in ("POISON", "HANG"))
    hung = Path(settings.run_dir) / "hung"
    real = Runner.launch

    def weakly(self: Runner, works: Sequence[Work]) -> Any:
        time.sleep(SLOWLY)
        for work in works:
            prompt = work.submit.token_ids[: work.submit.prompt_length]
            if poison in prompt and len(work.tokens) - len(prompt) >= 10:
                os.kill(os.getpid(), signal.SIGKILL)
            if hang in prompt and not hung.exists():
                hung.touch()
                time.sleep(3600)
        return real(self, works)

    Runner.launch = weakly  # type: ignore[method-assign]
    return msgspec.structs.replace(settings, longest_step=2.0)


if __name__ == "__main__":
    if "--status-fd" in sys.argv:
        os._exit(engine())
    launch.shards = partial(shards, words=(sys.executable, "-m", "tests.serve.fragile"))
    sys.exit(cli.launcher())
