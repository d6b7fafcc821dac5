"""Prompt log-probabilities, the likeliest tokens at their places, and embeddings are transformers', however the
scheduler cuts a prompt, whatever runs beside it, and after preemption."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import DEVICES, Engine, reference, reference_logits, tokens
from tests.tiny import write_model
from tgi.core.messages import Delta, Pooling, Sampling, Submit
from tgi.runtime.sampler import NOT_A_NUMBER

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "granite": ("granite", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
EVERY = pytest.mark.parametrize("folder", MODELS.values(), ids=MODELS.keys(), indirect=True)
DEVICE = pytest.mark.parametrize("device", DEVICES)


def score(number: int, ids: list[int], top: int, new: int = 0, *, greedy: bool = True) -> Submit:
    sampling = Sampling(greedy=greedy, top_n_tokens=top, repetition_penalty=1.5)
    return Submit(number, ids, len(ids), new, [], sampling, 0.0, prompt_logprobs=True)


def pool(number: int, ids: list[int], pooling: Pooling) -> Submit:
    return Submit(number, ids, len(ids), 0, [], Sampling(), 0.0, pooling=pooling)


def embedding(engine: Engine, number: int) -> torch.Tensor:
    (delta,) = engine.deltas[number]
    assert (delta.finish, delta.tokens) == ("length", [])
    return torch.tensor(delta.embedding)


def check_scores(deltas: Sequence[Delta], theirs: torch.nn.Module, ids: Sequence[int], top: int) -> None:
    expected = reference_logits(theirs, torch.tensor(ids))[:-1].log_softmax(-1)
    prompt = [token for delta in deltas for token in delta.prompt]
    assert len(prompt) == len(ids) - 1
    chosen = expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert (torch.tensor([token.logprob for token in prompt]) - chosen).abs().max() < 1e-4
    best = expected.topk(top)
    ours = torch.tensor([token.top for token in prompt])
    assert ours.shape[1] == top
    if top:
        assert torch.equal(ours[:, :, 0].long(), best.indices)
        assert (ours[:, :, 1] - best.values).abs().max() < 1e-4


@torch.inference_mode()
def hidden_states(theirs: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    states: torch.Tensor = theirs.model(torch.tensor([ids])).last_hidden_state[0]  # type: ignore[operator]  # a module of transformers
    return states


@EVERY
@DEVICE
@pytest.mark.parametrize("step_tokens", [17, 512])
def test_side_by_side(folder: Path, device: str, step_tokens: int):
    """Long prompts and short ones together, in one step each and in many chunks."""
    ids = [tokens(length, seed=length).tolist() for length in (200, 2, 65, 1, 130)]
    engine, theirs = Engine(folder, device, step_tokens=step_tokens), reference(folder)
    engine.run(
        score(0, ids[0], 3),
        score(1, ids[1], 1, new=4, greedy=False),
        score(2, ids[2], 0, new=2),
        score(3, ids[3], 2, new=1),
        pool(4, ids[4], "mean"),
        pool(5, ids[4], "last"),
        pool(6, ids[3], "mean"),
    )
    for number, top in enumerate((3, 1, 0)):
        check_scores(engine.deltas[number], theirs, ids[number], top)
    assert [delta.prompt for delta in engine.deltas[3]] == [[]]
    states = hidden_states(theirs, ids[4])
    torch.testing.assert_close(embedding(engine, 4), states.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(embedding(engine, 5), states[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(embedding(engine, 6), hidden_states(theirs, ids[3])[0], atol=1e-4, rtol=0)


@EVERY
@pytest.mark.parametrize("kind", ["score", "mean", "last"])
def test_preempted_in_the_middle_of_the_prompt(folder: Path, kind: str):
    """The cache holds the older request and the prompt, until the older one grows."""
    engine, theirs = Engine(folder, blocks=9, step_tokens=24), reference(folder)
    older = Submit(0, tokens(30).tolist(), 30, 60, [], Sampling(), 0.0)
    ids = tokens(100, seed=1).tolist()
    prompt = score(1, ids, 2) if kind == "score" else pool(1, ids, "mean" if kind == "mean" else "last")
    engine.run(older, prompt)
    assert engine.preempted == {1}
    if kind == "score":
        check_scores(engine.deltas[1], theirs, ids, 2)
        return
    states = hidden_states(theirs, ids)
    expected = states.mean(0) if kind == "mean" else states[-1]
    torch.testing.assert_close(embedding(engine, 1), expected, atol=1e-4, rtol=0)


def test_a_cached_prompt_has_the_same_mean_last_state_and_scores(tmp_path: Path):
    engine = Engine(write_model(tmp_path, "llama"))
    ids = tokens(70).tolist()
    for first in (0, 3):
        for number, submit in enumerate((pool(first, ids, "mean"), pool(first + 1, ids, "last")), first):
            engine.run(submit)
            assert (engine.deltas[number][0].cached > 0) == (number in (1, 4))
        engine.run(score(first + 2, ids, 2))
    for number in (0, 1):
        torch.testing.assert_close(embedding(engine, number + 3), embedding(engine, number), atol=1e-5, rtol=0)
    assert engine.deltas[2][0].prompt == engine.deltas[5][0].prompt


def test_what_is_not_a_number_ends_its_request_alone(tmp_path: Path):
    engine = Engine(write_model(tmp_path, "llama"))
    with torch.inference_mode():
        table = engine.model._embed.table
        row = table[7] if isinstance(table, torch.Tensor) else table.panels.weight[0, :, 7]
        row.fill_(float("nan"))  # type: ignore[attr-defined]  # damage that no file can bring
    fine, broken = [5, 6, 8, 9], [5, 6, 7, 8]
    engine.run(
        pool(0, broken, "mean"),
        pool(1, broken, "last"),
        score(2, broken, 2),
        score(3, fine, 2),
        pool(4, fine, "mean"),
    )
    assert sorted((fault.id, fault.message) for fault in engine.faults) == [(n, NOT_A_NUMBER) for n in range(3)]
    assert len(engine.deltas[3][0].prompt) == 3 and embedding(engine, 4).isfinite().all()
