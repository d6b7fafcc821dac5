"""What it costs to hold a model in several processes of a CPU, with one thread each.

    python benchmarks/tp.py --model FOLDER --out FOLDER

Sums over ranks: our own in shared memory, and gloo's, microseconds by the rows of 576 numbers. Then decoding steps of
1 and of more ranks in turns: tokens per second; the share of a step in which the first rank exchanges rows or waits for
others to come to that; and the share that as many sums take where nobody waits. Medians of rounds. Writes
FOLDER/tp.jsonl and .md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import distributed

from engine import middle, run
from machine import Watch
from records import Journal, Record
from tgi.core.child import Place
from tgi.core.config import Settings
from tgi.kernels.library import library
from tgi.kernels.link import Link
from tgi.launcher import flags
from tgi.launcher.launch import engine_settings
from tgi.launcher.shards import shards
from tgi.parallel import Collective, Exchange
from tgi.runtime.ranks import Leader, fingerprint, join
from tgi.runtime.runner import Runner

WIDTH = 576
ROWS = (1, 8, 64, 512)
PROMPT, NEW = 64, 64


def sums(ranks: int) -> Iterator[Record]:
    """Microseconds that a sum over the ranks takes, one behind the other."""
    memory = os.memfd_create("sums")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    native = library()
    assert native is not None
    others = []
    rank = 0
    for number in range(1, ranks):
        pid = os.fork()
        if not pid:
            rank = number
            break
        others.append(pid)
    ways: dict[str, Callable[[], Exchange]] = {
        "own": lambda: Link(native, memory, rank, ranks),
        "gloo": lambda: Collective(rank, ranks, torch.device("cpu"), ("127.0.0.1", port)),
    }
    for name, connect in ways.items():
        exchange = connect()
        for rows in ROWS:
            x = torch.zeros(rows, WIDTH)
            times = []
            for _ in range(9):
                exchange.begin()
                exchange.total(x)
                begin = time.perf_counter()
                for _ in range(100):
                    exchange.total(x)
                times.append(1e4 * (time.perf_counter() - begin))
            if not rank:
                yield {"way": name, "ranks": ranks, "rows": rows, "us": statistics.median(times)}
    distributed.destroy_process_group()
    if rank:
        os._exit(0)
    for pid in others:
        os.waitpid(pid, 0)


@contextmanager
def loaded(model: str, options: Sequence[str], ranks: int, requests: int) -> Iterator[tuple[Runner, Settings]]:
    """The first of so many ranks; the others are processes as the launcher starts them."""
    context = PROMPT + NEW
    bounds = f"--max-total-tokens {context} --max-batch-total-tokens {max(requests * context, 512)}"
    line = ["--model-id", model, "--num-shard", str(ranks), *bounds.split(), *options]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = engine_settings(flags.check(flags.parse([*line, "--max-batch-prefill-tokens", "512"])[0]), folder)
        place = Place()
        if ranks > 1:
            path = Path(folder) / "settings.json"
            path.write_bytes(msgspec.json.encode(settings))
            status = stack.enter_context(Path(os.devnull).open("w")).fileno()
            first, *commands = stack.enter_context(shards(ranks)())
            memory, *lines = first.inherited
            place = Place(lines=[os.dup(line) for line in lines], memory=memory)
            for command in commands:
                process = subprocess.Popen(
                    [*command.words, "--settings", str(path), "--status-fd", str(status)],
                    pass_fds=[status, *command.inherited],
                )
                stack.callback(process.wait)
                stack.callback(process.kill)
        runner = Runner.load(settings, lambda done, total: None, join(settings, place))
        if place.lines:
            runner.leader = Leader([stack.enter_context(socket.socket(fileno=line)) for line in place.lines])
            runner.leader.wait(fingerprint(settings.model))
        yield runner, settings


def steps(model: str, options: Sequence[str], ranks: int, crowds: Sequence[int], write: Callable[..., None]) -> None:
    with loaded(model, options, ranks, max(crowds)) as (runner, settings):
        for requests in crowds:
            run(runner, settings, requests, PROMPT, 4)  # warms up
            watch, before = Watch(os.getsid(0)), exchanges(runner)
            rate, found = run(runner, settings, requests, PROMPT, NEW)
            step = middle(found)
            share = step.kernels.get("exchange", 0.0) / step.whole
            each = (exchanges(runner) - before) / (NEW + requests * PROMPT / 512)  # the prompts' steps are few
            figures = {"tokens_s": rate, "step_ms": 1e3 * step.whole, "exchange": share, "sums": each}
            write("steps", ranks=ranks, requests=requests, **figures, **watch.foreign())


def exchanges(runner: Runner) -> int:
    """That there have been so far."""
    link = runner._group.exchange
    return link._struct.turn[0].value if isinstance(link, Link) else 0


def table(records: Sequence[Record]) -> str:
    """Medians of all rounds."""

    def cell(kind: str, figure: str, **keys: object) -> float:
        return statistics.median(
            each[figure] for each in records if each["kind"] == kind and all(each[k] == v for k, v in keys.items())
        )

    lines = [
        f"| a sum over 2 ranks, µs | {' | '.join(f'{rows} rows' for rows in ROWS)} |",
        "|---|" + "---|" * len(ROWS),
    ]
    for way in ("own", "gloo"):
        times = [f"{cell('sums', 'us', way=way, rows=rows):.1f}" for rows in ROWS]
        lines.append(f"| {way} | {' | '.join(times)} |")
    lines += ["", "| requests | ranks | tokens/s | step, ms | exchanging and waiting | exchanging |"]
    lines += ["|---|---|---|---|---|---|"]
    mine = [each for each in records if each["kind"] == "steps"]
    for requests in dict.fromkeys(each["requests"] for each in mine):
        for ranks in dict.fromkeys(each["ranks"] for each in mine):
            of = partial(cell, "steps", requests=requests, ranks=ranks)
            alone = 1e-3 * of("sums") * cell("sums", "us", way="own", rows=requests) / of("step_ms")
            lines.append(
                f"| {requests} | {ranks} | {of('tokens_s'):.1f} | {of('step_ms'):.2f} | {of('exchange'):.1%} "
                f"| {alone:.1%} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=flags.DEFAULT_MODEL)
    parser.add_argument("--options", default="", help="more of the launcher's options, in one string")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "sums":
        for record in sums(2):
            print(json.dumps(record), flush=True)
        return
    journal = Journal(arguments.out / "tp.jsonl")
    for _ in range(arguments.rounds):
        # In a process of its own: it forks.
        command = [sys.executable, __file__, "--part", "sums", "--out", str(arguments.out)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        for line in done.stdout.splitlines():
            journal.write("sums", **json.loads(line))
        for ranks in arguments.ranks:
            steps(arguments.model, arguments.options.split(), ranks, arguments.requests, journal.write)
    told = table([*journal.data.of("sums"), *journal.data.of("steps")])
    (arguments.out / "tp.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
