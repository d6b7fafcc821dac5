"""An engine without a model: listens on a Unix socket, speaks the real messages, answers what a test tells it to."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from tgi.core.messages import (
    FRAME,
    Cancel,
    Delta,
    Fault,
    FinishReason,
    Hello,
    Ping,
    Pong,
    PromptToken,
    Step,
    StepStats,
    Submit,
    ToEngine,
    Token,
    frame,
)


def echo(submit: Submit) -> list[int]:
    """The default reply: the prompt, over and over."""
    prompt = submit.token_ids[: submit.prompt_length]
    return list(itertools.islice(itertools.cycle(prompt), submit.max_new_tokens))


@dataclass
class _Running:
    submit: Submit
    reply: Sequence[int]
    known: int
    fresh: bool = True
    """No step has been about it yet."""
    started: float = field(default_factory=time.monotonic)


class FakeEngine:
    """``with FakeEngine(socket, reply=lambda submit: ids) as engine: ...`` serves from a thread of its own.

    Each step sends every running request its next token. A request finishes as in the real engine: "length" at
    max_new_tokens, "eos_token" at a stop token; a reply that runs out ends with "eos_token", too. The n-th token has
    the log-probability -n/8, its alternatives and the prompt's tokens -1, -2, ….

    reply: the ids that a request will get, at least one, or a message to fault it with.
    delay: seconds between steps.
    per_step: tokens that a step adds to a request.
    die_after: drop all connections and stop listening after so many steps; ``start`` brings the engine back.
    poison: a prompt with this id ends the engine instead of a step; it comes back by itself.
    pong: whether pings are answered.
    cached: prompt tokens that are said to have been in the cache.
    ``pause`` and ``resume`` hold the steps (pings too), so that a test can look at what waits.
    ``received`` is all that arrived, in order; ``victims`` are the requests that ran when the poison worked, each time.
    """

    def __init__(
        self,
        socket: Path,
        reply: Callable[[Submit], Sequence[int] | str] = echo,
        *,
        delay: float = 0.0,
        per_step: int = 1,
        die_after: int | None = None,
        poison: int | None = None,
        pong: bool = True,
        cached: int = 0,
    ) -> None:
        self.received: list[ToEngine] = []
        self.victims: list[list[int]] = []
        self.connections = 0
        self._socket = socket
        self._reply = reply
        self._delay = delay
        self._per_step = per_step
        self._die_after = die_after
        self._poison = poison
        self._pong = pong
        self._cached = cached
        self._epoch = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-engine", daemon=True)
        self._server: asyncio.Server | None = None
        self._peers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._running: dict[asyncio.StreamWriter, dict[int, _Running]] = {}
        self._going = asyncio.Event()
        self._going.set()

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.received if isinstance(message, Submit)]

    @property
    def cancels(self) -> list[int]:
        return [message.id for message in self.received if isinstance(message, Cancel)]

    def start(self) -> None:
        """Listen; also again after ``die``."""
        self._run(self._listen())

    def die(self) -> None:
        """As a crash looks from outside: connections drop, nobody listens."""
        self._run(self._drop())

    def fault(self, message: str) -> None:
        """End all that has been submitted."""
        self.send_raw(frame(Step(faults=[Fault(submit.id, message) for submit in self.submits])))

    def send_raw(self, data: bytes) -> None:
        """Send bytes of the test's own to every connection."""

        async def send() -> None:
            for writer in self._peers:
                writer.write(data)

        self._run(send())

    def pause(self) -> None:
        self._run(self._hold(True))

    def resume(self) -> None:
        self._run(self._hold(False))

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _hold(self, held: bool) -> None:
        if held:
            self._going.clear()
        else:
            self._going.set()

    async def _listen(self) -> None:
        self._epoch += 1
        self._server = await asyncio.start_unix_server(self._serve, self._socket)

    async def _drop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self._socket.unlink(missing_ok=True)
        peers, self._peers = self._peers, {}
        self._running.clear()
        for writer, task in peers.items():
            if task is not asyncio.current_task():
                task.cancel()
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One router's connection: read in this task, step in another."""
        self.connections += 1
        arrived = asyncio.Event()
        running = self._running[writer] = dict[int, _Running]()
        pings: list[int] = []
        self._peers[writer] = asyncio.create_task(self._step(writer, running, pings, arrived))
        writer.write(frame(Hello(self._epoch)))
        decoder = msgspec.msgpack.Decoder(ToEngine)
        try:
            while True:
                (length,) = FRAME.unpack(await reader.readexactly(FRAME.size))
                message = decoder.decode(await reader.readexactly(length))
                self.received.append(message)
                match message:
                    case Submit():
                        reply = self._reply(message)
                        if isinstance(reply, str):
                            writer.write(frame(Step(faults=[Fault(message.id, reply)])))
                        else:
                            known = len(message.token_ids) - message.prompt_length
                            running[message.id] = _Running(message, reply, known)
                    case Cancel():
                        running.pop(message.id, None)
                    case Ping():
                        pings.append(message.nonce)
                arrived.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            self._running.pop(writer, None)
            if task := self._peers.pop(writer, None):
                task.cancel()
            writer.close()

    async def _step(
        self, writer: asyncio.StreamWriter, running: dict[int, _Running], pings: list[int], arrived: asyncio.Event
    ) -> None:
        while True:
            while not running and not pings:
                arrived.clear()
                await arrived.wait()
            await self._going.wait()
            await asyncio.sleep(self._delay)
            while pings:
                nonce = pings.pop()
                if self._pong:
                    writer.write(frame(Pong(nonce)))
            if not running:
                continue
            if any(self._poison in request.submit.token_ids for request in running.values()):
                self.victims.append([id for each in self._running.values() for id in each])
                await self._drop()
                await self._listen()
                return
            fresh = sum(request.fresh for request in running.values())
            deltas = [self._advance(request) for request in running.values()]
            for delta in deltas:
                if delta.finish is not None:
                    del running[delta.id]
            stats = StepStats(
                prefill_rows=fresh, decode_rows=len(deltas) - fresh, running=len(running), admitted=fresh, planning=1e-6
            )
            writer.write(frame(Step(deltas=deltas, stats=stats)))
            if self._die_after is not None:
                self._die_after -= 1
                if self._die_after <= 0:
                    self._die_after = None
                    await writer.drain()
                    await self._drop()
                    return

    def _advance(self, request: _Running) -> Delta:
        submit, index = request.submit, request.known
        request.fresh = False
        tokens: list[Token] = []
        finish: FinishReason | None = None
        if submit.max_new_tokens == 0:
            finish = "length"
        while finish is None and len(tokens) < self._per_step:
            id = request.reply[request.known]
            request.known += 1
            tokens.append(Token(id, -request.known / 8, self._top(submit, id)))
            if request.known >= submit.max_new_tokens:
                finish = "length"
            elif id in submit.stop_token_ids or request.known >= len(request.reply):
                finish = "eos_token"
        prompt = submit.prompt_length if submit.prompt_logprobs and index == 0 else 0
        return Delta(
            id=submit.id,
            index=index,
            tokens=tokens,
            finish=finish,
            started=request.started,
            prompt=[
                PromptToken(-float(n), self._top(submit, submit.token_ids[n])) for n in range(1 + submit.scored, prompt)
            ],
            cached=self._cached,
            embedding=[float(id) for id in submit.token_ids] if submit.pooling else [],
        )

    @staticmethod
    def _top(submit: Submit, id: int) -> list[tuple[int, float]]:
        return [(id + n, -1.0 - n) for n in range(submit.sampling.top_n_tokens)]
