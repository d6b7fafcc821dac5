"""The step loop: the one place where messages, scheduler and device meet. It should fit on a screen."""

import itertools
import logging
import signal
import time
from collections import defaultdict
from collections.abc import Callable

from tgi.core.messages import Cancel, Delta, Fault, Ping, Pong, Step, StepStats, Submit
from tgi.core.vocabulary import Vocabulary
from tgi.engine.grammar import Grammars
from tgi.engine.mailbox import Gone, Mailbox
from tgi.engine.request import Request
from tgi.engine.scheduler import Plan, Scheduler
from tgi.runtime.runner import Runner

log = logging.getLogger(__name__)


class Loop:
    """take messages → schedule → launch → masks → sample → commit → send."""

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
                signal.setitimer(signal.ITIMER_REAL, 0)
                if wrong := self._scheduler.settle():
                    log.error("The cache's books were wrong (%s): it starts empty again", wrong)

    def take(self) -> None:
        """Apply what routers sent; with nothing to run, sleep until they send something."""
        for router, message in self._mailbox.poll(wait=self._scheduler.idle):
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
        begin = time.monotonic()
        plan = self._scheduler.schedule()
        planned = time.monotonic()
        works = [chunk.work() for chunk in plan.chunks]
        launched = self._runner.launch(works)
        forward = time.monotonic()
        masks = self._grammars.masks([chunk.request for chunk in plan.chunks], works)
        masked = time.monotonic()
        results = self._runner.sample(launched, masks)
        sampled = time.monotonic()
        messages = self._scheduler.commit(plan, results)
        for request in plan.stuck:
            self._grammars.prepare(request)
        self._send(messages, self._stats(plan, begin, planned, forward, masked, sampled))

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

    def _stats(
        self, plan: Plan, begin: float, planned: float, forward: float, masked: float, sampled: float
    ) -> StepStats:
        prefills = sum(chunk.prefills for chunk in plan.chunks)
        return StepStats(
            prefill_rows=prefills,
            decode_rows=len(plan.chunks) - prefills,
            duration=time.monotonic() - begin,
            forward=forward - planned,
            sample=sampled - forward,
            running=len(self._scheduler.running),
            batch_tokens=self._scheduler.cache.held_tokens,
            admitted=plan.admitted,
            planning=planned - begin,
            preempted=plan.preempted,
            masks=masked - forward,
            forced=plan.forced,
        )
