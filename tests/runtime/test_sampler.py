"""The sampler, by torch and by kernel, against plain definitions of each rule, and its independence of the batch."""

import math
import random
from typing import Any

import pytest
import torch

from tgi.core import watermark
from tgi.core.messages import Sampling, Submit, Token
from tgi.core.plan import Work
from tgi.runtime.sampler import Sampler

VOCABULARY = 1000


def work(
    sampling: Sampling, prompt: list[int], generated: list[int] | None = None, stops: list[int] | None = None
) -> Work:
    tokens = prompt + (generated or [])
    submit = Submit(0, prompt, len(prompt), 100, stops or [], sampling, 0.0)
    return Work(submit, tokens, len(tokens) - 1, 1, len(tokens), True, [], {})


def drawn(sampler: Sampler, logits: torch.Tensor, *works: Work) -> list[Token]:
    tokens = sampler.sample(logits, works)
    assert all(isinstance(token, Token) for token in tokens)
    return [token for token in tokens if isinstance(token, Token)]


def support(sampler: Sampler, logits: torch.Tensor, **fields: Any) -> set[int]:
    """All tokens that come up in many draws of one row."""
    works = [work(Sampling(greedy=False, seed=seed, **fields), [1]) for seed in range(2000)]
    return {token.id for token in drawn(sampler, logits.expand(len(works), -1), *works)}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def test_greedy_takes_the_largest_with_the_models_own_logprob(sampler: Sampler, logits: torch.Tensor):
    tokens = drawn(sampler, logits, *[work(Sampling(repetition_penalty=1.0), [1])] * 8)
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).amax(-1).tolist()
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-5)


def test_logprobs_are_taken_before_penalties_and_temperature(sampler: Sampler, logits: torch.Tensor):
    row = logits[:1]
    best = int(row.argmax())
    (token,) = drawn(sampler, row, work(Sampling(logit_bias={best: -100.0}), [1]))
    assert token.id == int(row[0].topk(2).indices[1])
    assert token.logprob == pytest.approx(float(row.log_softmax(-1)[0, token.id]), abs=1e-5)


def test_top_tokens_are_the_most_likely_in_order_and_no_more_than_asked(sampler: Sampler, logits: torch.Tensor):
    works = [work(Sampling(top_n_tokens=n), [1]) for n in (0, 3, 1, 5, 0, 0, 2, 4)]
    for row, (token, item) in enumerate(zip(drawn(sampler, logits, *works), works, strict=True)):
        expected = logits[row].log_softmax(-1).topk(item.submit.sampling.top_n_tokens)
        assert [id for id, _ in token.top] == expected.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_top_k_keeps_k(sampler: Sampler, logits: torch.Tensor):
    assert support(sampler, logits[:1] / 10, top_k=5) == set(logits[0].topk(5).indices.tolist())
    assert support(sampler, logits[:1], top_k=1) == {int(logits[0].argmax())}
    assert len(support(sampler, logits[:1] / 100, top_k=10 * VOCABULARY)) > VOCABULARY / 2


def test_min_p_looks_at_the_tempered_probabilities(sampler: Sampler, logits: torch.Tensor):
    probs = (logits[0] / 2.0).softmax(-1)
    expected = set((probs >= 0.3 * probs.max()).nonzero().squeeze(1).tolist())
    assert len(expected) > int((logits[0].softmax(-1) >= 0.3 * logits[0].softmax(-1).max()).sum())
    assert support(sampler, logits[:1], temperature=2.0, min_p=0.3) == expected
    (greedy,) = drawn(sampler, logits[:1], work(Sampling(min_p=0.3), [1]))
    assert greedy.id == int(logits[0].argmax())


@pytest.mark.parametrize("greedy", [True, False])
def test_no_stop_token_before_min_tokens(sampler: Sampler, greedy: bool):
    """A matter of how many were generated, wherever the request was interrupted in between."""
    rows = torch.zeros(1, VOCABULARY)
    rows[0, 5], rows[0, 6], rows[0, 7] = 300.0, 200.0, 100.0
    sampling = Sampling(greedy=greedy, min_tokens=3)
    for generated, expected in ((0, 7), (2, 7), (3, 5), (4, 5)):
        (token,) = drawn(sampler, rows, work(sampling, [1, 2], [9] * generated, stops=[5, 6, VOCABULARY, -1]))
        assert token.id == expected
        assert token.logprob == pytest.approx(rows[0, expected] - 300.0)
    (token,) = drawn(sampler, rows, work(sampling, [1, 2]))
    assert token.id == 5, "without stop tokens there is nothing to hold back"


def test_a_watermark_shows_in_greedy_and_sampled_text(sampler: Sampler, logits: torch.Tensor):
    green = set(watermark.green(1, VOCABULARY, 0.25).nonzero()[0].tolist())
    assert len(green) == VOCABULARY // 4
    flat = logits / 10
    for greedy in (True, False):
        shares = []
        for marked in (None, (0.25, 4.0)):
            works = [work(Sampling(greedy=greedy, seed=seed, watermark=marked), [1]) for seed in range(400)]
            tokens = drawn(sampler, flat[torch.arange(400) % 8], *works)
            shares.append(sum(token.id in green for token in tokens) / 400)
        assert shares[0] < 0.5 and shares[1] > 0.9


