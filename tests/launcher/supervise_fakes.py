"""Runs the real supervisor over scripts: ``python -m tests.launcher.supervise_fakes GRACE WORKERS ROUTER SHARD…``.

The scripts speak the status pipe with ``say`` and are told by SIGTERM (``told``) to end. Shards know how often they
were started before, ``turn``, from a pipe that is made for each start; routers have a folder to note it in.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from tgi.core import telemetry
from tgi.core.config import Limits, ModelFiles, Settings
from tgi.core.errors import StartupError
from tgi.launcher.supervisor import Command, bind, supervise

PRELUDE = """
import json, os, signal, socket, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
status = int(arguments["--status-fd"])
def say(**fields): os.write(status, json.dumps(fields).encode() + b"\\n")
def tell(text): os.write(1, text.encode() + b"\\n")
def told(*_):
    tell("router ends" if "--listen-fd" in arguments else "engine ends")
    raise SystemExit(0)
signal.signal(signal.SIGTERM, told)
folder = os.path.dirname(arguments["--settings"])
turn = int(os.read(int(arguments["--turn-fd"]), 9)) if "--turn-fd" in arguments else 0
"""
LIMITS = Limits(
    max_input_tokens=7, max_total_tokens=8, max_batch_prefill_tokens=8, max_batch_total_tokens=16, max_batch_size=1
)


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", PRELUDE + text)


class Engine:
    """What is started in its place."""

    def __init__(self, shards: Sequence[str]) -> None:
        self._shards = shards
        self._turn = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[Command]]:
        commands = []
        with contextlib.ExitStack() as stack:
            for shard in self._shards:
                reader, writer = os.pipe()
                stack.callback(os.close, reader)
                os.write(writer, str(self._turn).encode())
                os.close(writer)
                commands.append(Command((*script(shard), "--turn-fd", str(reader)), [reader]))
            self._turn += 1
            yield commands


def main(grace: str, workers: str, router: str, *shards: str) -> int:
    telemetry.setup("text_generation_launcher", stream=sys.stdout)
    with tempfile.TemporaryDirectory(prefix="tgi-") as run_dir, bind("127.0.0.1", 0) as listener:
        settings = Settings(
            model=ModelFiles(model_id="m", folder="/", weights=[]),
            limits=LIMITS,
            pools=[],
            run_dir=run_dir,
            api_key="the-secret",
            router_workers=int(workers),
            graceful_termination_timeout=float(grace),
        )
        print(f"RUN_DIR {run_dir}", flush=True)
        print(f"PORT {listener.getsockname()[1]}", flush=True)
        try:
            supervise(settings, listener, time.monotonic(), Engine(shards), script(router))
        except StartupError as error:
            print(f"Error: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
