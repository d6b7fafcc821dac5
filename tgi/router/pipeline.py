"""What all routes share: a Generation goes to the engine and comes back as text, piece by piece, with its times.

Knows tokens, text and metrics; knows no dialect and no connection.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from tgi.core.board import Board
from tgi.core.config import Settings
from tgi.core.errors import INCOMPLETE, INTERNAL, OVERLOADED, UNAVAILABLE, RequestError
from tgi.core.messages import Delta, Pooling, PromptToken
from tgi.core.messages import Token as Drawn
from tgi.router.client import EngineClient, Ticket
from tgi.router.formats import Format
from tgi.router.journal import Journal
from tgi.router.metrics import Metrics, Times
from tgi.router.rendering import Templates
from tgi.router.store import ResponseStore
from tgi.router.stream import Transcript
from tgi.router.tokenizer import Tokenizer
from tgi.router.tracing import Tracer
from tgi.router.validate import Generation, Validator
from tgi.router.wire.native import FinishReason, Token

ENGINE_PATIENCE = 60.0
"""Seconds that a request waits for an engine that is loading for the first time."""

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Permits:
    """``max_concurrent_requests`` generations of all routers at once. Nobody waits: who gets no permit is sent away."""

    def __init__(self, most: int, board: Board) -> None:
        self._most = most
        self._board = board

    @contextmanager
    def take(self, count: int = 1) -> Iterator[None]:
        taken = self._board.generations
        with self._board.lock:
            if taken.sums()[0] + count > self._most:
                raise RequestError(OVERLOADED)
            taken.own[0] += count
        try:
            yield
        finally:
            taken.own[0] -= count


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that handlers work with."""

    settings: Settings
    tokenizer: Tokenizer
    templates: Templates
    formats: Mapping[str, Format]
    """How the model's replies are spelled, by the names of its templates."""
    validator: Validator
    client: EngineClient
    metrics: Metrics
    permits: Permits
    tracer: Tracer | None = None
    responses: ResponseStore = field(default_factory=ResponseStore)
    journal: Journal = field(default_factory=Journal)
    """Of the request at hand: each one's handler gets a Service with a journal of its own."""

    def judge(self, error: Exception) -> RequestError:
        """The error as the client may see it, counted. What is no RequestError is a bug: logged, told as internal."""
        if not isinstance(error, RequestError):
            log.error("a handler failed", exc_info=error)
            error = RequestError(INTERNAL)
        self.metrics.failed(error.kind)
        self.journal.failed(error)
        return error

    def tokens(self, ranked: Iterable[tuple[int, float]]) -> list[Token]:
        """(id, logprob) as tokens, each decoded alone."""
        return [Token(i, self.tokenizer.piece(i), logprob, i in self.tokenizer.special_ids) for i, logprob in ranked]


class Piece(NamedTuple):
    """One generated token, and what it adds to the answer."""

    token: Token
    """Its text is what it adds behind the tokens before it; a hidden special token's is its name."""
    top: list[Token]
    text: str
    """What the answer grows by: nothing for a hidden token, or while a stop string may be under way."""
    finish: FinishReason | None


