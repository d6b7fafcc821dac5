"""The scheduler over a fake runner that checks every cache entry it reads."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine.fake_runner import FakeRunner, logprob, text_of
from tgi.core.config import KVPool
from tgi.core.messages import Delta, Fault, Pooling, Sampling, Submit
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
    priority: int = 0,
    pooling: Pooling | None = None,
    scored: int = 0,
    arrived: float = 0.0,
) -> Submit:
    return Submit(
        number,
        [*prompt, *resumed],
        len(prompt),
        new,
        list(stops),
        Sampling(),
        arrived,
        prompt_logprobs,
        salt,
        priority,
        pooling,
        scored,
    )


def scores_of(prompt: Sequence[int]) -> list[float]:
    return [logprob(prompt[: at + 1]) for at in range(1, len(prompt))]


class Engine:
    """Scheduler and fake runner stepping together; collects what each request got. ``ahead``: a step is launched before
    the last one is booked."""

    def __init__(
        self,
        blocks: int = 64,
        step_tokens: int = 64,
        max_running: int = 16,
        prefix_caching: bool = True,
        beside: int | None = None,
        windows: Sequence[int | None] = (None,),
        ahead: bool = False,
    ):
        pools = [KVPool(blocks, window) for window in windows]
        self.scheduler = Scheduler(
            pools=pools,
            step_tokens=step_tokens,
            max_running=max_running,
            beside=beside,
            prefix_caching=prefix_caching,
            ahead=ahead,
        )
        self.ahead = ahead
        self.under_way: tuple[Plan, list[Sampled]] | None = None
        self.runner = FakeRunner(pools)
        self.step_tokens = step_tokens
        self.deltas: dict[int, list[Delta]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.resumed: dict[int, list[int]] = {}
        self.faults: list[Fault] = []
        self.preempted = 0
        self.mixed = 0

    def add(self, message: Submit, router: int = 0, matcher: Any = None) -> None:
        self.deltas[message.id] = []
        self.prompts[message.id] = message.token_ids[: message.prompt_length]
        self.resumed[message.id] = message.token_ids[message.prompt_length :]
        request = Request(router, message)
        if matcher is not None:
            request.follow(matcher)
        fault = self.scheduler.add(request)
        if fault:
            self.faults.append(fault)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        assert sum(chunk.length for chunk in plan.chunks) <= self.step_tokens
        assert len({id(chunk.request) for chunk in plan.chunks}) == len(plan.chunks)
        assert plan.chunks or self.scheduler.idle or self.under_way, "nothing runs though requests wait"
        self.preempted += plan.preempted
        self.mixed += len({chunk.prefills for chunk in plan.chunks}) == 2
        self.runner.launch([chunk.work() for chunk in plan.chunks])
        before, self.under_way = self.under_way, None
        if before is not None:
            self.book(*before)
        results = self.runner.sample([chunk.work() for chunk in plan.chunks])
        self.disturb(plan)
        if self.ahead and plan.chunks:
            self.under_way = plan, results
        else:
            self.book(plan, results)
        return plan

    def book(self, plan: Plan, results: list[Sampled]) -> None:
        for _, message in self.scheduler.commit(plan, results):
            if isinstance(message, Fault):
                self.faults.append(message)
            else:
                self.take(message)
        self.scheduler.check_integrity()

    def disturb(self, plan: Plan) -> None:
        """For subclasses: something happens while the device works."""

    def take(self, delta: Delta) -> None:
        """As a router: each token once and in order, with its own log-probability."""
        assert delta.index == len(self.text(delta.id))
        ids = self.prompts[delta.id] + self.text(delta.id)
        for token in delta.tokens:
            ids.append(token.id)
            assert token.logprob == logprob(ids)
        self.deltas[delta.id].append(delta)

    def run(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                assert all(pool.free == pool.size for pool in self.scheduler.cache.pools)
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def scores(self, number: int) -> list[float]:
        return [token.logprob for delta in self.deltas[number] for token in delta.prompt]

    def text(self, number: int) -> list[int]:
        """Generated tokens, those included with which the request was resumed."""
        return self.resumed[number] + [token.id for delta in self.deltas[number] for token in delta.tokens]

    def started(self) -> list[int]:
        """Requests in the order in which they were first run."""
        first = {number: deltas[0].started for number, deltas in self.deltas.items() if deltas}
        return sorted(first, key=first.__getitem__)


def test_prompts_get_little_of_a_step_in_which_others_decode():
    engine = Engine(step_tokens=200, beside=6)
    engine.add(submit(1, [1] * 100, 40))
    engine.add(submit(2, [2] * 99, 40))
    assert engine.step().chunks[1].length == 99, "nobody decodes yet"
    for number in (3, 4):
        engine.add(submit(number, [number] * 20, 5))
    lengths = [[chunk.length for chunk in engine.step().chunks] for _ in range(5)]
    assert lengths == [[1, 1, 6], [1, 1, 6], [1, 1, 6], [1, 1, 2, 4], [1, 1, 1, 6]]
    engine.run()
    assert engine.text(4) == text_of([4] * 20, 5)


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
        assert engine.scores(number) == scores_of(prompt)
    # What was told before a preemption isn't scored again.
    assert engine.runner.scored == sum(len(prompt) - 1 for prompt in prompts.values())


@pytest.mark.parametrize("step_tokens", [7, 64])
@pytest.mark.parametrize(("scored", "known"), [(0, 0), (1, 0), (17, 0), (29, 0), (29, 1), (29, 5)])
def test_a_prompt_that_was_scored_in_part_gets_the_other_scores(scored: int, known: int, step_tokens: int):
    prompt = [index % 50 for index in range(30)]
    expected = text_of(prompt, 12)
    engine = Engine(step_tokens=step_tokens)
    engine.add(submit(1, prompt, 12, resumed=expected[:known], prompt_logprobs=True, scored=scored))
    engine.run()
    assert engine.scores(1) == scores_of(prompt)[scored:]
    assert engine.runner.scored == 29 - scored
    assert engine.text(1) == expected


def test_who_comes_again_has_the_turn_that_he_had():
    engine = Engine(max_running=1)
    engine.add(submit(1, [1], 4, arrived=30.0))
    engine.add(submit(2, [2], 4, arrived=20.0))
    engine.add(submit(3, [3], 4, arrived=10.0))
    engine.add(submit(4, [4], 4, arrived=40.0, priority=-1))
    assert [request.submit.id for request in engine.scheduler.waiting] == [4, 3, 2, 1]
    engine.run()


def test_without_new_tokens_only_the_prompt_is_computed():
    engine = Engine(step_tokens=16)
    prompt = [index % 50 for index in range(40)]
    engine.add(submit(1, prompt, 0, stops=[prompt[-1]], prompt_logprobs=True))
    engine.run()
    assert engine.runner.computed == 40
    assert [delta.finish for delta in engine.deltas[1]] == [None, None, "length"]
    assert engine.text(1) == []
    assert engine.scores(1) == scores_of(prompt)


def test_a_prompt_alone_may_fill_the_cache():
    engine = Engine(blocks=2)
    engine.add(submit(1, [1] * 32, 0))
    engine.run()
    assert [delta.finish for delta in engine.deltas[1]] == ["length"]


@pytest.mark.parametrize(("pooling", "cached"), [("mean", 0), ("last", 32)])
def test_a_mean_needs_every_token_and_a_last_state_only_the_last(pooling: Pooling, cached: int):
    engine = Engine(step_tokens=24)
    prompt = [index % 50 for index in range(40)]
    for number in (1, 2):
        engine.add(submit(number, prompt, 0, pooling=pooling))
        engine.run()
    (delta,) = engine.deltas[2]
    assert delta.cached == cached
    assert delta.embedding == [float(id) for id in (prompt if pooling == "mean" else prompt[-1:])]
    assert (delta.finish, delta.tokens) == ("length", [])


def test_a_preempted_embedding_begins_again():
    engine = Engine(blocks=8, step_tokens=16)
    engine.add(submit(1, [1] * 30, 80))
    engine.step()
    engine.step()
    prompt = [index % 50 for index in range(90)]
    engine.add(submit(2, prompt, 0, pooling="mean"))
    engine.run()
    assert engine.preempted > 0
    (delta,) = engine.deltas[2]
    assert delta.embedding == [float(id) for id in prompt]


def test_important_requests_pass_waiting_ones_but_not_running_ones():
    engine = Engine(max_running=1)
    for number, priority in enumerate((5, 1, 0, 1, -3, 0)):
        engine.add(submit(number, [number, 1], 4, priority=priority))
        if number == 0:
            engine.step()
    engine.run()
    assert engine.started() == [0, 4, 2, 5, 1, 3]
    for number in range(6):
        assert engine.text(number) == text_of([number, 1], 4)


def test_short_of_blocks_the_least_important_is_preempted_even_if_it_is_the_oldest():
    engine = Engine(blocks=8, step_tokens=256)
    for number, priority in enumerate((1, 0, 0)):
        engine.add(submit(number, [number] * 30, 60, priority=priority))
    ends = []
    while not engine.scheduler.idle:
        before = list(engine.scheduler.running)
        if engine.step().preempted:
            gone = [request.submit.id for request in before if request not in engine.scheduler.running]
            ends.append([id for id in gone if engine.deltas[id][-1].finish is None])
    assert ends[0] == [0]
    assert any(2 in victims for victims in ends), "the youngest of the important ones is next"
    assert not any(1 in victims for victims in ends)
    for number in range(3):
        assert engine.text(number) == text_of([number] * 30, 60)


def test_a_step_goes_to_the_important_first():
    engine = Engine(step_tokens=16)
    engine.add(submit(1, [1] * 10, 9, priority=2))
    engine.step()
    engine.add(submit(2, [2] * 50, 2, priority=1))
    steps = [engine.step() for _ in range(4)]
    shares = [[(chunk.request.submit.id, chunk.length) for chunk in plan.chunks] for plan in steps]
    assert shares == [[(1, 1), (2, 15)], [(2, 16)], [(2, 16)], [(2, 3), (1, 1)]]
    engine.run()


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
    engine.take(delta)
    engine.run()
    assert engine.text(2) == text_of([4, 5, 6], 5)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (submit(1, [1] * 1000, 100), "don't fit into the cache of 1024 tokens"),
        (submit(1, [], 5), "needs a prompt"),
        (submit(1, [1], -1), "less than no tokens"),
        (submit(1, [1], 5, pooling="last"), "an embedding or for tokens"),
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
    engine.scheduler.cache.pools[0].take(1)
    assert "reference counts" in (engine.scheduler.settle() or "")
    engine.add(submit(2, [1] * 20, 5))
    engine.run()
    assert engine.text(2) == engine.text(1)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_request_gets_its_own_text(seed: int, ahead: bool):
    """Random prompts with shared beginnings, arrivals, cancellations and a cache that is too small."""
    chance = random.Random(seed)
    blocks = chance.choice([8, 12, 20, 64])
    options = chance.choice([5, 16, 33, 200]), chance.choice([1, 3, 16]), chance.random() < 0.8
    windows = chance.choice([(None,), (None, 20), (40, 17)])
    engine = Engine(blocks, *options, beside=chance.choice([None, 1, 4]), windows=windows, ahead=ahead)
    stems = [[chance.randrange(50) for _ in range(chance.randrange(50))] for _ in range(3)]
    wanted: dict[int, list[int]] = {}
    submits: dict[int, Submit] = {}
    cancelled: set[int] = set()
    for number in range(30):
        stem = chance.choice(stems)
        prompt = stem[: chance.randrange(len(stem) + 1)] + [
            chance.randrange(50) for _ in range(chance.randrange(1, 20))
        ]
        pooling: Pooling | None = chance.choice(["mean", "last"]) if chance.random() < 0.2 else None
        new = 0 if pooling or chance.random() < 0.1 else chance.randrange(1, min(50, blocks * 16 - len(prompt)))
        stops = [chance.randrange(50)] if chance.random() < 0.3 else []
        salt = chance.choice([b"", b"tenant"])
        wanted[number] = text_of(prompt, new, stops)
        resumed = wanted[number][: chance.randrange(new)] if new and not stops and chance.random() < 0.2 else []
        submits[number] = submit(
            number,
            prompt,
            new,
            resumed=resumed,
            stops=stops,
            salt=salt,
            prompt_logprobs=chance.random() < 0.2,
            priority=chance.choice([0, 0, 0, -1, 5]),
            pooling=pooling,
            scored=0 if resumed else chance.randrange(len(prompt)),
        )
        engine.add(submits[number])
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
        got, deltas = engine.text(number), engine.deltas[number]
        assert got == text or (number in cancelled and got == text[: len(got)])
        if number not in cancelled:
            message = submits[number]
            prompt = message.token_ids[: message.prompt_length]
            assert [delta.finish for delta in deltas if delta.finish] == [deltas[-1].finish]
            assert engine.scores(number) == (scores_of(prompt)[message.scored :] if message.prompt_logprobs else [])
            pooled = {None: [], "mean": prompt, "last": prompt[-1:]}[message.pooling]
            assert deltas[-1].embedding == [float(id) for id in pooled]
