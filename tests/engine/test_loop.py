"""When graphs are captured: never while somebody waits for the first answer, and little by little while others do."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.engine.fake_runner import FakeRunner
from tests.engine.test_scheduler import submit
from tgi.core.config import KVPool
from tgi.core.messages import Step
from tgi.engine import loop as loops
from tgi.engine.loop import Loop
from tgi.engine.mailbox import Mailbox
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler


class Runner(FakeRunner):
    left = 3

    def capture(self) -> bool:
        self.left -= self.left > 0
        return self.left > 0


class Post:
    """Stands for the mailbox."""

    oldest = 0

    def __init__(self) -> None:
        self.waits: list[bool] = []
        self.sent: list[Step] = []

    def poll(self, *, wait: bool) -> Iterator[Any]:
        self.waits.append(wait)
        return iter(())

    def wake(self) -> None: ...

    def send(self, router: int, message: Step) -> None:
        self.sent.append(message)


class Engine:
    def __init__(self, *, ahead: bool = False) -> None:
        self.post = Post()
        self.runner = Runner([KVPool(64)], ahead=ahead)
        self.scheduler = Scheduler(pools=[KVPool(64)], step_tokens=64, max_running=8, ahead=ahead)
        self.loop = Loop(cast(Mailbox, self.post), self.scheduler, cast(Any, self.runner), cast(Any, None))


def test_an_idle_engine_captures_before_it_sleeps() -> None:
    engine = Engine()
    for _ in range(4):
        engine.loop.take()
    assert engine.post.waits == [False, False, True, True]


def test_a_busy_engine_captures_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(ahead=True)
    engine.scheduler.add(Request(0, submit(1, [1, 2, 3], 20)))
    for _ in range(5):
        engine.loop.take()
        engine.loop.step()
    assert engine.runner.left == 3 and engine.post.waits == [False] * 5
    monkeypatch.setattr(loops, "_BETWEEN", -1.0)
    engine.loop.step()
    assert engine.runner.left == 2


def test_the_news_of_a_step_come_with_the_next() -> None:
    counts = {}
    for ahead in (False, True):
        engine = Engine(ahead=ahead)
        engine.scheduler.add(Request(0, submit(1, [1, 2, 3], 3)))
        sent = []
        while not engine.scheduler.idle:
            engine.loop.step()
            sent.append(sum(len(delta.tokens) for step in engine.post.sent for delta in step.deltas))
        counts[ahead] = sent
    assert counts == {False: [1, 2, 3], True: [0, 1, 2, 3]}
