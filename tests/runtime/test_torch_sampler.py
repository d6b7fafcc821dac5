"""Torch's sampler, piece by piece, against plain definitions of each rule."""

import random
from typing import Any

import pytest
import torch

from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime import torch_sampler

VOCABULARY = 1000


def work(
    sampling: Sampling, prompt: list[int], generated: list[int] | None = None, stops: list[int] | None = None
) -> Work:
    tokens = prompt + (generated or [])
    submit = Submit(0, prompt, len(prompt), 100, stops or [], sampling, 0.0)
    return Work(submit, tokens, len(tokens) - 1, 1, len(tokens), True, [], {})


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def test_repetition_penalty_hits_each_id_of_prompt_and_text_once(logits: torch.Tensor):
    row = logits[0].clone()
    prompt, generated = [5, 5, 6], [7, 7, 7]
    row[0] = 100.0  # no padding id is penalised unless it is there
    expected = row.clone()
    for token in (5, 6, 7):
        expected[token] = row[token] / 1.7 if row[token] > 0 else row[token] * 1.7
    assert torch.equal(_penalized(row, Sampling(repetition_penalty=1.7), prompt, generated), expected)


def test_frequency_and_presence_penalties_count_generated_tokens(logits: torch.Tensor):
    row = logits[0]
    prompt, generated = [5, 5, 6], [6, 7, 7, 7]
    expected = row.clone()
    expected[6] -= 0.5 * 1 + 0.25
    expected[7] -= 0.5 * 3 + 0.25
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    torch.testing.assert_close(_penalized(row, sampling, prompt, generated), expected)


def test_history_built_step_by_step_equals_history_built_at_once(logits: torch.Tensor):
    chance = random.Random(0)
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2, logit_bias={3: 2.5})
    tokens = [chance.randrange(VOCABULARY) for _ in range(900)]
    submit = Submit(0, tokens[:10], 10, 2000, [], sampling, 0.0)
    scratch: dict[str, Any] = {}
    for end in (10, 11, 12, 200, 201, 899, 900):
        stepped = Work(submit, tokens[:end], end - 1, 1, end, True, [], scratch)
        fresh = Work(submit, tokens[:end], end - 1, 1, end, True, [], {})
        rows = []
        for item in (stepped, fresh):
            row = logits[0].clone()
            torch_sampler._History.of(item, row.device).apply(row, sampling)
            rows.append(row)
        assert torch.equal(*rows)


def _penalized(row: torch.Tensor, sampling: Sampling, prompt: list[int], generated: list[int]) -> torch.Tensor:
    row = row.clone()
    torch_sampler._History.of(work(sampling, prompt, generated), row.device).apply(row, sampling)
    return row


@pytest.mark.parametrize("flat", [1.0, 30.0])
@pytest.mark.parametrize("candidates", [4, 1024])
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    logits: torch.Tensor, flat: float, candidates: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_sampler, "_CANDIDATES", candidates)  # few: the sorted path
    row = logits[:1] / flat
    probs, order = row[0].softmax(-1).sort(descending=True)
    count = int((probs.cumsum(-1) < 0.6).sum()) + 1
    kept = torch_sampler._top_p(row, torch.tensor([0.6]))[0].isfinite().nonzero().squeeze(1)
    assert set(kept.tolist()) == set(order[:count].tolist())


def test_typical_p_keeps_the_tokens_nearest_to_the_entropy(logits: torch.Tensor):
    row = logits[0]
    logprobs = row.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum()
    order = (-logprobs - entropy).abs().argsort()
    mass = logprobs.exp()[order].cumsum(-1)
    count = int((mass < 0.4).sum()) + 1
    kept = torch_sampler._typical_p(logits[:1], torch.tensor([0.4]))[0].isfinite().nonzero().squeeze(1)
    assert set(kept.tolist()) == set(order[:count].tolist())


@pytest.mark.parametrize("p", [1e-3, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_is_not_too_far_below_the_likeliest(logits: torch.Tensor, p: float):
    """As transformers' and vLLM's definition: p_i >= min_p * p_max."""
    probs = logits[0].softmax(-1)
    kept = torch_sampler._min_p(logits[:1], torch.tensor([p]))[0].isfinite()
    assert torch.equal(kept, probs >= p * probs.max())
    assert int(kept.sum()) < VOCABULARY


@pytest.mark.parametrize(("prompt", "generated"), [([1, 2], [77]), ([77], [])])
def test_a_watermark_favours_the_green_list_of_the_last_token(
    logits: torch.Tensor, prompt: list[int], generated: list[int]
):
    permutation = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(15485863 * 77))
    expected = logits[0].clone()
    expected[permutation[: int(0.3 * VOCABULARY)]] += 2.5
    row = logits[0].clone()
    torch_sampler._change(row, work(Sampling(watermark=(0.3, 2.5)), prompt, generated))
    assert torch.equal(row, expected)


def test_random_numbers_are_spread_over_seeds_positions_and_counters():
    counters = torch.arange(10_000)
    keys = [
        ([torch_sampler._key(7, 3)], counters),
        ([torch_sampler._key(seed, 3) for seed in range(10_000)], torch.tensor([5])),
        ([torch_sampler._key(3, position) for position in range(10_000)], torch.tensor([5])),
    ]
    for rows, counter in keys:
        points = torch_sampler._exponential(torch.tensor(rows), counter).neg().exp().flatten()
        assert bool(((points > 0) & (points < 1)).all())
        counts = torch.histc(points, 20, 0, 1)
        assert float(((counts - 500) ** 2 / 500).sum()) < 50  # chi-squared, 19 degrees of freedom
    assert torch_sampler._key(2**64 - 1, 0) != torch_sampler._key(0, 0)


def test_the_generator_is_splitmix64():
    """The first numbers of the published generator from state 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    points = torch_sampler._exponential(torch.tensor([1234567]), torch.tensor([1, 2, 3])).neg().exp()[0]
    assert points.tolist() == pytest.approx([x / 2**64 for x in expected], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_draw_never_falls_on_a_removed_token(seed: int):
    row = torch.full((3, 700), float("-inf"))
    row[0, 0] = row[1, 699] = row[2, 300] = row[2, 400] = 1.0
    ids = torch_sampler._draw(row, torch.tensor([torch_sampler._key(seed, at) for at in range(3)]))
    assert ids[:2].tolist() == [0, 699]
    assert int(ids[2]) in (300, 400)
