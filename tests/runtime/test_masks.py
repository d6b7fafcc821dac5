"""The sampler under grammars: nothing that a mask forbids comes, and all else stays as it was."""

from typing import Any

import numpy
import pytest
import torch

from tgi.core.messages import Sampling, Submit, Token
from tgi.core.plan import Work
from tgi.runtime.sampler import sample

VOCABULARY = 1000


def work(sampling: Sampling, prompt: list[int], stops: list[int] | None = None) -> Work:
    return Work(Submit(0, prompt, len(prompt), 100, stops or [], sampling, 0.0), prompt, len(prompt) - 1, 1, [0], {})


def mask(*allowed: int) -> Any:
    found = numpy.zeros(VOCABULARY, bool)
    found[list(allowed)] = True
    return found


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def drawn(logits: torch.Tensor, sampling: Sampling, *allowed: int, stops: list[int] | None = None) -> Token:
    (token,) = sample(logits, [work(sampling, [1, 2, 3], stops)], [mask(*allowed)])
    assert isinstance(token, Token)
    return token


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 100.0},
        {"temperature": 1e-6},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.9},
        {"typical_p": 0.5},
        {"min_p": 0.1},
        {"repetition_penalty": 5.0, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"logit_bias": {7: 100.0}, "watermark": (0.5, 4.0)},
    ],
)
def test_only_allowed_tokens_come(logits: torch.Tensor, fields: dict[str, Any]):
    allowed = {2, 3, 500, 999}
    works = [work(Sampling(**fields, greedy=False, seed=seed), [1, 2, 3]) for seed in range(200)]
    tokens = sample(logits.expand(200, -1), works, [mask(*allowed)] * 200)
    assert {token.id for token in tokens if isinstance(token, Token)} <= allowed
    assert all(isinstance(token, Token) for token in tokens)


def test_logprobs_are_the_models_own(logits: torch.Tensor):
    own = logits.log_softmax(-1)[0]
    token = drawn(logits, Sampling(top_n_tokens=3), 5, 6)
    assert token.id == (5 if own[5] > own[6] else 6)
    assert token.logprob == pytest.approx(float(own[token.id]), abs=1e-5)
    assert [id for id, _ in token.top] == own.topk(3).indices.tolist()


def test_other_rows_are_left_alone(logits: torch.Tensor):
    before = logits.clone()
    rows = logits.expand(3, -1)
    works = [work(Sampling(greedy=False, seed=seed), [1]) for seed in range(3)]
    free = sample(rows, works)
    mixed = sample(rows, works, [None, mask(4), None])
    assert (mixed[0], mixed[2]) == (free[0], free[2])
    assert isinstance(mixed[1], Token) and mixed[1].id == 4
    assert torch.equal(logits, before)


def test_a_penalty_does_not_bring_a_forbidden_token_back(logits: torch.Tensor):
    """Penalties clamp to finite numbers, and a large enough rival is not needed: the mask comes after them."""
    assert drawn(logits, Sampling(repetition_penalty=1e30, logit_bias={1: 100.0}), 900).id == 900


def test_min_tokens_yields_to_a_grammar_that_can_only_end(logits: torch.Tensor):
    stops = [8, 9]
    assert drawn(logits, Sampling(min_tokens=5), 8, 10, stops=stops).id == 10
    assert drawn(logits, Sampling(min_tokens=5), 8, stops=stops).id == 8
    assert drawn(logits, Sampling(min_tokens=5, greedy=False), 8, 9, stops=stops).id in stops
