"""What a grammar forces: every token once, with its own log-probability, and the same text however it is computed.

The grammars are made of hashes: they force runs and end at any place, more wildly than a real one would.
"""

import random
from collections.abc import Sequence

import pytest

from tests.engine.fake_runner import VOCABULARY, digest, next_token
from tests.engine.test_scheduler import Engine, scores_of, submit
from tgi.core.messages import FinishReason, Submit
from tgi.core.plan import Sampled
from tgi.engine.scheduler import Plan


class Grammar:
    """Says of any generated tokens what must follow, and whether nothing can."""

    def __init__(self, seed: int, share: float = 0.5, longest: int = 12, lasting: int = 30) -> None:
        """``share`` of the places force up to ``longest`` tokens; one place in ``lasting`` is an end."""
        self._seed, self._share, self._longest, self._lasting = seed, share, longest, lasting

    def run(self, generated: Sequence[int]) -> list[int]:
        chance = random.Random(digest([self._seed, *generated]))
        if chance.random() > self._share:
            return []
        return [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, self._longest))]

    def ends(self, generated: Sequence[int]) -> bool:
        return digest([1000 + self._seed, *generated]) % self._lasting == 0 and bool(generated)


class Always(Grammar):
    """Forces one text and then ends."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)

    def run(self, generated: Sequence[int]) -> list[int]:
        return self.text[len(generated) :]

    def ends(self, generated: Sequence[int]) -> bool:
        return len(generated) >= len(self.text)


class Matcher:
    """llguidance's, as far as the engine knows it. In the middle of a run it would force something else."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.generated: list[int] = []
        self.error = ""

    def consume_token(self, token: int) -> bool:
        self.generated.append(token)
        return not self.error

    def compute_ff_tokens(self) -> list[int]:
        return [] if self.error else self.grammar.run(self.generated)

    def is_stopped(self) -> bool:
        return bool(self.error) or self.grammar.ends(self.generated)

    def is_error(self) -> bool:
        return bool(self.error)

    def get_error(self) -> str:
        return self.error


def text_of(grammar: Grammar, message: Submit) -> tuple[list[int], FinishReason, int]:
    """What the request must generate, why it ends, and how many of its tokens are forced."""
    tokens = message.token_ids[: message.prompt_length]
    text: list[int] = []
    forced = 0
    run: list[int] = []
    while True:
        if (text and text[-1] in message.stop_token_ids) or grammar.ends(text):
            return text, "eos_token", forced
        if len(text) >= message.max_new_tokens:
            return text, "length", forced
        run = run or grammar.run(text)
        forced += bool(run)
        text.append(run.pop(0) if run else next_token(tokens + text))


class Shaken(Engine):
    """Matchers break on the way, as when a lexer that they share does."""

    chance = random.Random(0)
    often = 0.0
    error = "lexer error: too many states"
    grammars: dict[int, Grammar]

    def disturb(self, plan: Plan) -> None:
        for chunk in plan.chunks:
            matcher = chunk.request.matcher
            if isinstance(matcher, Matcher) and chunk.work().samples and self.chance.random() < self.often:
                matcher.error = self.error

    def book(self, plan: Plan, results: list[Sampled]) -> None:
        super().book(plan, results)
        self.forced += plan.forced
        for request in plan.stuck:
            request.follow(Matcher(self.grammars[request.submit.id]))  # type: ignore[arg-type]  # stands for llguidance's
            assert self.scheduler.add(request) is None

    forced = 0


def run(grammar: Grammar, message: Submit, step_tokens: int = 64) -> Engine:
    engine = Shaken(step_tokens=step_tokens)
    engine.add(message, matcher=Matcher(grammar))
    engine.run()
    return engine


def test_a_run_is_told_with_the_step_that_computes_it():
    class Once(Grammar):
        def run(self, generated: Sequence[int]) -> list[int]:
            return [7, 8, 9] if len(generated) == 2 else []

    engine = run(Once(0, lasting=10**9), message := submit(1, [1, 2, 3], 8))
    text, finish, forced = text_of(Once(0, lasting=10**9), message)
    assert engine.text(1) == text and forced == 3
    assert [len(delta.tokens) for delta in engine.deltas[1]] == [1, 1, 4, 1, 1]
    assert [delta.finish for delta in engine.deltas[1]] == [None] * 4 + [finish]
    assert text[2:5] == [7, 8, 9]


