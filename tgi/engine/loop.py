"""The step loop: the one place where messages, scheduler and device meet. It should fit on a screen."""

import itertools
import logging
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from tgi.core.messages import Cancel, Delta, Fault, Ping, Pong, Step, StepStats, Submit
from tgi.core.vocabulary import Vocabulary
from tgi.engine.grammar import Grammars
from tgi.engine.mailbox import Gone, Mailbox
from tgi.engine.request import Request
from tgi.engine.scheduler import Plan, Scheduler
from tgi.runtime.runner import Drawing, Launched, Runner

log = logging.getLogger(__name__)

_BETWEEN = 1.0
"""Seconds of steps between two graphs that are captured, each of which holds them up for a fraction of that."""


@dataclass(slots=True)
class _UnderWay:
    """A step that isn't booked yet."""

    plan: Plan
    launched: Launched
    begin: float
    planned: float
    forward: float
    """Seconds that the forward has taken, as far as this process waited for it; so with the others."""
    masks: float = 0.0
    drawn: float = 0.0
    drawing: Drawing | None = None


class Loop:
    """take messages → schedule → launch → masks → draw → collect → commit → send.

    A device that runs by itself gets the forward of the next step before the results of the last are collected, and its
    draws once these are booked: what they depend on, grammars and penalties, is known by then.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        scheduler: Scheduler,
        runner: Runner,
        vocabulary: Callable[[], Vocabulary],
        longest_step: float = 0.0,
    ) -> None:
        """``vocabulary`` loads the model's tokens, for grammars. ``longest_step``: seconds after which a step counts as
        hung, and SIGALRM ends the process; 0: never."""
        self._mailbox = mailbox
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = Grammars(vocabulary, runner.vocab_size, mailbox.wake)
        self._longest_step = longest_step
        self._under_way: _UnderWay | None = None
        self._booked = self._captured = time.monotonic()

    def run(self) -> None:
        """Until the process ends. An error of one request ends that request; any other error ends the engine."""
        while True:
            busy = not self._scheduler.idle
            self.take()
            if not self._scheduler.idle:
                signal.setitimer(signal.ITIMER_REAL, self._longest_step)
                self.step()
            elif busy:
                self._send([], StepStats())  # all was cancelled: the last step's numbers don't hold any more
            else:
                continue
            if self._scheduler.idle:
                self._under_way = None  # it computes what nobody wants any more
                signal.setitimer(signal.ITIMER_REAL, 0)
                if wrong := self._scheduler.settle():
                    log.error("The cache's books were wrong (%s): it starts empty again", wrong)

    def take(self) -> None:
        """Apply what routers sent; with nothing to run, capture graphs, or sleep until they send something."""
        for router, message in self._mailbox.poll(wait=self._scheduler.idle and not self._runner.capture()):
            match message:
                case Submit():
                    self._submit(router, message)
                case Cancel():
                    self._scheduler.cancel(router, message.id)
                    self._grammars.cancel(router, message.id)
                case Ping():
                    self._mailbox.send(router, Pong(message.nonce))
                case Gone():
                    self._scheduler.cancel(router)
                    self._grammars.cancel(router)
        for request, error in self._grammars.ready():
            self._add(request, error)

    def step(self) -> None:
        before, self._under_way = self._under_way, self._launch()
        if before is not None:
            self._book(before)
        if (step := self._under_way) is not None:
            self._draw(step)
            if not self._runner.ahead:
                self._under_way = None
                self._book(step)
        if self._booked > self._captured + _BETWEEN:
            self._runner.capture()
            self._captured = time.monotonic()

    def _launch(self) -> _UnderWay | None:
        """Plan a step and start its forward; None if all that is left to do is under way."""
        begin = time.monotonic()
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return None
        planned = time.monotonic()
        launched = self._runner.launch([chunk.work() for chunk in plan.chunks])
        return _UnderWay(plan, launched, begin, planned - begin, time.monotonic() - planned)

    def _draw(self, step: _UnderWay) -> None:
        """Start the draws of a step, now that those of the step before are known."""
        begin = time.monotonic()
        chunks = step.plan.chunks
        # Nothing has changed since they were launched if no step was booked meanwhile.
        works = [chunk.work() for chunk in chunks] if self._runner.ahead else step.launched.works
        masks = self._grammars.masks([chunk.request for chunk in chunks], works)
        step.masks = time.monotonic() - begin
        step.drawing = self._runner.draw(step.launched, works, masks)
        step.drawn = time.monotonic() - begin

    def _book(self, step: _UnderWay) -> None:
        """Wait for what a step yields, and tell it."""
        begin = time.monotonic()
        assert step.drawing is not None
        results = self._runner.collect(step.drawing)
        waited = time.monotonic() - begin
        if self._runner.ahead:
            step.forward += waited
        else:
            step.drawn += waited
        messages = self._scheduler.commit(step.plan, results)
        for request in step.plan.stuck:
            self._grammars.prepare(request)
        self._send(messages, self._stats(step))
        self._booked = time.monotonic()

    def _submit(self, router: int, submit: Submit) -> None:
        request = Request(router, submit)
        named = itertools.chain(submit.token_ids, submit.sampling.logit_bias)
        if any(not 0 <= token < self._runner.vocab_size for token in named):
            self._add(request, "a token id lies outside the model's vocabulary")
        elif submit.sampling.grammar or submit.sampling.thinking is not None:
            self._grammars.prepare(request)
        else:
            self._add(request)

    def _add(self, request: Request, error: str | None = None) -> None:
        """Let it run, or tell why it can't."""
        fault = self._scheduler.add(request) if error is None else Fault(request.submit.id, error)
        if fault is not None:
            self._mailbox.send(request.router, Step(faults=[fault]))

    def _send(self, messages: list[tuple[int, Delta | Fault]], stats: StepStats) -> None:
        """One message per router that has news; the step's numbers go to the oldest one."""
        deltas: dict[int, list[Delta]] = defaultdict(list)
        faults: dict[int, list[Fault]] = defaultdict(list)
        for router, message in messages:
            if isinstance(message, Delta):
                deltas[router].append(message)
            else:
                faults[router].append(message)
        first = self._mailbox.oldest
        for router in {first} | deltas.keys() | faults.keys():
            self._mailbox.send(router, Step(deltas[router], faults[router], stats if router == first else None))

    def _stats(self, step: _UnderWay) -> StepStats:
        plan = step.plan
        prefills = sum(chunk.prefills for chunk in plan.chunks)
        return StepStats(
            prefill_rows=prefills,
            decode_rows=len(plan.chunks) - prefills,
            duration=time.monotonic() - max(step.begin, self._booked),
            forward=step.forward,
            sample=step.drawn,
            running=len(self._scheduler.running),
            batch_tokens=self._scheduler.cache.held_tokens,
            admitted=plan.admitted,
            planning=step.planned,
            preempted=plan.preempted,
            masks=step.masks,
            forced=plan.forced,
        )
