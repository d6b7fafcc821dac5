"""Takes connections in turn with other routers that accept from the same socket."""

import asyncio
import socket
from collections.abc import Callable

from tgi.core.board import Board

TURN = 0.001
"""Seconds that a router leaves a connection to others that have fewer."""
_PASSES = 10
"""How often it does so: those may be busy."""


class Acceptor:
    """Who has most connections waits for the others, but not for long.

    Without turns the first router to wake up takes all that come at once: 58 of 64 with three routers; so it is 22 at
    most. A socket for each router (SO_REUSEPORT) shares out by chance, 14 to 28, and what is queued for one that has
    ended waits for the next in its place, where here the others serve it.
    """

    def __init__(
        self, listener: socket.socket, board: Board, protocol: Callable[[], asyncio.Protocol], count: Callable[[], int]
    ) -> None:
        """``count``: how many connections are open."""
        self._listener = listener
        self._board = board
        self._protocol = protocol
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._arriving = set[asyncio.Task[object]]()
        self._turn: asyncio.TimerHandle | None = None
        self._passes = 0
        listener.setblocking(False)
        self._note()
        self._listen()

    async def close(self) -> None:
        """Take no more. Returns when the server knows of all that were taken."""
        self._board.connections.own[0] = 0
        if self._turn is None:
            self._loop.remove_reader(self._listener)
        else:
            self._turn.cancel()
        await asyncio.gather(*self._arriving, return_exceptions=True)

    def _listen(self) -> None:
        self._turn = None
        self._loop.add_reader(self._listener, self._look)

    def _look(self) -> None:
        """Somebody wants to connect."""
        self._note()
        cells = self._board.connections
        if cells.own[0] > min(row[0] for row in cells.all if row[0]) and self._passes < _PASSES:
            self._passes += 1
            self._loop.remove_reader(self._listener)
            self._turn = self._loop.call_later(TURN, self._listen)
        else:
            self._passes = 0
            self._take()

    def _take(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # another router was faster, or the client is gone
            return
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)
        self._note()

    def _note(self) -> None:
        self._board.connections.own[0] = 1 + self._count() + len(self._arriving)