@pytest.mark.parametrize("step_tokens", [3, 64])
def test_what_follows_the_prompt_in_one_way_only_is_computed_with_it(step_tokens: int):
    engine = run(Always(range(10, 20)), submit(1, [1, 2, 3], 30), step_tokens)
    assert engine.text(1) == list(range(10, 20))
    assert engine.deltas[1][-1].finish == "eos_token"
    assert engine.runner.computed == 12, "nothing follows the last token"
    assert len(engine.deltas[1]) == (4 if step_tokens == 3 else 1)


@pytest.mark.parametrize(
    ("new", "stops", "text", "finish"),
    [
        (4, [], [10, 11, 12, 13], "length"),
        (5, [], [10, 11, 12, 13, 14], "eos_token"),
        (5, [12], [10, 11, 12], "eos_token"),
        (3, [12], [10, 11, 12], "eos_token"),
        (1, [], [10], "length"),
    ],
)
def test_a_run_is_cut_by_the_budget_and_by_an_end_token(
    new: int, stops: list[int], text: list[int], finish: FinishReason
):
    engine = run(Always(range(10, 15)), submit(1, [1, 2], new, stops=stops))
    assert engine.text(1) == text
    assert [delta.finish for delta in engine.deltas[1]] == [finish]


def test_without_new_tokens_nothing_is_forced():
    engine = run(Always(range(10, 15)), submit(1, [1, 2], 0, prompt_logprobs=True))
    assert (engine.text(1), engine.scores(1)) == ([], scores_of([1, 2]))
    assert engine.deltas[1][-1].finish == "length"


@pytest.mark.parametrize("step_tokens", [1, 4, 64])
def test_prompt_and_forced_tokens_are_scored_side_by_side(step_tokens: int):
    prompt = list(range(20))
    engine = run(Always(range(20, 40)), submit(1, prompt, 30, prompt_logprobs=True), step_tokens)
    assert engine.scores(1) == scores_of(prompt)
    assert engine.text(1) == list(range(20, 40))


@pytest.mark.parametrize("cut", range(12))
def test_resumed_within_a_run_it_goes_on_as_it_would_have(cut: int):
    grammar = Grammar(3, share=1.0, lasting=1000)
    whole = text_of(grammar, submit(1, [1, 2], 40))[0]
    engine = run(grammar, submit(1, [1, 2], 40, resumed=whole[:cut], prompt_logprobs=True))
    assert engine.text(1) == whole
    assert engine.deltas[1][0].index == cut
    assert engine.scores(1) == scores_of([1, 2])


def test_resumed_at_its_end_it_only_says_so():
    engine = run(Always(range(16)), submit(1, [1, 2], 30, resumed=range(16)))
    (delta,) = engine.deltas[1]
    assert (delta.index, delta.tokens, delta.finish) == (16, [], "eos_token")


def test_the_second_of_two_equal_requests_finds_the_prefix_and_loses_no_forced_token():
    engine = Shaken()
    for number in (1, 2):
        engine.add(submit(number, list(range(40)), 60), matcher=Matcher(Always(range(50))))
        engine.run()
    assert engine.text(2) == engine.text(1) == list(range(50))
    assert engine.deltas[2][0].cached == 32


def test_preempted_before_a_run_was_told_it_is_told_later():
    """The blocks are there for the prompt and the run, but not when the older request has grown."""
    engine = Shaken(blocks=6, step_tokens=12)
    engine.add(submit(1, [1] * 28, 40))
    while not engine.text(1):
        engine.step()
    engine.add(submit(2, [2] * 16, 48), matcher=Matcher(Always(range(45))))
    for _ in range(6):
        engine.step()
    assert engine.preempted == 1
    (request,) = engine.scheduler.waiting
    assert request.submit.id == 2 and request.told < len(request.tokens)
    engine.run()
    assert engine.text(2) == list(range(45))


def test_a_cancelled_run_is_forgotten():
    engine = Shaken(step_tokens=4)
    engine.add(submit(1, [1, 2, 3], 30), matcher=Matcher(Always(range(20))))
    engine.step()
    engine.step()
    engine.scheduler.cancel(0, 1)
    engine.run()
    assert 0 < len(engine.text(1)) < 20


