"""The scheduler over a fake runner that checks every cache entry it reads."""

import random
from collections.abc import Sequence

import pytest

from tests.engine.fake_runner import FakeRunner, text_of
from tgi.core.messages import Delta, Fault, Sampling, Submit
from tgi.core.plan import Sampled
from tgi.engine.request import Request
from tgi.engine.scheduler import Plan, Scheduler


def submit(
    number: int,
    prompt: Sequence[int],
    new: int = 8,
    *,
    resumed: Sequence[int] = (),
    stops: Sequence[int] = (),
    salt: bytes = b"",
    prompt_logprobs: bool = False,
) -> Submit:
    ids = [*prompt, *resumed]
    return Submit(number, ids, len(prompt), new, list(stops), Sampling(), 0.0, prompt_logprobs, salt)


class Engine:
    """Scheduler and fake runner stepping together; collects what each request got."""

    def __init__(self, blocks: int = 64, step_tokens: int = 64, max_running: int = 16, prefix_caching: bool = True):
        self.scheduler = Scheduler(
            blocks=blocks, step_tokens=step_tokens, max_running=max_running, prefix_caching=prefix_caching
        )
        self.runner = FakeRunner(blocks)
        self.step_tokens = step_tokens
        self.deltas: dict[int, list[Delta]] = {}
        self.resumed: dict[int, list[int]] = {}
        self.faults: list[Fault] = []
        self.preempted = 0
        self.mixed = 0

    def add(self, message: Submit, router: int = 0) -> None:
        self.deltas[message.id] = []
        self.resumed[message.id] = message.token_ids[message.prompt_length :]
        fault = self.scheduler.add(Request(router, message, list(message.token_ids)))
        if fault:
            self.faults.append(fault)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        assert sum(chunk.length for chunk in plan.chunks) <= self.step_tokens
        assert len({id(chunk.request) for chunk in plan.chunks}) == len(plan.chunks)
        assert plan.chunks or self.scheduler.idle, "nothing runs though requests wait"
        self.preempted += plan.preempted
        self.mixed += len({chunk.prefills for chunk in plan.chunks}) == 2
        results = self.runner.sample(self.runner.launch([chunk.work() for chunk in plan.chunks]))
        for _, message in self.scheduler.commit(plan, results):
            if isinstance(message, Fault):
                self.faults.append(message)
            else:
                assert message.index == len(self.text(message.id))
                self.deltas[message.id].append(message)
        self.scheduler.check_integrity()
        return plan

    def run(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                assert self.scheduler.pool.free == self.scheduler.pool.size
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def text(self, number: int) -> list[int]:
        """Generated tokens, those included with which the request was resumed."""
        return self.resumed[number] + [token.id for delta in self.deltas[number] for token in delta.tokens]


def test_one_request_runs_to_its_length():
    engine = Engine()
    engine.add(submit(1, [1, 2, 3], 5))
    engine.run()
    assert engine.text(1) == text_of([1, 2, 3], 5)
    assert [delta.finish for delta in engine.deltas[1]] == [None] * 4 + ["length"]


def test_an_end_token_stops_even_in_the_last_place():
    expected = text_of([1, 2, 3], 5)
    engine = Engine()
    engine.add(submit(1, [1, 2, 3], 5, stops=[expected[-1]]))
    engine.run()
    assert engine.deltas[1][-1].finish == "eos_token"


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    engine = Engine(step_tokens=16)
    engine.add(submit(1, [1, 2, 3], 30))
    engine.step()
    long = [index % 50 for index in range(200)]
    engine.add(submit(2, long, 3))
    produced = len(engine.text(1))
    while not engine.text(2):
        engine.step()
        produced += 1
        assert len(engine.text(1)) == produced, "the running request stalls behind the prompt"
    engine.run()
    assert engine.text(2) == text_of(long, 3)
    assert engine.mixed > 5


def test_a_known_prefix_is_not_computed_again():
    engine = Engine(blocks=64, step_tokens=64)
    prompt = [index % 50 for index in range(40)]
    engine.add(submit(1, prompt, 24))
    engine.run()
    before = engine.runner.computed
    # Generated tokens are found too: the next turn of a conversation starts with this one's text.
    turn = prompt + engine.text(1) + [7, 7]
    engine.add(submit(2, turn, 4))
    engine.run()
    assert engine.text(2) == text_of(turn, 4)
    assert engine.deltas[2][0].cached == 48  # 63 tokens were computed: three full blocks
    assert engine.runner.computed - before == len(turn) - 48 + 3


def test_the_last_prompt_token_is_always_computed():
    engine = Engine()
    prompt = [index % 50 for index in range(32)]
    for number in (1, 2):
        engine.add(submit(number, prompt, 2))
        engine.run()
    assert engine.deltas[2][0].cached == 16
    assert engine.text(2) == engine.text(1)


def test_blocks_are_not_shared_between_salts():
    engine = Engine()
    prompt = [index % 50 for index in range(40)]
    for number, salt in enumerate((b"a", b"b", b"a")):
        engine.add(submit(number, prompt, 2, salt=salt))
        engine.run()
    assert [engine.deltas[number][0].cached for number in range(3)] == [0, 0, 32]


def test_without_prefix_caching_nothing_is_shared():
    engine = Engine(prefix_caching=False)
    prompt = [index % 50 for index in range(40)]
    for number in (1, 2):
        engine.add(submit(number, prompt, 2))
        engine.run()
    assert engine.deltas[2][0].cached == 0


def test_short_of_blocks_the_youngest_is_preempted_and_comes_back():
    engine = Engine(blocks=8, step_tokens=256)
    prompts = {number: [number] * 30 for number in (1, 2, 3)}
    for number, prompt in prompts.items():
        engine.add(submit(number, prompt, 60))
    engine.run()
    assert engine.preempted > 0
    for number, prompt in prompts.items():
        assert engine.text(number) == text_of(prompt, 60)


def test_a_resumed_request_goes_on_where_it_was():
    expected = text_of([1, 2, 3], 12)
    engine = Engine()
    engine.add(submit(1, [1, 2, 3], 12, resumed=expected[:5]))
    engine.run()
    assert engine.deltas[1][0].index == 5
    assert engine.text(1) == expected


def test_prompt_logprobs_come_once_each_and_in_order_through_chunks_and_preemption():
    engine = Engine(blocks=8, step_tokens=24)
    prompts = {number: [(number * 7 + index) % 50 for index in range(30)] for number in (1, 2, 3)}
    for number, prompt in prompts.items():
        engine.add(submit(number, prompt, 60, prompt_logprobs=True))
    engine.run()
    assert engine.preempted > 0
    for number, prompt in prompts.items():
        scores = [token.logprob for delta in engine.deltas[number] for token in delta.prompt]
        assert scores == [float(-token) for token in prompt[1:]]


def test_a_cancelled_request_gives_everything_back():
    engine = Engine()
    for number in range(4):
        engine.add(submit(number, [number] * 20, 50), router=number % 2)
    for _ in range(3):
        engine.step()
    engine.scheduler.cancel(0, 2)
    engine.scheduler.cancel(0, 99)
    engine.step()
    engine.scheduler.cancel(1)
    assert [request.submit.id for request in engine.scheduler.requests] == [0]
    engine.run()
    assert engine.text(0) == text_of([0] * 20, 50)
    assert len(engine.text(1)) < 50


def test_cancelled_while_the_step_is_under_way():
    engine = Engine()
    engine.add(submit(1, [1, 2, 3], 5))
    engine.add(submit(2, [4, 5, 6], 5))
    plan = engine.scheduler.schedule()
    engine.scheduler.cancel(0, 1)
    results = engine.runner.sample([chunk.work() for chunk in plan.chunks])
    assert [message.id for _, message in engine.scheduler.commit(plan, results)] == [2]
    engine.scheduler.check_integrity()


def test_an_error_ends_one_request_only():
    engine = Engine()
    engine.add(submit(1, [1, 2, 3], 5))
    engine.add(submit(2, [4, 5, 6], 5))
    plan = engine.scheduler.schedule()
    results: list[Sampled] = engine.runner.sample(engine.runner.launch([chunk.work() for chunk in plan.chunks]))
    results[0] = Sampled(error="broken")
    (_, fault), (_, delta) = engine.scheduler.commit(plan, results)
    assert fault == Fault(1, "broken")
    assert isinstance(delta, Delta)
    engine.deltas[2].append(delta)
    engine.run()
    assert engine.text(2) == text_of([4, 5, 6], 5)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (submit(1, [1] * 1000, 100), "don't fit into the cache of 1024 tokens"),
        (submit(1, [], 5), "needs a prompt"),
        (submit(1, [1], 0), "room for a token"),
    ],
)
def test_what_can_never_run_is_refused(message: Submit, words: str):
    engine = Engine(blocks=64)
    engine.add(message)
    assert words in engine.faults[0].message
    assert engine.scheduler.idle


