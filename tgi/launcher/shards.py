"""The processes that hold a model together: how they are started, and by what they reach each other."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tgi.launcher.supervisor import Command, Group


def shards(ranks: int, words: Sequence[str] = (sys.executable, "-m", "tgi.engine.process")) -> Group:
    """An engine of so many processes. What they share has no name in the file system, and so is gone when they are."""
    return lambda: _commands(ranks, words)


@contextmanager
def _commands(ranks: int, words: Sequence[str]) -> Iterator[list[Command]]:
    if ranks == 1:
        yield [Command(words)]
        return
    with contextlib.ExitStack() as stack:
        memory = os.memfd_create("tgi-ranks")
        stack.callback(os.close, memory)
        pairs = [socket.socketpair() for _ in range(1, ranks)]
        for line in (line for pair in pairs for line in pair):
            stack.enter_context(line)
        lines = [[first.fileno() for first, _ in pairs], *([other.fileno()] for _, other in pairs)]
        threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
        yield [
            Command(
                [*words, "--rank", str(rank), "--memory-fd", str(memory), "--line-fds", *map(str, own)],
                [memory, *own],
                {"OMP_NUM_THREADS": str(threads)},
            )
            for rank, own in enumerate(lines)
        ]