class Run:
    """One generation on its way. ``async with`` it, so that the engine stops when nobody wants the rest."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        arrived: float,
        *,
        counts: bool = True,
        pooling: Pooling | None = None,
    ) -> None:
        """``counts``: the metrics see a request of its own in it. ``pooling``: it is for the prompt's embedding."""
        self.generation = generation
        self.tokens = 0
        self.embedding: list[float] = []
        self.finish: FinishReason | None = None
        self.stop: str | None = None
        """The stop string that ended it."""
        self._service = service
        self._arrived = arrived
        self._counts = counts
        self._pooling = pooling
        self._text: list[str] = []
        self._transcript = Transcript(service.tokenizer, generation)
        self._hear: Callable[[Piece], None]
        self._ticket: Ticket

    async def __aenter__(self) -> Self:
        """Hand it to the engine; waits for one that is loading for the first time."""
        service, generation = self._service, self.generation
        if not await service.client.admits(ENGINE_PATIENCE):
            raise RequestError(UNAVAILABLE)
        self._ticket = service.client.submit(
            token_ids=generation.token_ids,
            max_new_tokens=generation.max_new_tokens,
            stop_token_ids=generation.stop_token_ids,
            sampling=generation.sampling,
            prompt_logprobs=generation.prompt_logprobs,
            cache_salt=generation.cache_salt,
            priority=generation.priority,
            pooling=self._pooling,
        )
        if self._counts:
            service.metrics.validated(len(generation.token_ids), generation.max_new_tokens)
        service.journal.began(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticket.cancel()
        if self.finish is None and self._counts and isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._service.metrics.dropped()
            self._service.journal.dropped(self)

    async def follow(self, hear: Callable[[Piece], None]) -> None:
        """Until the generation is finished, call ``hear`` with each piece: at once, in the middle of reading what the
        engine sent. Raises RequestError where the engine fails it."""
        self._hear = hear
        await self._ticket.follow(self._grow)
        if self.finish is None:
            raise RequestError(INCOMPLETE)

    def _grow(self, delta: Delta) -> None:
        count = len(delta.tokens)
        for at, token in enumerate(delta.tokens, 1):
            piece = self._piece(token, delta.finish if at == count else None)
            self._hear(piece)
            if piece.finish is not None:
                return
        if delta.finish is not None:  # without a token: only the prompt was to be computed
            self.finish, self.embedding = delta.finish, delta.embedding
            self._record()

    def _piece(self, token: Drawn, finish: FinishReason | None) -> Piece:
        """The next token's; ``finish``: why the engine stops with it."""
        tokenizer, generation = self._service.tokenizer, self.generation
        self.tokens += 1
        text, grown, stop = self._transcript.push(token.id, last=finish is not None)
        if stop is not None:
            finish, self.stop = "stop_sequence", stop
        self._text.append(grown)
        if finish is not None:
            self.finish = finish
            self._ticket.cancel()
            self._record()
        special = token.id in tokenizer.special_ids
        shown = grown if generation.keep_stop else text
        if special and not shown:
            shown = tokenizer.piece(token.id)
        top = self._service.tokens(token.top) if token.top else []
        return Piece(Token(token.id, shown, token.logprob, special), top, grown, finish)

    @property
    def cached(self) -> int:
        """Prompt tokens that the prefix cache had."""
        return self._ticket.cached

    @property
    def prompt(self) -> list[PromptToken]:
        """All prompt tokens but the first, if the generation asked for ``prompt_logprobs``."""
        return self._ticket.prompt

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    @property
    def ticket(self) -> Ticket:
        """Its life in the engine, once it has been handed over."""
        return self._ticket

    @property
    def times(self) -> Times:
        ticket = self._ticket
        return Times(
            total=ticket.finished - self._arrived,
            validation=ticket.submitted - self._arrived,
            queue=ticket.started - ticket.submitted,
            inference=ticket.finished - ticket.started,
            first_token=ticket.first_token - self._arrived,
        )

    def _record(self) -> None:
        if self._counts:
            self._service.metrics.finished(self.times, self.tokens, self.cached)
            self._service.journal.finished(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """A generation to its end."""

    run: Run
    pieces: list[Piece]

    @property
    def mean_logprob(self) -> float:
        return sum(piece.token.logprob for piece in self.pieces) / max(1, len(self.pieces))


async def together(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results, in order. The first failure ends the others."""
    works = list(works)
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def collect(runs: Sequence[Run]) -> list[Answer]:
    """All answers, in order."""

    async def follow(run: Run) -> Answer:
        answer = Answer(run, [])
        async with run:
            await run.follow(answer.pieces.append)
        return answer

    return await together(follow(run) for run in runs)


async def follow_all(runs: Sequence[Run], hear: Callable[[int, Piece], None]) -> None:
    """``hear`` of (which run, its next piece) as they come; the first failure ends the others. The runs have been
    entered."""
    await together(run.follow(partial(hear, index)) for index, run in enumerate(runs))