def test_max_running_bounds_the_batch():
    engine = Engine(max_running=2)
    for number in range(5):
        engine.add(submit(number, [number, 1], 4))
    while not engine.scheduler.idle:
        engine.step()
        assert len(engine.scheduler.running) <= 2
    for number in range(5):
        assert engine.text(number) == text_of([number, 1], 4)


def test_a_leak_is_told_and_mended_when_idle():
    engine = Engine()
    engine.add(submit(1, [1] * 20, 5))
    engine.run()
    assert engine.scheduler.settle() is None
    engine.scheduler.pool.take(1)
    assert "reference counts" in (engine.scheduler.settle() or "")
    engine.add(submit(2, [1] * 20, 5))
    engine.run()
    assert engine.text(2) == engine.text(1)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_request_gets_its_own_text(seed: int):
    """Random prompts with shared beginnings, arrivals, cancellations and a cache that is too small."""
    chance = random.Random(seed)
    blocks = chance.choice([8, 12, 20, 64])
    engine = Engine(blocks, chance.choice([5, 16, 33, 200]), chance.choice([1, 3, 16]), chance.random() < 0.8)
    stems = [[chance.randrange(50) for _ in range(chance.randrange(50))] for _ in range(3)]
    wanted: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    for number in range(30):
        stem = chance.choice(stems)
        prompt = stem[: chance.randrange(len(stem) + 1)] + [
            chance.randrange(50) for _ in range(chance.randrange(1, 20))
        ]
        new = chance.randrange(1, min(50, blocks * 16 - len(prompt)))
        stops = [chance.randrange(50)] if chance.random() < 0.3 else []
        salt = chance.choice([b"", b"tenant"])
        wanted[number] = text_of(prompt, new, stops)
        resumed = wanted[number][: chance.randrange(new)] if not stops and chance.random() < 0.2 else []
        engine.add(submit(number, prompt, new, resumed=resumed, stops=stops, salt=salt))
        for _ in range(chance.randrange(4)):
            if not engine.scheduler.idle:
                engine.step()
        if chance.random() < 0.1:
            victim = chance.randrange(number + 1)
            engine.scheduler.cancel(0, victim)
            cancelled.add(victim)
            engine.scheduler.check_integrity()
    engine.run()
    for number, text in wanted.items():
        got = engine.text(number)
        assert got == text or (number in cancelled and got == text[: len(got)])
