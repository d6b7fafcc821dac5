"""Work that several processes do together, as the ranks of one model do; this process is the first of them."""

import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from tests.parity.conftest import load, logits, tokens
from tgi.kernels.library import library
from tgi.kernels.link import Link
from tgi.parallel import Collective, Exchange, Group

T = TypeVar("T")

Work = Callable[[Group, Sequence[socket.socket]], T]
"""(rank, sockets: of rank 0 one to each other rank, of the others one to rank 0)."""


def together(count: int, work: Work[T], *, port: int | None = None, fixed: bool = False) -> T:
    """What ``work`` comes to in rank 0 of so many. ``port``: they talk through torch.distributed, having met there;
    ``fixed``: as Collective says."""
    with ExitStack() as stack:
        # A fork has none of the other threads, and would wait for them.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        memory = os.memfd_create("ranks")
        stack.callback(os.close, memory)
        pairs = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(1, count)]

        def join(rank: int, lines: Sequence[socket.socket]) -> T:
            exchange: Exchange
            if port is None:
                native = library()
                assert native is not None
                exchange = Link(native, memory, rank, count)
            else:
                exchange = Collective(rank, count, torch.device("cpu"), ("127.0.0.1", port), fixed=fixed)
                stack.callback(torch.distributed.destroy_process_group)
            return work(Group(rank, count, exchange), lines)

        others = []
        for rank in range(1, count):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads that others may have left; none of them is used
                pid = os.fork()
            if not pid:
                code = 1
                try:
                    # Else nobody would see the end of the first rank.
                    for number, pair in enumerate(pairs, 1):
                        pair[0].close()
                        if number != rank:
                            pair[1].close()
                    join(rank, [pairs[rank - 1][1]])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            others.append(pid)
            stack.callback(os.waitpid, pid, 0)
            stack.callback(os.kill, pid, signal.SIGKILL)
        for _, theirs in pairs:
            theirs.close()
        return join(0, [ours for ours, _ in pairs])


def meet(group: Group, lines: Sequence[socket.socket]) -> None:
    """Go on when all are here; AssertionError if one isn't, which would be waited for for ever."""
    for line in lines:
        if group.rank:
            line.sendall(b"!")
        else:
            assert line.recv(1) == b"!", "a rank has ended"


def rank_logits(
    folder: Path, count: int, *sequences: torch.Tensor, port: int | None = None, **options: object
) -> torch.Tensor:
    """As ``logits``, by so many ranks. ``options``: as of load."""

    def work(group: Group, lines: Sequence[socket.socket]) -> torch.Tensor:
        model = load(folder, max_total_tokens=64, group=group, **options)
        meet(group, lines)
        group.begin()
        return logits(model, *sequences)

    return together(count, work, port=port)


def same_in_ranks(folder: Path, counts: Sequence[int] = (2, 3, 4)) -> None:
    """4 heads are shared by 3 too, evenly or not."""
    sequences = tokens(30), tokens(11, seed=1)
    alone = logits(load(folder, max_total_tokens=64), *sequences)
    for count in counts:
        try:
            found = rank_logits(folder, count, *sequences)
        except ValueError as error:
            assert count == 3 and "kv heads as one" in str(error)
        else:
            assert (found - alone).abs().max() < 1e-5 * max(1, alone.abs().max())
