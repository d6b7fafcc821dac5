"""One HTTP exchange on bare ASGI: a body in, an answer or a stream of events out. Knows no route and no request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from tgi.core.errors import RequestError
from tgi.router.connection import WRITE
from tgi.router.wire.base import Unreadable

KEEP_ALIVE = 15.0
"""Seconds of silence after which a stream says that it lives."""

BODY_PATIENCE = 30.0
"""Seconds for a body to arrive, and one more for each SLOWEST_BODY bytes that the limit allows."""
SLOWEST_BODY = 50_000

_encoder = msgspec.json.Encoder()


def event(value: Any) -> bytes:
    """One server-sent event, framed as TGI frames it."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def named_event(value: msgspec.Struct) -> bytes:
    """The same with a name: the ``type`` that the struct is tagged with."""
    return b"event: " + str(value.__struct_config__.tag).encode() + b"\n" + event(value)


class ErrorStyle(NamedTuple):
    """How a dialect tells of errors."""

    answer: Callable[["Call", RequestError | Unreadable], Coroutine[Any, Any, None]]
    body: Any
    """The JSON type of a RequestError."""
    statuses: Mapping[int, int] = {}
    """The dialect's for TGI's, where they differ."""
    plain: bool = False
    """A body that can't be read is told of in plain text, a key that is missing in no words."""

    def status_of(self, status: int) -> int:
        """For TGI's."""
        return self.statuses.get(status, status)


class Call:
    """What a handler needs of its client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived = time.monotonic()
        self.status = 0
        """Of the answer, once it is out."""
        self.path: dict[str, str] = scope.get("path_params", {})
        """What stands in the path for each ``{name}`` of the route."""
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        self._write: Callable[[bytes], None] = scope["state"][WRITE]
        self._loop = asyncio.get_running_loop()
        self._unsent: list[bytes] = []
        self._spoke = 0.0

    @property
    def answered(self) -> bool:
        """Whether the status line is out: after that an error can only be an event."""
        return self.status > 0

    def header(self, name: bytes) -> bytes:
        """By its lower-case name; empty if the client didn't send it."""
        return self._headers.get(name, b"")

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises Unreadable: 413 before more than ``limit`` bytes are held, 408 if it's slow."""
        too_large = Unreadable(413, "Failed to buffer the request body: length limit exceeded")
        declared = self.header(b"content-length")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_PATIENCE + limit / SLOWEST_BODY):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError("the client left before its request was read")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Unreadable(408, "The request's body took too long to arrive") from None
        return bytes(body)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work``, which is cancelled as soon as the client goes away. The body must have been read."""
        tasks = {asyncio.ensure_future(work), gone := asyncio.ensure_future(self._disconnect())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done - {gone}:
            task.result()

    async def answer(
        self, status: int, content: bytes = b"", kind: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer at once; ``kind`` is its content type."""
        fields = {"content-length": str(len(content))} | ({"content-type": kind} if kind else {}) | dict(headers or {})
        if status in (408, 413):
            fields["connection"] = "close"  # nobody reads the rest of the body
        await self._start(status, fields)
        await self._send({"type": "http.response.body", "body": content})

    async def json(self, value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        await self.answer(status, _encoder.encode(value), "application/json", headers)

    @asynccontextmanager
    async def stream(
        self, headers: Mapping[str, str], fail: Callable[[Exception], bytes]
    ) -> AsyncIterator[Callable[[bytes], None]]:
        """``async with call.stream(…) as say: say(event)``: server-sent events, comments when none come, ``fail``'s
        events for an error, and the end.

        ``say`` never waits. What a client doesn't read in time is kept for it: at most its whole answer, and for no
        longer than the kernel lets a connection go unread.
        """
        fields = {"content-type": "text/event-stream", "cache-control": "no-cache"} | dict(headers)
        await self._start(200, fields)
        heartbeat = asyncio.ensure_future(self._heartbeat())
        try:
            yield self._say
        except Exception as error:
            self._say(fail(error))
        finally:
            heartbeat.cancel()
        last, self._unsent = b"".join(self._unsent), []
        await self._send({"type": "http.response.body", "body": last})

    def _say(self, data: bytes) -> None:
        """All that is said before the event loop comes round again is sent at once."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(data)

    def _flush(self) -> None:
        if self._unsent:
            self._spoke = time.monotonic()
            self._write(b"".join(self._unsent))
            self._unsent = []

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _heartbeat(self) -> None:
        self._spoke = time.monotonic()
        while True:
            await asyncio.sleep(self._spoke + KEEP_ALIVE - time.monotonic())
            if time.monotonic() - self._spoke >= KEEP_ALIVE:
                self._spoke = time.monotonic()
                self._say(b":\n\n")

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
