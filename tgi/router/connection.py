"""One TCP connection: what it may send as a request's head, and how long it may take over anything. Knows no route."""

import asyncio
import re
import socket
import time
from collections import deque
from email.utils import formatdate
from functools import lru_cache, partial

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

LONGEST_HEAD = 1 << 18
"""Bytes of request line and headers: more would only fill the memory. Give or take one read of the socket."""

HEAD_PATIENCE = 60.0
"""Seconds from the connection, or from a request's first byte, to the end of its head."""

READER_PATIENCE = 120.0
"""Seconds that a client may read nothing of what it was sent, or acknowledge nothing: it holds a place of others."""

GLANCE = 0.5
"""Seconds between looks whether the client is still there, while requests wait behind the one that is answered."""

WRITE = "tgi.write"
"""In a scope's ``state``: sends bytes of an answer that has begun and has no length. It doesn't wait for the client,
and no layer of ASGI sees them; the answer's end is sent in ASGI's own way."""

_ESTABLISHED = 1
"""Of Linux's tcp_states.h: both ends may send."""

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def watch_readers(listener: socket.socket, patience: float = READER_PATIENCE) -> None:
    """Let the kernel end connections, made through ``listener``, whose client reads nothing or is gone without a word.

    On systems without the option they last as long as the client likes.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))
    # Between events, too: while a long answer is made nothing is sent that could go unacknowledged.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(patience))


class Connection(HttpToolsProtocol):
    """Bounds a request's head in size and time, and doesn't hear offers to upgrade: Java's clients offer HTTP/2 at
    first, and httptools, once it has heard that, drops the body.

    Notices that the client leaves also where requests have been sent ahead of answers: uvicorn then stops reading, and
    would tell only the last request.
    """

    patience = HEAD_PATIENCE

    _in_head = _in_body = False
    _head = 0
    """Bytes of the head so far."""
    _timer: asyncio.TimerHandle | None = None
    _glancing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class
        super().connection_made(transport)
        self._unanswered = deque[RequestResponseCycle]()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        for cycle in self._unanswered:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > LONGEST_HEAD and not self.transport.is_closing():
                self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        self._in_head, self._head = True, 0
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._stop_waiting()
        self.server_state.default_headers = _dated(int(time.time()))
        super().on_headers_complete()
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        self._unanswered.append(self.cycle)
        self.scope["state"][WRITE] = partial(_write, self.cycle)
        if self.pipeline and self._glancing is None:
            self._glance()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def _glance(self) -> None:
        self._glancing = None
        if not self.pipeline or self.transport.is_closing():
            return
        if _is_there(self.transport.get_extra_info("socket")):
            self._glancing = self.loop.call_later(GLANCE, self._glance)
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.patience, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._in_head:
            self.transport.write(_LATE)
        self.transport.close()


@lru_cache(1)
def _dated(second: int) -> list[tuple[bytes, bytes]]:
    """The headers of all answers."""
    return [(b"date", formatdate(second, usegmt=True).encode())]


def _write(cycle: RequestResponseCycle, data: bytes) -> None:
    if not cycle.disconnected and not cycle.response_complete:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _is_there(client: socket.socket) -> bool:
    if not hasattr(socket, "TCP_INFO"):
        return True
    state, *_ = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state == _ESTABLISHED
