"""Decides which tokens of which requests run in the next step, and books what came of it.

There are no phases: a request has ``computed`` tokens in the cache and catches up with ``len(tokens)``. Prefill, its
chunks, prefix hits, decoding, preemption and resumption are that one rule. The next step may be planned before the last
one is booked: it goes on from ``planned``, and a token that is being drawn is one to compute. Runs without torch.
"""

import itertools
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from tgi.core.config import BLOCK_SIZE, KVPool
from tgi.core.messages import Delta, Fault, PromptToken, Token
from tgi.core.plan import Sampled, Work
from tgi.engine.cache import BlockCache
from tgi.engine.request import Request


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """``length`` tokens of a request from position ``start``; everything before ``start`` is in the cache, or will be
    when the step begins."""

    request: Request
    start: int
    length: int
    released: int
    """The request's, when this was planned."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def counts(self) -> bool:
        """Whether the request still holds what the chunk computes: it hasn't ended meanwhile, nor been preempted."""
        return self.request.released == self.released

    @property
    def prefills(self) -> bool:
        return self.start < self.request.submit.prompt_length

    def work(self) -> Work:
        """The chunk as the runner sees it now: when the step before it is booked, the token that it was to draw may be
        known, or useless."""
        request = self.request
        return Work(
            request.submit,
            request.tokens,
            self.start,
            self.length,
            request.told,
            self.counts and request.finish is None and self.end >= len(request.tokens),
            request.blocks,
            request.scratch,
        )


@dataclass(slots=True)
class Plan:
    """One step. Each request appears at most once."""

    chunks: list[Chunk] = field(default_factory=list)
    admitted: int = 0
    preempted: int = 0
    forced: int = 0
    """Tokens that were told without having been drawn; known once the step is booked."""
    stuck: list[Request] = field(default_factory=list)
    """Requests that were taken out, because they need a new matcher; known once the step is booked."""


