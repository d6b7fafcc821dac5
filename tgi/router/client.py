"""The router's end of the engine's socket, and the truth about every request. Knows token ids, never text.

An engine may be lost at any time: what it had is handed to the next one and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from tgi.core.board import Board
from tgi.core.errors import CRASH, GENERATION, UNAVAILABLE, RequestError
from tgi.core.messages import (
    FRAME,
    MAX_FRAME,
    Cancel,
    Delta,
    Hello,
    Implementation,
    Ping,
    Pong,
    Pooling,
    PromptToken,
    Sampling,
    Step,
    StepStats,
    Submit,
    ToEngine,
    ToRouter,
    frame,
)

log = logging.getLogger(__name__)

RETRY = 0.1
"""Seconds between attempts to connect: the engine may load for minutes, and a refused Unix socket costs nothing."""

LONGEST_ABSENCE = 600.0
"""Seconds that requests wait for the next engine: the largest models take minutes to load."""

CHUNK = 1 << 18
"""Bytes read at once; in one wake-up all the frames that they hold."""


class Ticket:
    """One request: what was asked (``submit``) and what has come of it (``prompt``, ``output_ids``).

    ``follow`` hands on the engine's deltas. Leaving ``with ticket:`` cancels what is not finished. Times are
    ``time.monotonic()`` seconds, 0.0 until they happen.
    """

    def __init__(self, submit: Submit, on_cancel: Callable[[Ticket], None]) -> None:
        self.submit = submit
        self.prompt: list[PromptToken] = []
        """Of its tokens but the first, if ``submit.prompt_logprobs`` asks for them."""
        self.output_ids: list[int] = []
        self.cached = 0
        """Prompt tokens that the prefix cache had when an engine first scheduled it."""
        self.sent = False
        """Whether the engine has it."""
        self.submitted = submit.arrived
        self.started = 0.0
        """When an engine first scheduled it."""
        self.first_token = 0.0
        self.last_token = 0.0
        self.finished = 0.0
        self._on_cancel = on_cancel
        self._losses = 0
        """Engines in a row that were lost with it and before anything came."""
        self._known_at_loss = -1
        self._early: deque[Delta] = deque()
        """What came before anybody followed: at most max_new_tokens deltas."""
        self._hear: Callable[[Delta], None] = self._early.append
        self._error: Exception | None = None
        self._follower: asyncio.Future[None] | None = None

    async def follow(self, hear: Callable[[Delta], None]) -> None:
        """Hand on the engine's deltas in order, each token once, until the request has ended.

        ``hear`` is called while the engine's message is being read, without a switch of tasks for each token; it must
        not take long, and what it raises ends the request and is raised here. Returns behind the delta with ``finish``,
        or when the ticket is cancelled; a fault, or the lack of an engine, raises RequestError.
        """
        while self._early:
            hear(self._early.popleft())
        self._hear = hear
        if not self.finished:
            self._follower = asyncio.get_running_loop().create_future()
            await self._follower
        if self._error is not None:
            raise self._error

    def apply(self, delta: Delta, now: float) -> None:
        """Add what is new ``now``. A delta seen before changes nothing; one that skips tokens raises RequestError."""
        known = len(self.output_ids)
        if self.finished or delta.index < known:
            return
        if delta.index > known:
            raise RequestError(GENERATION, f"Server error: tokens {known} to {delta.index - 1} never arrived")
        if not self.started:
            self.started, self.cached = delta.started, delta.cached
        if delta.prompt:
            self.prompt += delta.prompt
        if delta.tokens:
            for token in delta.tokens:
                self.output_ids.append(token.id)
            if not self.first_token:
                self.first_token = now
            self.last_token = now
        if delta.finish is not None:
            self.finished = now
        self._hear(delta)
        if self.finished:
            self._wake()

    @property
    def rest(self) -> Submit:
        """What an engine must be told to go on where it is."""
        ids = self.submit.token_ids + self.output_ids
        return msgspec.structs.replace(self.submit, token_ids=ids, scored=len(self.prompt))

    @property
    def suspect(self) -> bool:
        """Whether engines were lost with it twice or more, without anything having come since the first time."""
        return self._losses > 1 and self._known == self._known_at_loss

    def lose(self) -> None:
        """The engine that had it is gone."""
        self._losses = self._losses + 1 if self._known == self._known_at_loss else 1
        self._known_at_loss = self._known
        self.sent = False

    @property
    def _known(self) -> int:
        return len(self.prompt) + len(self.output_ids)

    def fail(self, error: Exception) -> None:
        """End with an error, behind the deltas that have arrived."""
        self._error = self._error or error
        self.finished = self.finished or time.monotonic()
        self._wake()

    def cancel(self) -> None:
        """Tell the engine to stop, and end. Does nothing to a ticket that has ended."""
        if not self.finished:
            self.finished = time.monotonic()
            self._early.clear()
            self._wake()
            self._on_cancel(self)

    def _wake(self) -> None:
        if self._follower is not None and not self._follower.done():
            self._follower.set_result(None)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


@dataclass(frozen=True, slots=True)
class _Ping:
    """A question to the step loop that is under way."""

    nonce: int
    answer: asyncio.Future[bool]
    """False if the engine is lost meanwhile."""
    sent: float


class Observer(Protocol):
    """Who is told what the engine does."""

    def stepped(self, stats: StepStats) -> None:
        """It has done a step."""

    def spoke(self, tokens: int, requests: int) -> None:
        """So many requests got so many tokens each in one step."""

    def waited(self, seconds: float, requests: int) -> None:
        """So long after their last tokens so many requests got more."""

    def broke(self, epoch: int, *, prefills: bool) -> None:
        """It was lost in the middle of its work, which was the prompt of a request, or only tokens."""

    def restarted(self, epoch: int) -> None:
        """There is another than before."""


class EngineClient:
    """One router's connection to the engine, for all its requests. Everything runs on one event loop.

    A request that was under way at two losses in a row, and got nothing in between, is a suspect. While there are
    suspects they run one at a time, and nothing beside them. One that gets on is as good as any other; one with which
    the engine is lost once more ends with an error. Routers with suspects take turns, and the others wait.
    """

    def __init__(self, socket: Path, observer: Observer, longest_step: float, board: Board | None = None) -> None:
        """``longest_step``: seconds that the engine may be silent."""
        self._socket = socket
        self._longest_step = longest_step
        self._observer = observer
        self._board = board or Board()
        self._ids = itertools.count(1)
        self._nonces = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        """Those that are open, in order of arrival."""
        self._suspects: list[Ticket] = []
        """The first is the one that runs, or that will when the engine has let go of the one before."""
        self._letting_go = 0
        """Nonce of the ping by which the engine says that it has; 0: nobody waits for that."""
        self._turn: asyncio.TimerHandle | None = None
        """When to look whether other routers still have suspects; None: nobody waits for that."""
        self._writer: asyncio.StreamWriter | None = None
        self._epoch: int | None = None
        """Of the last engine."""
        self._lost = 0.0
        self._admitting = asyncio.Event()
        """Set while requests are taken: there is an engine, or was one and the next will come."""
        self._draining = False
        self.connected = False
        """Whether the engine has loaded and works."""
        self.implementation: Implementation | None = None
        """What serves the model; None while the engine is not there."""
        self._ping: _Ping | None = None

    async def run(self) -> None:
        """Keep connected until cancelled. Then every open ticket ends with an error."""
        try:
            while True:
                await self._serve(*await self._connect())
                await asyncio.sleep(RETRY)
        finally:
            self._admitting.clear()
            self._give_up(_stopped("the router is stopping"))

    async def admits(self, timeout: float) -> bool:
        """Whether requests can be submitted. Waits up to ``timeout`` seconds for the first engine."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._admitting.wait()
        return self._admitting.is_set()

    def drain(self) -> None:
        """The server ends: what is open may go on, but only with the engine that is there."""
        self._draining = True
        self._admitting.set()
        if not self.connected:
            self._give_up(_stopped("the server is stopping"))

    async def healthy(self, timeout: float = 5.0) -> bool:
        """Whether the engine's step loop lives: it answers a ping within ``timeout`` seconds, or the ping has not been
        waiting for longer than a step may take. Calls made while a ping is under way wait for that one."""
        if not self.connected:
            return False
        if self._ping is None:
            self._ping = _Ping(next(self._nonces), asyncio.get_running_loop().create_future(), time.monotonic())
            self._send(Ping(self._ping.nonce))
        ping = self._ping
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(ping.answer)
        except TimeoutError:
            return time.monotonic() - ping.sent < self._longest_step

    @property
    def queued(self) -> int:
        """Requests that no engine has begun, and those that wait for the next one."""
        return sum(not (ticket.sent and ticket.started) for ticket in self._tickets.values())

    @property
    def queued_anywhere(self) -> int:
        """Those of all routers."""
        self._board.queued.own[0] = self.queued
        return self._board.queued.sums()[0]

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    def submit(
        self,
        *,
        token_ids: list[int],
        max_new_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        prompt_logprobs: bool = False,
        cache_salt: bytes = b"",
        priority: int = 0,
        pooling: Pooling | None = None,
    ) -> Ticket:
        """Hand a request to the engine, or to the next one. Raises RequestError if there will be none."""
        if not self.connected and (self._draining or not self._admitting.is_set()):
            raise RequestError(GENERATION, "Server error: the engine is not running")
        submit = Submit(
            id=next(self._ids),
            token_ids=token_ids,
            prompt_length=len(token_ids),
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            sampling=sampling,
            arrived=time.monotonic(),
            prompt_logprobs=prompt_logprobs,
            cache_salt=cache_salt,
            priority=priority,
            pooling=pooling,
        )
        ticket = self._tickets[submit.id] = Ticket(submit, self._cancel)
        if self.connected and not self._suspects and self._turn is None:
            self._hand_over(ticket, submit)
        self._note()
        return ticket

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next engine's. Requests don't wait for it for ever."""
        deadline = time.monotonic() + LONGEST_ABSENCE
        while True:
            try:
                return await asyncio.open_unix_connection(self._socket)
            except OSError:
                if time.monotonic() > deadline:
                    self._admitting.clear()
                    self._give_up(RequestError(UNAVAILABLE))
                await asyncio.sleep(RETRY)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        self._writer = writer
        reason = "it closed the connection"
        try:
            with contextlib.suppress(OSError):
                await self._read(reader)
        except (msgspec.MsgspecError, _ProtocolError) as error:
            reason = str(error)
        finally:
            self._writer, self.connected, self.implementation = None, False, None
            self._answer_ping(False)
            writer.close()
        self._lose(reason)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Take messages until the engine closes the connection."""
        decoder = msgspec.msgpack.Decoder(ToRouter)
        received = bytearray()
        while chunk := await reader.read(CHUNK):
            received += chunk
            for body in _take_frames(received):
                self._take(decoder.decode(body))

    def _take(self, message: ToRouter) -> None:
        match message:
            case Hello():
                self._meet(message)
            case _ if not self.connected:
                raise _ProtocolError(f"it began with {type(message).__name__} instead of Hello")
            case Step():
                self._apply(message.deltas)
                for fault in message.faults:
                    if ticket := self._tickets.pop(fault.id, None):
                        ticket.fail(RequestError(GENERATION, f"Server error: {fault.message}"))
                if self._suspects:
                    self._review()
                self._note()
                if message.stats is not None:
                    self._observer.stepped(message.stats)
            case Pong():
                if self._ping is not None and self._ping.nonce == message.nonce:
                    self._answer_ping(True)
                elif message.nonce == self._letting_go:
                    self._hand_over_next()

    def _meet(self, hello: Hello) -> None:
        """Let the engine have what is open."""
        if self._epoch not in (None, hello.epoch):
            self._observer.restarted(hello.epoch)
            log.info("another engine after %.1f s: %d requests go on", time.monotonic() - self._lost, self.open)
        self._epoch, self.implementation, self.connected = hello.epoch, hello.implementation, True
        self._admitting.set()
        self._hand_over_next()

    def _apply(self, deltas: Sequence[Delta]) -> None:
        """One step's. What is to be observed of each is mostly the same for all, and is counted first."""
        now = time.monotonic()
        grown, spoke = Counter[int](), Counter[float]()
        for delta in deltas:
            if (ticket := self._tickets.get(delta.id)) is None:
                continue  # cancelled while the delta was on its way
            before = ticket.last_token
            try:
                ticket.apply(delta, now)
            except Exception as error:
                ticket.fail(error)
                self._cancel(ticket)
            if ticket.last_token != before:
                grown[len(delta.tokens)] += 1
                spoke[before] += 1
            if ticket.finished:
                self._tickets.pop(delta.id, None)
        for tokens, requests in grown.items():
            self._observer.spoke(tokens, requests)
        del spoke[0.0]  # the first tokens of theirs
        for moment, requests in spoke.items():
            self._observer.waited(now - moment, requests)

    def _hand_over_next(self) -> None:
        """What waits: the first suspect, or without suspects everybody; or nobody, if it is another router's turn."""
        self._letting_go = 0
        self._board.suspects.own[0] = len(self._suspects)
        self._stop_waiting()
        if self._others_first:
            self._turn = asyncio.get_running_loop().call_later(RETRY, self._hand_over_next)
            return
        for ticket in self._suspects[:1] or list(self._tickets.values()):
            if not ticket.sent:
                self._hand_over(ticket, ticket.rest)

    def _stop_waiting(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    @property
    def _others_first(self) -> bool:
        """Whether suspects of another router are to run alone before anything of this one."""
        rows, index = self._board.suspects.all, self._board.index
        others = rows[:index] if self._suspects else (*rows[:index], *rows[index + 1 :])
        return any(row[0] for row in others)

    def _note(self) -> None:
        """Tell the other routers how many requests wait."""
        if self._board.shared:
            self._board.queued.own[0] = self.queued

    def _hand_over(self, ticket: Ticket, submit: Submit) -> None:
        ticket.sent = True
        self._send(submit)

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.submit.id, None) is not None:
            self._send(Cancel(ticket.submit.id))
            self._note()
            if self._suspects:
                self._review()

    def _send(self, message: ToEngine) -> None:
        # No back-pressure here: what can pile up is bounded by the number of requests that validation lets in.
        if self._writer is not None:
            self._writer.write(frame(message))

    def _review(self) -> None:
        """Let the next suspect run if the first has got on, or has ended; after the last, everybody."""
        first = self._suspects[0]
        self._suspects = [ticket for ticket in self._suspects if ticket.suspect and not ticket.finished]
        if not self.connected or self._suspects[:1] == [first]:
            return
        if not self._suspects and not self._others_first:
            self._hand_over_next()
            return
        if not first.finished:
            self._send(Cancel(first.submit.id))
            first.sent = False
        # The next one is to blame for what happens from the moment when it is alone.
        self._letting_go = next(self._nonces)
        self._send(Ping(self._letting_go))

    def _answer_ping(self, alive: bool) -> None:
        if self._ping is not None:
            self._ping.answer.set_result(alive)
            self._ping = None

    def _lose(self, reason: str) -> None:
        """What was under way waits for the next engine; but not the suspect that ran alone."""
        lost = [ticket for ticket in self._tickets.values() if ticket.sent]
        log.warning("lost the engine (%s) and %d requests under way", reason, len(lost))
        self._lost = time.monotonic()
        self._stop_waiting()
        self._observer.stepped(StepStats())
        if lost:
            assert self._epoch is not None
            self._observer.broke(self._epoch, prefills=any(not ticket.output_ids for ticket in lost))
        for ticket in lost:
            ticket.lose()
            if ticket in self._suspects:
                del self._tickets[ticket.submit.id]
                ticket.fail(RequestError(CRASH))
        self._suspects = [ticket for ticket in self._tickets.values() if ticket.suspect]
        self._board.suspects.own[0] = len(self._suspects)
        self._note()
        if self._draining:
            self._give_up(_stopped(reason))

    def _give_up(self, error: RequestError) -> None:
        """End all that is open."""
        tickets, self._tickets, self._suspects = list(self._tickets.values()), {}, []
        self._note()
        for ticket in tickets:
            ticket.fail(error)


def _stopped(reason: str) -> RequestError:
    return RequestError(GENERATION, f"Server error: the engine stopped: {reason}")


class _ProtocolError(Exception):
    """The engine sent what no engine of this version sends."""


def _take_frames(received: bytearray) -> Iterator[bytes]:
    """Cut the whole frames off the front of ``received``."""
    start = 0
    try:
        while len(received) - start >= FRAME.size:
            (length,) = FRAME.unpack_from(received, start)
            if length > MAX_FRAME:
                raise _ProtocolError(f"it sent a frame of {length} bytes; the limit is {MAX_FRAME}")
            end = start + FRAME.size + length
            if end > len(received):
                break
            yield bytes(received[start + FRAME.size : end])
            start = end
    finally:
        del received[:start]
