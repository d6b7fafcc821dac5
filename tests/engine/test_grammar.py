"""Grammars in the step loop: real llguidance and a real tokenizer, with a runner that draws from the masks alone."""

import itertools
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
from llguidance import LLMatcher, LLParserLimits

from tests import small_tokenizers
from tests.engine.fake_runner import FakeRunner
from tgi.core.config import KVPool
from tgi.core.grammar import start
from tgi.core.messages import Cancel, Delta, Hello, Sampling, Step, Submit, ToEngine, ToRouter
from tgi.core.plan import Masks, Sampled, Work
from tgi.core.vocabulary import Vocabulary
from tgi.engine.loop import Loop
from tgi.engine.mailbox import Mailbox
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler

TOKENIZER = small_tokenizers.byte_level()
END = TOKENIZER.token_to_id("</s>")
PLATE = LLMatcher.grammar_from_regex("[a-z]{3}-[0-9]{2}")
WORDS = LLMatcher.grammar_from_regex("(the |cat |dog ){1,40}")
PERSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 999}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"whitespace_flexible": False},
)


class Runner(FakeRunner):
    """Draws what the masks allow, by a hash of the tokens generated so far; without a mask always the same token."""

    vocab_size = 400  # the tokenizer has fewer
    alike = True
    """Whatever the prompt."""

    def sample(self, launched: Sequence[Work], masks: Masks | None = None) -> list[Sampled]:
        rows = [index for index, work in enumerate(launched) if work.samples and work.submit.sampling.grammar]
        assert rows == ([] if masks is None else masks.rows)
        drawn = dict.fromkeys(range(len(launched)), 5)
        if masks is not None:
            allowed = numpy.unpackbits(masks.bits, 1, self.vocab_size, "little")
            for row, index in zip(allowed, masks.rows, strict=True):
                work = launched[index]
                chance = random.Random(str(work.tokens[work.submit.prompt_length if self.alike else 0 :]))
                drawn[index] = chance.choice([int(token) for token in row.nonzero()[0]])
        return [self.sampled(work, drawn[index]) for index, work in enumerate(launched)]


class Post:
    """Stands for the mailbox."""

    oldest = 0

    def __init__(self) -> None:
        self.inbox: list[ToEngine] = []
        self.sent: list[ToRouter] = []
        self._news = threading.Event()

    def poll(self, *, wait: bool) -> Iterator[tuple[int, ToEngine]]:
        if wait and not self.inbox:
            assert self._news.wait(20), "nothing happens any more"
        self._news.clear()
        inbox, self.inbox = self.inbox, []
        yield from ((0, message) for message in inbox)

    def wake(self) -> None:
        self._news.set()

    def send(self, router: int, message: ToRouter) -> None:
        self.sent.append(message)


class Engine:
    """The loop, stepped until all requests have ended."""

    def __init__(self, folder: Path, blocks: int = 64, tokenizer: str | None = None, *, ahead: bool = False) -> None:
        (folder / "tokenizer.json").write_text(tokenizer or TOKENIZER.to_str(), encoding="utf-8")
        self.post = Post()
        self.scheduler = Scheduler(pools=[KVPool(blocks)], step_tokens=64, max_running=16, ahead=ahead)
        self.loop = Loop(
            cast(Mailbox, self.post),
            self.scheduler,
            cast(Any, Runner(self.scheduler.cache.sizes, ahead=ahead)),
            lambda: Vocabulary.load(folder),
        )
        self.preempted = 0

    def run(self, *submits: Submit) -> dict[int, list[Delta]]:
        """The deltas of each request that has no fault."""
        self.post.inbox += submits
        while not self._ended().issuperset(submit.id for submit in submits):
            self.loop.take()
            if not self.scheduler.idle:
                self.loop.step()
                self.scheduler.check_integrity()
        assert self.scheduler.settle() is None
        return {submit.id: [d for d in self.deltas if d.id == submit.id] for submit in submits}

    @property
    def deltas(self) -> list[Delta]:
        return [delta for step in self.post.sent if isinstance(step, Step) for delta in step.deltas]

    @property
    def forced(self) -> int:
        return sum(step.stats.forced for step in self.post.sent if isinstance(step, Step) and step.stats is not None)

    @property
    def faults(self) -> dict[int, str]:
        steps = [step for step in self.post.sent if isinstance(step, Step)]
        return {fault.id: fault.message for step in steps for fault in step.faults}

    def _ended(self) -> set[int]:
        return {delta.id for delta in self.deltas if delta.finish} | self.faults.keys()


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine(tmp_path, ahead=request.param)