class Scheduler:
    """Serves by turn, (priority, arrival at the router), lower first; what runs goes before what waits.

    Both lists are kept in that order. So a step's tokens go to the running requests by turn; a new request passes
    waiting ones of lower importance, but takes no place from a running one; and when blocks run out, the last in turn
    is preempted and waits in its old place. The first of the running, or else of the waiting, always gets on: whatever
    the priorities, everything ends that more important requests let come to its turn.
    """

    def __init__(
        self,
        *,
        pools: Sequence[KVPool],
        step_tokens: int,
        max_running: int,
        beside: int | None = None,
        ahead: bool = False,
        prefix_caching: bool = True,
        secret: bytes | None = None,
    ) -> None:
        """``step_tokens``: tokens that one step may compute, all requests together. ``beside``: while requests decode,
        prompts get so many of them, so that those don't wait long; None: all that is left. ``ahead``: a step may be
        planned while another is under way."""
        assert step_tokens > 0 and max_running > 0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.cache = BlockCache(pools, (1 + ahead) * step_tokens, prefix_caching=prefix_caching, secret=secret)
        self._step_tokens = step_tokens
        self._beside = beside
        self._max_running = max_running
        self._numbers = itertools.count()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> Fault | None:
        """Queue a request; a Fault if it could never run."""
        submit = request.submit
        if not 0 < submit.prompt_length <= len(request.tokens) or submit.max_new_tokens < 0:
            return Fault(submit.id, "a request needs a prompt, and can't ask for less than no tokens")
        if submit.pooling is not None and submit.max_new_tokens > 0:
            return Fault(submit.id, "a request is for an embedding or for tokens")
        if (reason := self.cache.declines(submit.prompt_length + submit.max_new_tokens)) is not None:
            return Fault(submit.id, reason)
        if not request.started:  # otherwise it comes back, to its old place
            request.turn = submit.priority, submit.arrived, next(self._numbers)
        insort(self.waiting, request, key=_turn)
        return None

    def cancel(self, router: int, request_id: int | None = None) -> None:
        """Forget one request, or all of a router."""
        for request in [r for r in self.requests if r.router == router and request_id in (None, r.submit.id)]:
            (self.running if request in self.running else self.waiting).remove(request)
            self.cache.release(request)
            request.done = True

    def schedule(self) -> Plan:
        """The next step: every running request goes on as far as the budget reaches, then waiting ones are admitted."""
        plan = Plan()
        budget = self._step_tokens
        prompts = budget
        if self._beside is not None and not all(map(_catches_up, self.running)):
            prompts = min(budget, self._beside)
        at = 0
        while at < len(self.running) and budget:
            request = self.running[at]
            behind = _catches_up(request)
            length = min(request.goal - request.planned, prompts if behind else budget, budget)
            if not length:  # or all that it needs is under way
                at += 1
                continue
            if not self.cache.reserve(request, request.planned + length):
                self._preempt(self.running.pop())  # the last in turn, at worst this one: try again or leave the loop
                plan.preempted += 1
                continue
            if behind:
                prompts -= length
            plan.chunks.append(_chunk(request, length))
            budget -= length
            at += 1
        budget = min(budget, prompts)
        while self.waiting and budget and len(self.running) < self._max_running and not plan.preempted:
            if not self.cache.admit(self.waiting[0], budget):
                break
            request = self.waiting.pop(0)
            insort(self.running, request, key=_turn)
            length = min(request.goal - request.planned, budget)
            plan.chunks.append(_chunk(request, length))
            plan.admitted += 1
            budget -= length
        return plan

    def commit(self, plan: Plan, results: Sequence[Sampled]) -> list[tuple[int, Delta | Fault]]:
        """Book a step's results, in the order of ``plan.chunks``. Returns (router, message) for every change."""
        out: list[tuple[int, Delta | Fault]] = []
        for chunk, result in zip(plan.chunks, results, strict=True):
            request = chunk.request
            if not chunk.counts:
                continue
            known = len(request.tokens) - request.told
            broken = request.broken
            tokens = result.tokens if broken is None else result.tokens[:known]
            if drawn := [token.id for token in tokens[known:]]:
                request.extend(drawn)
                broken = request.broken
            stuck = broken is not None and request.renews(broken)
            error = result.error or (None if stuck else broken)
            if error is not None:
                self._end(request)
                out.append((request.router, Fault(request.submit.id, error)))
                continue
            request.computed = chunk.end
            self.cache.publish(request)
            ends = not stuck and request.finish is not None and request.computed == request.goal
            if (delta := self._delta(request, tokens, result.embedding, ends)) is not None:
                plan.forced += len(delta.tokens) - len(drawn)
                out.append((request.router, delta))
            if ends:
                self._end(request)
            elif stuck:
                self.running.remove(request)
                self.cache.release(request)
                plan.stuck.append(request)
        return out

    def settle(self) -> str | None:
        """When idle: check the books. If they are wrong, which is a bug, start with an empty cache and say what it was;
        nothing is lost, since nobody holds anything."""
        assert self.idle
        try:
            self.check_integrity()
        except AssertionError as error:
            self.cache.clear()
            return str(error)
        return None

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks leak or are held twice, or if a queue is out of order."""
        self.cache.check_integrity(self.requests)
        assert all(not r.blocks and r.computed == 0 for r in self.waiting), "a waiting request holds blocks"
        assert len(self.running) <= self._max_running, "more requests run than may"
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_turn), "a queue is out of order"
            assert not any(request.done for request in queue), "a request that has ended is queued"

    @staticmethod
    def _delta(request: Request, tokens: Sequence[Token], embedding: Sequence[float], ends: bool) -> Delta | None:
        """News of the tokens at ``request.told`` and on; None if there are none."""
        submit, begin = request.submit, request.told
        request.told += len(tokens)
        given = max(begin, len(submit.token_ids))
        fresh = list(tokens[given - begin :])
        scores: list[PromptToken] = []
        if begin < submit.prompt_length:
            scores += (PromptToken(token.logprob, token.top) for token in tokens[: submit.prompt_length - begin])
        if not ends and not fresh and not scores:
            return None
        finish = request.finish if ends else None
        index = given - submit.prompt_length
        return Delta(submit.id, index, fresh, finish, request.started, request.cached, scores, list(embedding))

    def _preempt(self, request: Request) -> None:
        """Back into the queue; what it had computed is recomputed, or found again in the prefix cache."""
        self.cache.release(request)
        insort(self.waiting, request, key=_turn)

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request)
        request.done = True


def _chunk(request: Request, length: int) -> Chunk:
    """The next tokens of a request, which are planned with it."""
    chunk = Chunk(request, request.planned, length, request.released)
    request.planned = chunk.end
    return chunk


def _catches_up(request: Request) -> bool:
    """Whether it has a prompt, or what it lost, to compute before it goes on."""
    return request.goal - request.planned > BLOCK_SIZE or request.planned < request.submit.prompt_length


def _turn(request: Request) -> tuple[int, float, int]:
    return request.turn
