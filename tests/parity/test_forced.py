"""Tokens that a grammar forces have the model's own log-probabilities, and what is drawn behind them is what would have
been drawn behind the same ids of any origin."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch

from tests.engine.test_forced import Grammar, Matcher
from tests.parity.conftest import DEVICES, Engine, reference, reference_logits, tokens
from tests.tiny import write_model
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Masks
from tgi.engine.request import Request

RUNS = {0: tokens(7, seed=1).tolist(), 9: tokens(70, seed=2).tolist(), 82: tokens(2, seed=3).tolist()}
"""Number of generated tokens → what must follow."""
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"greedy": False, "seed": 5, "temperature": 1.3},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "logit_bias": {3: 2.0}},
    "watermark": {"greedy": False, "seed": 6, "watermark": (0.5, 3.0)},
    "alternatives": {"top_n_tokens": 3},
}


class Runs(Grammar):
    def __init__(self) -> None:
        super().__init__(0)

    def run(self, generated: Sequence[int]) -> list[int]:
        return RUNS.get(len(generated), [])

    def ends(self, generated: Sequence[int]) -> bool:
        return False


def force(engine: Engine, *submits: Submit) -> None:
    """``Engine.run``, under the grammar."""
    for submit in submits:
        request = Request(0, submit)
        request.follow(cast(Any, Matcher(Runs())), None)
        assert engine.scheduler.add(request) is None
    engine.run()


def asked(number: int, wish: dict[str, Any], new: int = 90, **fields: Any) -> Submit:
    ids = tokens(20 + number, seed=10 + number).tolist()
    return Submit(number, ids, len(ids), new, [], Sampling(**wish), 0.0, **fields)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("blocks", "step_tokens"), [(64, 512), (64, 11), (16, 64)])
def test_their_log_probabilities_are_the_models_own(tmp_path: Path, device: str, blocks: int, step_tokens: int):
    folder = write_model(tmp_path, "llama")
    engine, theirs = Engine(folder, device, blocks=blocks, step_tokens=step_tokens), reference(folder)
    submits = [asked(number, wish, prompt_logprobs=number == 1) for number, wish in enumerate(WISHES.values())]
    force(engine, *submits)
    assert bool(engine.preempted) == (blocks == 16)
    for submit in submits:
        deltas = engine.deltas[submit.id]
        told = [token for delta in deltas for token in delta.tokens]
        text = [token.id for token in told]
        for at, run in RUNS.items():
            assert text[at : at + len(run)] == run
        expected = reference_logits(theirs, torch.tensor(submit.token_ids + text))[:-1].log_softmax(-1)
        scores = [*(token.logprob for delta in deltas for token in delta.prompt), *(token.logprob for token in told)]
        known = torch.tensor([*submit.token_ids, *text][-len(scores) :])
        chosen = expected[-len(scores) :].gather(1, known[:, None]).squeeze(1)
        assert (torch.tensor(scores) - chosen).abs().max() < 1e-4
        best = expected[-len(text) :].topk(3)
        if top := submit.sampling.top_n_tokens:
            assert torch.equal(torch.tensor([[id for id, _ in token.top] for token in told]), best.indices)
        assert {len(token.top) for token in told} == {top}


def test_each_row_is_drawn_under_its_own_mask(tmp_path: Path):
    """Rows stand on the token axis in another order than works."""
    engine = Engine(write_model(tmp_path, "llama"))
    for number, length in enumerate((30, 1, 50, 2)):
        sampling = Sampling(grammar="" if number == 2 else "some")
        submit = Submit(number, tokens(length, seed=number).tolist(), length, 1, [], sampling, 0.0)
        assert engine.scheduler.add(Request(0, submit)) is None
    works = [chunk.work() for chunk in engine.scheduler.schedule().chunks]
    bits = numpy.zeros((3, 54), numpy.uint8)
    for row, allowed in enumerate((70, 71, 73)):
        bits[row, allowed >> 3] |= 1 << (allowed & 7)
    results = engine.runner.sample(engine.runner.launch(works), Masks([0, 1, 3], bits))
    drawn = [result.tokens[-1].id for result in results]
    assert (drawn[0], drawn[1], drawn[3]) == (70, 71, 73)
    assert drawn[2] not in (70, 71, 73)


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES.keys())
def test_what_follows_a_run_is_what_follows_the_same_ids(tmp_path: Path, wish: dict[str, Any]):
    """Draws, penalties and the watermark depend on the ids alone, not on how many came at once."""
    folder = write_model(tmp_path, "llama")
    engine = Engine(folder)
    force(engine, asked(0, wish))
    text = engine.text(0)
    for at, run in RUNS.items():
        end = at + len(run)
        ids, stop = asked(0, wish).token_ids, min((next for next in RUNS if next >= end), default=90)
        again = Engine(folder)
        again.run(Submit(0, [*ids, *text[:end]], len(ids), stop, [], Sampling(**wish), 0.0))
        assert again.text(0) == text[end:stop]
