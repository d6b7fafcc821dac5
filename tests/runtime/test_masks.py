"""The sampler under grammars: nothing that a mask forbids comes, and all else stays as it was."""

from typing import Any

import numpy
import pytest
import torch

from tgi.core.messages import Sampling, Submit, Token
from tgi.core.plan import Masks, Work
from tgi.runtime.sampler import Sampler

VOCABULARY = 1003
"""Doesn't fill its last byte."""


def work(sampling: Sampling, prompt: list[int], stops: list[int] | None = None) -> Work:
    submit = Submit(0, prompt, len(prompt), 100, stops or [], sampling, 0.0)
    return Work(submit, prompt, len(prompt) - 1, 1, len(prompt), True, [], {})


def masks(rows: list[int], *allowed: int, width: int = VOCABULARY) -> Masks:
    found = numpy.zeros((len(rows), width), bool)
    found[:, list(allowed)] = True
    return Masks(rows, numpy.packbits(found, 1, "little"))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def drawn(sampler: Sampler, logits: torch.Tensor, sampling: Sampling, *allowed: int) -> Token:
    (token,) = sampler.sample(logits, [work(sampling, [1, 2, 3])], masks([0], *allowed))
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
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_only_allowed_tokens_come(sampler: Sampler, logits: torch.Tensor, fields: dict[str, Any], device: str):
    allowed = {2, 3, 500, 1002}
    works = [work(Sampling(**fields, greedy=False, seed=seed), [1, 2, 3]) for seed in range(200)]
    sampler = sampler if device == "cpu" else Sampler(None)
    tokens = sampler.sample(logits.to(device).expand(200, -1), works, masks(list(range(200)), *allowed))
    assert {token.id for token in tokens if isinstance(token, Token)} <= allowed
    assert all(isinstance(token, Token) for token in tokens)


@pytest.mark.parametrize("allowed", [0, 7, 8, 511, 512, 1000, 1002])
def test_every_bit_is_the_token_that_it_stands_for(sampler: Sampler, logits: torch.Tensor, allowed: int):
    assert drawn(sampler, logits, Sampling(), allowed).id == allowed


def test_tokens_that_the_model_does_not_have_are_left_out(sampler: Sampler, logits: torch.Tensor):
    (token,) = sampler.sample(logits, [work(Sampling(), [1])], masks([0], 5, 1003, 1100, width=1200))
    assert isinstance(token, Token) and token.id == 5


def test_logprobs_are_the_models_own(sampler: Sampler, logits: torch.Tensor):
    own = logits.log_softmax(-1)[0]
    token = drawn(sampler, logits, Sampling(top_n_tokens=3), 5, 6)
    assert token.id == (5 if own[5] > own[6] else 6)
    assert token.logprob == pytest.approx(float(own[token.id]), abs=1e-5)
    assert [id for id, _ in token.top] == own.topk(3).indices.tolist()


def test_rows_have_their_own_masks_and_others_are_left_alone(sampler: Sampler, logits: torch.Tensor):
    before = logits.clone()
    rows = logits.expand(4, -1)
    works = [work(Sampling(greedy=False, seed=seed), [1]) for seed in range(4)]
    free = sampler.sample(rows, works)
    bits = numpy.concatenate([masks([0], 4).bits, masks([0], 900).bits])
    mixed = sampler.sample(rows, works, Masks([3, 1], bits))
    assert (mixed[0], mixed[2]) == (free[0], free[2])
    assert [token.id for token in (mixed[3], mixed[1]) if isinstance(token, Token)] == [4, 900]
    assert torch.equal(logits, before)


def test_a_penalty_does_not_bring_a_forbidden_token_back(sampler: Sampler, logits: torch.Tensor):
    """Penalties clamp to finite numbers, and a large enough rival is not needed: the mask comes after them."""
    assert drawn(sampler, logits, Sampling(repetition_penalty=1e30, logit_bias={1: 100.0}), 900).id == 900


@pytest.mark.parametrize("greedy", [True, False])
def test_min_tokens_leaves_a_grammar_its_only_way(sampler: Sampler, logits: torch.Tensor, greedy: bool):
    """The mask has no stop token in it but where nothing else can come."""
    sampling = Sampling(greedy=greedy, min_tokens=5, grammar="any")
    (token,) = sampler.sample(logits, [work(sampling, [1, 2, 3], stops=[8, 9])], masks([0], 8))
    assert isinstance(token, Token) and token.id == 8
