"""How the ranks of one model go in step: the first tells the others what to compute. Knows no request."""

import hashlib
import signal
import socket
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from tgi.attention.base import Segment
from tgi.core.child import Place
from tgi.core.config import ModelFiles, Settings
from tgi.core.errors import StartupError
from tgi.core.messages import FRAME
from tgi.core.plan import Orders
from tgi.kernels.library import DTYPES, library
from tgi.kernels.link import Link
from tgi.parallel import Collective, Group
from tgi.runtime.batch import Batch

if TYPE_CHECKING:
    from tgi.runtime.runner import Runner


def fingerprint(model: ModelFiles) -> bytes:
    """16 bytes that are the same where the files are."""
    paths = [Path(model.folder) / "config.json", *map(Path, model.weights), *map(Path, model.adapter)]
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.digest()


def join(settings: Settings, place: Place) -> Group:
    """This process's place among the ranks. Raises StartupError."""
    if settings.ranks == 1:
        return Group()
    native = library() if settings.device == "cpu" and settings.dtype in DTYPES else None
    if native is not None:
        assert place.memory is not None
        return Group(place.rank, settings.ranks, Link(native, place.memory, place.rank, settings.ranks))
    device = torch.device(settings.device, place.rank)
    fixed = settings.deterministic
    return Group(
        place.rank, settings.ranks, Collective(place.rank, settings.ranks, device, settings.master, fixed=fixed)
    )


class Leader:
    """Rank 0's lines to the others."""

    def __init__(self, lines: Sequence[socket.socket]) -> None:
        self._lines = lines
        self._encoder = msgspec.msgpack.Encoder()

    def wait(self, loaded: bytes) -> None:
        """Until all have loaded what this rank has; ``loaded``: its fingerprint. Raises StartupError if one has
        another. Of a rank that ends, the launcher learns by itself, and it ends this one."""
        for rank, line in enumerate(self._lines, 1):
            while not (theirs := line.recv(len(loaded), socket.MSG_WAITALL)):
                time.sleep(1)
            if theirs != loaded:
                raise StartupError(f"rank {rank} has loaded other weights than rank 0: files were changed meanwhile")

    def send(self, batch: Batch, rows: Sequence[int], first: int) -> None:
        """Let them compute what this rank is about to. ``rows``, ``first``: as in Orders."""
        orders = Orders(
            array("i", batch.token_ids).tobytes(),
            batch.drawn,
            [[(each.start, each.length, bytes(each.blocks)) for each in kind] for kind in batch.segments],
            array("i", rows).tobytes(),
            first,
        )
        self._tell(orders)

    def capture(self) -> None:
        """Let them capture their next graph, as this rank is about to."""
        self._tell(Orders(b"", [], [], b"", 0, captures=True))

    def _tell(self, orders: Orders) -> None:
        body = self._encoder.encode(orders)
        for line in self._lines:
            line.sendall(FRAME.pack(len(body)) + body)


class Follower:
    """Another rank's line to the first."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._decoder = msgspec.msgpack.Decoder(Orders)

    def run(self, runner: "Runner", loaded: bytes, longest_step: float) -> None:
        """Compute what is ordered, until the first rank ends. ``loaded``: fingerprint of this one's weights;
        ``longest_step``: as the Loop's."""
        self._line.sendall(loaded)
        with self._line.makefile("rb") as orders:
            while head := orders.read(FRAME.size):
                body = orders.read(FRAME.unpack(head)[0])
                signal.setitimer(signal.ITIMER_REAL, longest_step)
                self._obey(runner, self._decoder.decode(body))
                signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _obey(runner: "Runner", orders: Orders) -> None:
        if orders.captures:
            runner.capture()
            return
        kinds = [
            [Segment(start, length, array("i", blocks)) for start, length, blocks in kind] for kind in orders.segments
        ]
        positions = [at for each in kinds[0] for at in range(each.start, each.start + each.length)]
        ids = array("i", orders.token_ids).tolist()
        batch = Batch(ids, orders.drawn, positions, kinds, (), [], [], [])
        runner.follow(batch, array("i", orders.rows).tolist(), orders.first)
