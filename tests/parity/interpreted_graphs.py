"""Captured steps with a graph's stand-in, which runs the captured Python again: it reads what a graph would, the same
memory. On a GPU these are graphs. test_ahead.py runs this in a process of its own, with Triton's interpreter."""

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import Engine, reference, reference_logits, tokens
from tests.parity.test_ahead import answer
from tests.tiny import write_model
from tgi.attention.triton import TritonAttention
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime.forward import Captured, Eager, Graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 2)

pytestmark = pytest.mark.usefixtures("without_library")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.kernels.library.library", lambda: None)
    monkeypatch.setattr("tgi.runtime.kvcache.BACKENDS", (TritonAttention,))
    monkeypatch.setattr("tgi.runtime.runner.library", lambda: None)


class Again:
    """Stands for Graphs."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        hidden = run()

        def replay() -> None:
            self.replays += 1
            hidden.copy_(run())

        return replay, hidden


def submits(count: int) -> list[Submit]:
    prompts = [tokens(12 + 5 * number, seed=number).tolist() for number in range(count)]
    return [
        Submit(
            number, ids, len(ids), 2 + number, [], Sampling(top_n_tokens=2, greedy=number != 1, seed=5), float(number)
        )
        for number, ids in enumerate(prompts)
    ]


@pytest.mark.parametrize("family", ["gemma3"])
def test_replays_compute_what_steps_do(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path, family, num_hidden_layers=2, sliding_window_pattern=2)
    found = []
    for captures in (False, True):
        engine = Engine(folder, DEVICE, ahead=True)
        eager, again = engine.runner._forward, Again()
        assert isinstance(eager, Eager) and eager.cache.static and engine.runner._sampler._triton is not None
        if captures:
            record = Graphs() if DEVICE == "cuda" else again
            forward = engine.runner._forward = Captured(eager, SIZES, torch.device(DEVICE), record)
            while engine.runner.capture():
                pass
            assert not forward.uncaptured and set(forward._replays) == set(SIZES)
        # Three requests are more than the largest graph: the last ones' steps are replayed when the others have ended.
        engine.run(*submits(3))
        assert again.replays > 0 or DEVICE == "cuda" or not captures
        found.append([answer(engine, number) for number in range(3)])
    theirs = reference(folder).to(DEVICE)
    for submit, (ids, finish, numbers), (own_ids, own_finish, own_numbers) in zip(submits(3), *found, strict=True):
        if submit.sampling.greedy:
            told = reference_logits(theirs, torch.tensor(submit.token_ids + ids, device=DEVICE))
            assert told[submit.prompt_length - 1 : -1].argmax(-1).tolist() == ids
        assert (own_ids, own_finish) == (ids, finish)
        assert torch.allclose(torch.tensor(own_numbers), torch.tensor(numbers), atol=1e-5)


def test_what_has_no_room_runs_step_by_step(tmp_path: Path) -> None:
    """Requests that share their pages may have more of them, all together, than there are."""
    engine = Engine(write_model(tmp_path, "llama"), DEVICE, blocks=8, ahead=True)
    eager, again = engine.runner._forward, Again()
    assert isinstance(eager, Eager)
    engine.runner._forward = Captured(eager, [4], torch.device(DEVICE), again)
    engine.runner.capture()
    ids = tokens(120).tolist()
    submit = Submit(0, ids, 120, 3, [], Sampling(), 0.0)
    for count, replays in ((2, 1), (3, 1)):
        works = [Work(submit, ids, 119, 1, 120, True, [array("i", range(8))], {}) for _ in range(count)]
        sampled = engine.runner.sample(engine.runner.launch(works))
        assert again.replays == replays
        assert len({str(each.tokens) for each in sampled}) == 1
