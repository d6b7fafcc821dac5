"""Steps that are launched before the last one's tokens are known, as on a device that runs by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import DEVICES, Engine, tokens
from tests.parity.test_forced import WISHES, asked, force
from tests.tiny import write_model
from tgi.core.messages import Sampling, Submit

pytestmark = pytest.mark.usefixtures("without_kernels")


def submits() -> list[Submit]:
    """Of many kinds: some end at a token, some are long, one is drawn, one is scored, one is embedded."""
    wishes = [*WISHES.values(), {}, {"greedy": False, "seed": 3}]
    asked = []
    for number, wish in enumerate(wishes):
        ids = tokens(20 + 5 * number, seed=number).tolist()
        stops = list(range(0, 431, 9)) if number % 3 == 1 else []
        scored = number % 4 == 0
        asked.append(Submit(number, ids, len(ids), 30, stops, Sampling(**wish), float(number), scored))
    asked.append(Submit(90, tokens(30).tolist(), 30, 0, [], Sampling(), 90.0, pooling="mean"))
    asked.append(Submit(91, tokens(30).tolist(), 30, 1, [], Sampling(), 91.0))
    return asked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("blocks", "step_tokens"), [(64, 512), (64, 11), (12, 64)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_answers_are_those_of_one_step_after_the_other(
    tmp_path: Path, family: str, blocks: int, step_tokens: int, device: str
):
    folder = write_model(tmp_path, family)
    found = []
    for ahead in (False, True):
        engine = Engine(folder, device, blocks=blocks, step_tokens=step_tokens, ahead=ahead)
        assert engine.runner.ahead is (ahead or device != "cpu")
        if ahead:
            engine.runner.warm(len(engine.scheduler.cache.pools))
        engine.run(*submits())
        assert not engine.faults
        assert bool(engine.preempted) == (blocks == 12)
        found.append({submit.id: answer(engine, submit.id) for submit in submits()})
    for number, (ids, finish, numbers) in found[0].items():
        assert found[1][number][:2] == (ids, finish)
        assert torch.allclose(torch.tensor(found[1][number][2]), torch.tensor(numbers), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("blocks", "step_tokens"), [(64, 512), (64, 11), (16, 64)])
def test_what_a_grammar_forces_comes_out_the_same(tmp_path: Path, device: str, blocks: int, step_tokens: int):
    """A step that was to draw a token scores the one that is known by then."""
    folder = write_model(tmp_path, "llama")
    found = []
    for ahead in (False, True):
        engine = Engine(folder, device, blocks=blocks, step_tokens=step_tokens, ahead=ahead)
        force(engine, *(asked(number, wish) for number, wish in enumerate(WISHES.values())))
        found.append([answer(engine, number) for number in range(len(WISHES))])
    for (ids, finish, numbers), (own_ids, own_finish, own_numbers) in zip(*found, strict=True):
        assert (own_ids, own_finish) == (ids, finish)
        assert torch.allclose(torch.tensor(own_numbers), torch.tensor(numbers), atol=1e-5)


def answer(engine: Engine, number: int) -> tuple[list[int], str | None, list[float]]:
    """Ids, why it ended, and all numbers that were told."""
    deltas = engine.deltas[number]
    numbers = [token.logprob for delta in deltas for token in (*delta.prompt, *delta.tokens)]
    tops = [logprob for delta in deltas for token in delta.tokens for _, logprob in token.top]
    return engine.text(number), deltas[-1].finish, numbers + tops + [x for delta in deltas for x in delta.embedding]


def test_replays_compute_what_steps_do() -> None:
    """In Triton's interpreter, whose kernels read a step where a graph's would."""
    pytest.importorskip("triton")
    checks = Path(__file__).with_name("interpreted_graphs.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