@pytest.mark.parametrize("greedy", [True, False])
def test_a_watermark_is_found_by_its_test(sampler: Sampler, logits: torch.Tensor, greedy: bool):
    for marked in (None, (0.25, 4.0)):
        ids = [1]
        for position in range(100):
            row = logits[position % 8, None].roll(position) / 10
            (token,) = drawn(sampler, row, work(Sampling(greedy=greedy, seed=5, watermark=marked), [1], ids[1:]))
            ids.append(token.id)
        assert (watermark.detect(ids, VOCABULARY, 0.25).z > 8) == (marked is not None)


def test_a_watermark_of_all_or_nothing_changes_no_draw(sampler: Sampler, logits: torch.Tensor):
    plain = drawn(sampler, logits, *[work(Sampling(greedy=False, seed=seed), [1]) for seed in range(8)])
    for gamma in (0.0, 1.0):
        works = [work(Sampling(greedy=False, seed=seed, watermark=(gamma, 2.0)), [1]) for seed in range(8)]
        assert [token.id for token in drawn(sampler, logits, *works)] == [token.id for token in plain]


def test_draws_follow_the_distribution(sampler: Sampler):
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    count = 20_000
    works = [work(Sampling(greedy=False, seed=seed, temperature=0.7), [1]) for seed in range(count)]
    ids = torch.tensor([token.id for token in drawn(sampler, row.expand(count, -1), *works)])
    expected = (row[0] / 0.7).softmax(-1)
    observed = torch.bincount(ids, minlength=5) / count
    assert observed[4] == 0
    for p, q in zip(expected.tolist(), observed.tolist(), strict=True):
        assert abs(p - q) < 5 * math.sqrt(p * (1 - p) / count) + 1e-9


def test_rounding_of_the_logits_hardly_ever_changes_a_draw(sampler: Sampler):
    """A flat distribution, where most of the mass is in tokens of tiny probability."""
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(1, 50_000, generator=generator)
    works = [work(Sampling(greedy=False, seed=seed), [1]) for seed in range(200)]
    changed = 0
    for _ in range(5):
        noise = 1e-5 * torch.randn(1, 50_000, generator=generator)
        pairs = zip(
            drawn(sampler, row.expand(200, -1), *works),
            drawn(sampler, (row + noise).expand(200, -1), *works),
            strict=True,
        )
        changed += sum(a.id != b.id for a, b in pairs)
    assert changed <= 1


def test_a_row_draws_the_same_alone_and_among_others(sampler: Sampler, logits: torch.Tensor):
    chance = random.Random(2)
    works = []
    for row in range(8):
        sampling = Sampling(
            greedy=row == 0,
            seed=row * 77,
            temperature=chance.choice([0.5, 1.0, 1.4]),
            top_k=chance.choice([0, 7, 300]),
            top_p=chance.choice([1.0, 0.8]),
            typical_p=chance.choice([1.0, 0.9]),
            min_p=chance.choice([0.0, 0.1]),
            min_tokens=chance.choice([0, 4]),
            watermark=chance.choice([None, (0.5, 2.0)]),
            repetition_penalty=chance.choice([1.0, 1.2]),
            frequency_penalty=chance.choice([0.0, 0.7]),
            top_n_tokens=chance.choice([0, 2]),
        )
        works.append(work(sampling, [1, 2, 3], [4] * row, stops=[int(logits[row].argmax())]))
    together = drawn(sampler, logits, *works)
    for row, item in enumerate(works):
        (alone,) = drawn(sampler, logits[row : row + 1], item)
        assert alone.id == together[row].id
        assert alone.logprob == pytest.approx(together[row].logprob, abs=1e-6)


def test_a_tiny_temperature_is_greedy(sampler: Sampler, logits: torch.Tensor):
    works = [work(Sampling(greedy=False, seed=seed, temperature=1e-40), [1]) for seed in range(8)]
    assert [token.id for token in drawn(sampler, logits, *works)] == logits.argmax(-1).tolist()


def test_a_row_that_is_not_a_number_is_an_error_of_its_own(sampler: Sampler, logits: torch.Tensor):
    logits[3, 5] = float("nan")
    tokens = sampler.sample(logits, [work(Sampling(greedy=seed % 2 == 0, seed=seed), [1]) for seed in range(8)])
    assert [isinstance(token, str) for token in tokens] == [row == 3 for row in range(8)]


def test_in_a_small_vocabulary_too(sampler: Sampler):
    rows = torch.zeros(2, 40)
    rows[0] = float("nan")
    broken, fine = sampler.sample(rows, [work(Sampling(greedy=False, seed=1), [1])] * 2)
    assert isinstance(broken, str)
    assert isinstance(fine, Token)


@pytest.mark.parametrize("temperature", [1e-46, 1.0])
@pytest.mark.parametrize("penalty", [1e-46, 1e-38])
def test_a_tiny_repetition_penalty_prefers_what_was_said(sampler: Sampler, penalty: float, temperature: float):
    rows = torch.zeros(8, 400)
    rows[:, 5], rows[:, 7] = 9.0, 20.0
    works = [
        work(Sampling(greedy=False, seed=seed, temperature=temperature, repetition_penalty=penalty), [5])
        for seed in range(8)
    ]
    assert {token.id for token in drawn(sampler, rows, *works)} == {5}