def submit(
    number: int,
    grammar: str,
    new: int = 100,
    *,
    resumed: Sequence[int] = (),
    stops: Sequence[int] = (END,),
    ends: Sequence[int] = (END,),
    min_tokens: int = 0,
) -> Submit:
    sampling = Sampling(min_tokens=min_tokens, grammar=grammar, end_token_ids=list(ends) if grammar else [])
    prompt = [10 + number % 100, 11, 12]
    return Submit(number, [*prompt, *resumed], len(prompt), new, list(stops), sampling, 0.0)


def ids(deltas: list[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def text(deltas: list[Delta]) -> str:
    return TOKENIZER.decode([token for token in ids(deltas) if token != END], skip_special_tokens=False)


def test_the_text_is_what_the_grammar_says_and_ends_when_nothing_can_follow(engine: Engine):
    answers = engine.run(*(submit(number, PLATE) for number in range(20)))
    assert len({text(deltas) for deltas in answers.values()}) == 1  # one draw, by the tokens generated
    for deltas in answers.values():
        assert re.fullmatch("[a-z]{3}-[0-9]{2}", text(deltas))
        assert deltas[-1].finish == "eos_token"
        assert END not in ids(deltas)  # no step was spent on it


def test_the_end_token_is_allowed_where_the_grammar_may_end(engine: Engine):
    found = set()
    for number in range(30):
        grammar = LLMatcher.grammar_from_regex(f"(?:{number})?(ab|c)+")
        (deltas,) = engine.run(submit(number, grammar)).values()
        assert re.fullmatch(f"({number})?(ab|c)+", text(deltas))
        if deltas[-1].finish == "eos_token":
            assert ids(deltas)[-1] == END
            found.add(number)
    assert found


def test_requests_with_and_without_a_grammar_run_together_as_alone(tmp_path: Path):
    grammars = [PLATE, "", PERSON, "", WORDS, PERSON]
    together = Engine(tmp_path).run(*(submit(n, grammar, 50) for n, grammar in enumerate(grammars)))
    for number, grammar in enumerate(grammars):
        (alone,) = Engine(tmp_path).run(submit(number, grammar, 50)).values()
        assert ids(alone) == ids(together[number])
    person = json.loads(text(together[2]))
    assert len(person["name"]) <= 5 and person["age"] <= 999


def test_a_preempted_request_goes_on_in_its_grammar(tmp_path: Path):
    (alone,) = Engine(tmp_path).run(submit(0, WORDS)).values()
    assert len(ids(alone)) > 40
    small = Engine(tmp_path, blocks=8)
    schedule = small.scheduler.schedule

    def counted() -> Any:
        plan = schedule()
        small.preempted += plan.preempted
        return plan

    small.scheduler.schedule = counted  # type: ignore[method-assign]  # the test looks at the plans
    together = small.run(*(submit(number, WORDS) for number in range(6)))
    assert small.preempted
    assert all(ids(deltas) == ids(alone) for deltas in together.values())


def test_a_resumed_request_goes_on_in_its_grammar(tmp_path: Path):
    (whole,) = Engine(tmp_path).run(submit(0, PERSON)).values()
    expected = ids(whole)
    for cut in (1, len(expected) // 2, len(expected) - 1):
        (rest,) = Engine(tmp_path).run(submit(0, PERSON, resumed=expected[:cut])).values()
        assert ids(rest) == expected[cut:]
        assert rest[0].index == cut
        assert rest[-1].finish == "eos_token"


def test_a_cut_answer_says_length_and_a_whole_one_does_not(tmp_path: Path):
    (whole,) = Engine(tmp_path).run(submit(0, PERSON)).values()
    count = len(ids(whole))
    (cut,) = Engine(tmp_path).run(submit(0, PERSON, count - 1)).values()
    (just,) = Engine(tmp_path).run(submit(0, PERSON, count)).values()
    assert cut[-1].finish == "length"
    assert just[-1].finish == "eos_token"


def test_forced_tokens_are_those_that_masks_would_force_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grammars = [
        PERSON,
        PLATE,
        LLMatcher.grammar_from_regex("the (quick brown fox|lazy dog) jumps[.!] Yes, it jumps\\."),
    ]
    submits = [submit(number, grammars[number % 3], min_tokens=number) for number in range(6)]
    jumping = Engine(tmp_path)
    jumped = jumping.run(*submits)
    monkeypatch.setattr(Request, "_forced", lambda request: [])
    walking = Engine(tmp_path)
    walked = walking.run(*submits)
    assert {n: ids(deltas) for n, deltas in jumped.items()} == {n: ids(deltas) for n, deltas in walked.items()}
    saved = sum(len(deltas) for deltas in walked.values()) - sum(len(deltas) for deltas in jumped.values())
    assert 0 < saved <= jumping.forced
    assert walking.forced == 0


@pytest.mark.parametrize(("new", "finish"), [(100, "eos_token"), (3, "length")])
def test_what_can_only_be_said_in_one_way_takes_one_step(engine: Engine, new: int, finish: str):
    grammar = LLMatcher.grammar_from_regex("the cat sat on the mat")
    (deltas,) = engine.run(submit(1, grammar, new)).values()
    assert [delta.finish for delta in deltas] == [finish]
    assert "the cat sat on the mat".startswith(text(deltas))
    assert (text(deltas) == "the cat sat on the mat") == (finish == "eos_token")


def test_requests_that_share_a_lexer_go_on_when_together_they_ask_too_much_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    renewed = []
    renews = Request.renews
    monkeypatch.setattr(Request, "renews", lambda request, failure: renewed.append(failure) or renews(request, failure))
    monkeypatch.setattr("tgi.core.grammar.LIMITS", LLParserLimits(max_lexer_states=1500, verbose_errors=False))
    monkeypatch.setattr(Runner, "alike", False)
    submits = [submit(number, LLMatcher.grammar_from_regex(r"(\w{1,30} ){1,30}x"), 40) for number in range(11)]
    alone = {number: ids(deltas) for each in submits for number, deltas in Engine(tmp_path).run(each).items()}
    assert not renewed
    engine = Engine(tmp_path)
    together = engine.run(*submits[:8])
    assert renewed and all("too many states" in failure for failure in renewed)
    renewed.clear()
    for each in submits[8:]:
        together |= engine.run(each)
    # Masks are made by several threads: how full the last lexer is depends on who came first.
    assert len(renewed) < len(submits[8:]), "the full lexer isn't kept"
    assert {number: ids(deltas) for number, deltas in together.items()} == alone


def test_compiled_grammars_are_kept_up_to_a_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, *others = (LLMatcher.grammar_from_regex(f"{name}[a-z]") for name in "abcd")
    compiled = []

    def counted(tokenizer: Any, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        return start(tokenizer, grammar)

    monkeypatch.setattr("tgi.core.grammar.start", counted)
    monkeypatch.setattr("tgi.engine.grammar._KEPT", 3.5e9)
    monkeypatch.setattr("tgi.engine.grammar._size", lambda seconds: 10**9)
    engine = Engine(tmp_path)
    number = itertools.count()
    for grammar in (first, *others[:2], first, others[2], first, others[0]):
        engine.run(submit(next(number), grammar))
    assert compiled == [first, *others, others[0]], "the first was used again and again, the second least recently"


def test_ignored_end_tokens_come_only_when_nothing_else_can(engine: Engine):
    answers = engine.run(submit(1, WORDS, 500, stops=()), submit(2, PLATE, 500, stops=()))
    assert len(text(answers[1]).split()) == 40
    assert answers[1][-1].finish == answers[2][-1].finish == "eos_token"


def test_min_tokens_keeps_the_end_away_until_nothing_else_can_follow(engine: Engine):
    maybe = LLMatcher.grammar_from_regex("(a |b )*")
    answers = engine.run(*(submit(number, maybe, 60, min_tokens=40) for number in range(1, 4)))
    assert all(len(ids(deltas)) >= 40 for deltas in answers.values())
    (short,) = engine.run(submit(9, PLATE, min_tokens=40)).values()
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", text(short))
    assert short[-1].finish == "eos_token"


def test_min_tokens_yields_where_every_way_is_a_stop_token(engine: Engine):
    stops = TOKENIZER.encode("ab", add_special_tokens=False).ids
    assert len(stops) == 2
    (deltas,) = engine.run(submit(1, LLMatcher.grammar_from_regex("x[ab]"), min_tokens=9, stops=stops)).values()
    assert text(deltas) in ("xa", "xb")


def test_end_tokens_that_the_model_does_not_have_do_no_harm(engine: Engine):
    (deltas,) = engine.run(submit(1, WORDS, ends=[END, 10_000], stops=[10_000])).values()
    assert len(text(deltas).split()) == 40


def test_a_wrong_grammar_is_a_fault_of_its_request_alone(engine: Engine):
    unclosed = LLMatcher.grammar_from_regex("(a")
    answers = engine.run(submit(1, unclosed), submit(2, PLATE), submit(3, "", 20), submit(4, "start: nothing"))
    assert engine.faults.keys() == {1, 4}
    assert "unclosed group" in engine.faults[1]
    assert "nothing" in engine.faults[4]
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", text(answers[2]))
    assert len(ids(answers[3])) == 20


def test_a_grammar_that_grows_too_complex_is_a_fault_of_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Ways that can be read in ever more ways."""
    monkeypatch.setattr("tgi.core.grammar.LIMITS", LLParserLimits(step_max_items=300, verbose_errors=False))
    growing = json.dumps({"grammars": [{"lark_grammar": 'start: e\ne: e e | "(" e ")" | /[a-z]/'}]})
    answers = engine.run(submit(1, growing, stops=()), submit(2, WORDS))
    assert engine.faults.keys() == {1}
    assert re.fullmatch("grammar: [^<\n]+ Too many items [^<\n]+", engine.faults[1])
    assert text(answers[1])
    assert answers[2][-1].finish == "eos_token"


def test_a_model_without_an_end_token_is_a_fault_of_those_with_a_grammar(engine: Engine):
    answers = engine.run(submit(1, PLATE, ends=[]), submit(2, "", 7))
    assert "no end token" in engine.faults[1]
    assert len(ids(answers[2])) == 7


def test_a_cancelled_request_is_not_run_though_its_grammar_was_being_compiled(engine: Engine):
    loop = engine.loop
    engine.post.inbox += [submit(1, PLATE), Cancel(1), submit(2, PLATE)]
    while engine.scheduler.idle:
        loop.take()
    while not engine.scheduler.idle:
        assert [request.submit.id for request in engine.scheduler.requests] == [2]
        loop.step()
    assert {delta.id for delta in engine.deltas} == {2}
    assert not engine.faults


def test_without_grammars_llguidance_is_not_loaded():
    """It would cost every engine its memory."""
    script = (
        "import sys, tgi.engine.loop, tgi.engine.process, tgi.router.app\n"
        "print('llguidance' in sys.modules, 'tgi.core.grammar' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]


def test_waking_ends_a_poll_and_is_never_heard(tmp_path: Path):
    mailbox = Mailbox(tmp_path / "engine.sock", Hello(1))
    threading.Timer(0.05, lambda: [mailbox.wake() for _ in range(100_000)]).start()
    assert list(mailbox.poll(wait=True)) == []
    threading.Event().wait(0.5)
    for _ in range(10):
        assert list(mailbox.poll(wait=False)) == []
    mailbox.close()