def test_a_matcher_that_a_neighbour_broke_is_made_anew():
    engine = Shaken()
    grammar = Grammar(5, share=0.0, lasting=10**9)
    engine.grammars = {1: grammar}
    engine.add(message := submit(1, [1, 2, 3], 20), matcher=Matcher(grammar))
    for often in (0.0, 1.0, 0.0, 0.0, 1.0):
        engine.often = often
        engine.step()
        engine.error = "Parser Error: token “a” doesn't satisfy the grammar"
    engine.often = 0.0
    engine.run()
    assert engine.text(1) == text_of(grammar, message)[0]
    assert len(engine.deltas[1]) == 20 and not engine.faults


def test_a_matcher_that_breaks_again_at_the_same_place_is_a_fault():
    engine = Shaken()
    engine.grammars = {1: Grammar(5, share=0.0)}
    engine.add(submit(1, [1, 2, 3], 20), matcher=Matcher(engine.grammars[1]))
    engine.often = 1.0
    engine.run()
    assert [fault.message for fault in engine.faults] == ["grammar: lexer error: too many states"]
    assert engine.text(1) == []


def test_an_error_that_a_new_matcher_does_not_mend_is_a_fault_at_once():
    engine = Shaken()
    engine.error = "parser error: too many items"
    engine.often = 1.0
    engine.add(submit(1, [1, 2, 3], 20), matcher=Matcher(Grammar(5, share=0.0)))
    engine.step()
    assert [fault.message for fault in engine.faults] == ["grammar: parser error: too many items"]


def test_with_its_new_matcher_a_request_comes_back_to_its_old_place():
    engine = Shaken(max_running=1)
    engine.grammars = {1: Grammar(5, share=0.0, lasting=10**9)}
    engine.add(submit(1, [1, 2, 3], 4), matcher=Matcher(engine.grammars[1]))
    for number in (2, 3):
        engine.add(submit(number, [number], 4))
    engine.step()
    engine.often = 1.0
    engine.step()
    engine.often = 0.0
    assert [request.submit.id for request in engine.scheduler.waiting] == [1, 2, 3]
    engine.run()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_request_gets_its_own_text(seed: int, ahead: bool):
    """Random grammars, budgets, arrivals, breaking matchers, cancellations, and a cache that is too small."""
    chance = random.Random(seed)
    blocks = chance.choice([8, 12, 20, 64])
    options = chance.choice([3, 5, 16, 33, 200]), chance.choice([1, 3, 16]), chance.random() < 0.8
    engine = Shaken(blocks, *options, windows=(None, 24), ahead=ahead)
    engine.chance, engine.often, engine.grammars = chance, chance.choice([0.0, 0.1]), {}
    submits: dict[int, Submit] = {}
    cancelled: set[int] = set()
    stem = [chance.randrange(VOCABULARY) for _ in range(40)]
    for number in range(25):
        prompt = stem[: chance.randrange(40)] + [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 20))]
        new = chance.randrange(1, min(60, blocks * 16 - len(prompt)))
        stops = [chance.randrange(VOCABULARY)] if chance.random() < 0.3 else []
        grammar = Grammar(chance.randrange(4), chance.random(), chance.choice([3, 12, 40]))
        engine.grammars[number] = grammar
        message = submit(number, prompt, new, stops=stops)
        text = text_of(grammar, message)[0]
        submits[number] = submit(
            number,
            prompt,
            new,
            resumed=text[: chance.randrange(len(text) + 1)] if chance.random() < 0.3 else [],
            stops=stops,
            prompt_logprobs=chance.random() < 0.3,
            priority=chance.choice([0, 0, 0, -1, 5]),
        )
        engine.add(submits[number], matcher=Matcher(grammar))
        for _ in range(chance.randrange(4)):
            if not engine.scheduler.idle:
                engine.step()
        if chance.random() < 0.1:
            victim = chance.randrange(number + 1)
            engine.scheduler.cancel(0, victim)
            cancelled.add(victim)
            engine.scheduler.check_integrity()
    engine.run()
    broken = {fault.id for fault in engine.faults}
    assert engine.often or not broken
    told = 0
    for number, message in submits.items():
        text, finish, forced = text_of(engine.grammars[number], message)
        got, deltas = engine.text(number), engine.deltas[number]
        if number in cancelled | broken:
            assert got == text[: len(got)]
            continue
        assert got == text
        assert [delta.finish for delta in deltas if delta.finish] == [deltas[-1].finish] == [finish]
        prompt = message.token_ids[: message.prompt_length]
        assert engine.scores(number) == (scores_of(prompt) if message.prompt_logprobs else [])
        told += forced if len(message.token_ids) == message.prompt_length else 0
    assert engine.forced >= told > 0
