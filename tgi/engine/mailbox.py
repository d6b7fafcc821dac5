"""The engine's end of the Unix socket: frames in, frames out, without threads and without blocking the step loop.

Knows connections and messages, not what they mean.
"""

import contextlib
import selectors
import socket
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tgi.core.messages import FRAME, MAX_FRAME, Hello, ToEngine, ToRouter, frame

_READ = 1 << 18


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)


class Gone:
    """A router closed its connection; nobody waits for its requests any more."""


class Mailbox:
    """Listens for routers. A connection is named by a number that is never used again."""

    def __init__(self, path: Path, hello: Hello) -> None:
        """Bind ``path``, for this user alone. ``hello``: what every router is told first."""
        self._hello = frame(hello)
        if path.is_socket():  # of an engine that was killed: there is one at a time
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)  # before anybody can connect
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._woken)
        self._connections: dict[int, _Connection] = {}
        self._next = 0
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    @property
    def oldest(self) -> int:
        """The connection that has been open longest; -1 if there is none."""
        return next(iter(self._connections), -1)

    def poll(self, *, wait: bool) -> Iterator[tuple[int, ToEngine | Gone]]:
        """Messages that have arrived; with ``wait``, sleeps until something happens."""
        for key, events in self._selector.select(None if wait else 0):
            if key.data is None:
                self._accept()
                continue
            if key.data is self._woken:
                self._woken.recv(_READ)
                continue
            name: int = key.data
            alive = self._flush(name) if events & selectors.EVENT_WRITE else True
            if alive and events & selectors.EVENT_READ:
                alive = yield from self._read(name)
            if not alive:
                self._close(name)
                yield name, Gone()

    def wake(self) -> None:
        """End a ``poll`` that waits. The one method that other threads may call."""
        with contextlib.suppress(BlockingIOError):  # it is being woken already
            self._waker.send(b"!")

    def send(self, name: int, message: ToRouter) -> None:
        """Queue a message and send what the socket takes now. A closed connection is noticed by ``poll``."""
        if (connection := self._connections.get(name)) is not None:
            connection.outbox += frame(message)
            self._flush(name)

    def close(self) -> None:
        for name in list(self._connections):
            self._close(name)
        self._listener.close()
        self._waker.close()
        self._woken.close()
        self._selector.close()

    def _accept(self) -> None:
        connected, _ = self._listener.accept()
        connected.setblocking(False)
        name, self._next = self._next, self._next + 1
        self._connections[name] = _Connection(connected, outbox=bytearray(self._hello))
        self._selector.register(connected, selectors.EVENT_READ, name)
        self._flush(name)

    def _read(self, name: int) -> Generator[tuple[int, ToEngine | Gone], None, bool]:
        """Messages of one connection; returns whether it is still open."""
        connection = self._connections[name]
        inbox = connection.inbox
        try:
            data = connection.socket.recv(_READ)
        except BlockingIOError:
            return True
        except OSError:
            return False
        inbox += data
        at = 0
        while len(inbox) - at >= FRAME.size:
            (length,) = FRAME.unpack_from(inbox, at)
            if length > MAX_FRAME:
                return False
            end = at + FRAME.size + length
            if end > len(inbox):
                break
            try:
                message = self._decoder.decode(memoryview(inbox)[at + FRAME.size : end])
            except msgspec.MsgspecError:
                return False  # not a router of this version
            yield name, message
            at = end
        del inbox[:at]
        return bool(data)

    def _flush(self, name: int) -> bool:
        connection = self._connections[name]
        try:
            while connection.outbox:
                del connection.outbox[: connection.socket.send(connection.outbox)]
        except BlockingIOError:
            pass
        except OSError:
            connection.outbox.clear()
            return False
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outbox else 0)
        if self._selector.get_key(connection.socket).events != wanted:
            self._selector.modify(connection.socket, wanted, name)
        return True

    def _close(self, name: int) -> None:
        connection = self._connections.pop(name)
        self._selector.unregister(connection.socket)
        connection.socket.close()
