"""Tokens drawn by Triton's kernels against torch's sampler, which defines them: on a GPU or, with TRITON_INTERPRET=1,
in Triton's interpreter.

test_triton_sampling.py runs these in a process of their own.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from tests.kernels.test_sampling import CHANGES, WARPS, again, extremes, work
from tgi.core.messages import Sampling, Submit, Token
from tgi.core.plan import Masks, Work
from tgi.kernels.triton import sampling as kernels
from tgi.runtime import torch_sampler
from tgi.runtime.triton_sampler import TritonSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ("_copy", "_penalize", "_survey", "_list", "_limit", "_weigh", "_draw")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(logits: torch.Tensor, works: Sequence[Work], masks: Masks | None = None) -> list[Token | None]:
    drawn = TritonSampler(logits.shape[1], DEVICE).draw(logits.to(DEVICE), works, masks)
    tokens = drawn.read()
    assert drawn.ids.tolist() == [0 if token is None else token.id for token in tokens]
    return tokens


def check(logits: torch.Tensor, works: list[Work], masks: Masks | None = None) -> int:
    """Log-probabilities and likeliest tokens are as they should be; returns how many other tokens were drawn than by
    torch."""
    own = logits.double().log_softmax(-1)
    others = 0
    reference = torch_sampler.draw(logits, again(works), masks).read()
    for row, (token, expected) in enumerate(zip(draw(logits, again(works), masks), reference, strict=True)):
        assert token is not None and expected is not None
        assert [id for id, _ in token.top] == [id for id, _ in expected.top]
        found = [(token.id, token.logprob), *token.top]
        for id, logprob in found:
            assert logprob == pytest.approx(float(own[row, id]), abs=4e-6, rel=1e-6)
        others += token.id != expected.id
    return others


def bits(rows: int, vocabulary: int, share: float = 0.3) -> Any:
    allowed = numpy.random.default_rng(0).random((rows, vocabulary)) < share
    allowed[:, 0] = True
    return numpy.packbits(allowed, 1, "little")


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 1000])
def test_any_change_in_any_vocabulary(vocabulary: int) -> None:
    works = [
        work(seed, vocabulary, 6 + seed % 9, greedy=seed % 3 == 0, top_n_tokens=seed % 4, temperature=0.8, **change)
        for seed, change in enumerate(3 * CHANGES)
    ]
    logits = torch.randn(len(works), vocabulary + 3)[:, :vocabulary]
    rows = list(range(0, len(works), 2))
    assert check(logits, works, Masks(rows, bits(len(rows), vocabulary + 64))) == 0


@pytest.mark.parametrize("vocabulary", [1, 257])
def test_any_limit_in_any_vocabulary(vocabulary: int) -> None:
    works = [work(seed, vocabulary, greedy=seed == 9, **warp) for seed, warp in enumerate(WARPS)]
    assert check(torch.randn(len(works), vocabulary) * 2, works) == 0


def random_work(chance: random.Random, vocabulary: int) -> Work:
    fields: dict[str, Any] = {
        "greedy": chance.random() < 0.1,
        "temperature": chance.choice([0.3, 1.0, 1.7]),
        "top_k": chance.choice([0, 0, 1, 20, vocabulary // 2, vocabulary]),
        "top_p": chance.choice([1.0, 1.0, 0.2, 0.9, 0.999]),
        "typical_p": chance.choice([1.0, 1.0, 0.3, 0.95]),
        "min_p": chance.choice([0.0, 0.0, 0.02, 0.5]),
        "top_n_tokens": chance.choice([0, 0, 3]),
    }
    return work(chance.getrandbits(64), vocabulary, chance.randrange(5, 300), **fields, **chance.choice(CHANGES))


@pytest.mark.parametrize("flat", [0.3, 1.0, 4.0])
def test_random_wishes(flat: float) -> None:
    chance = random.Random(flat)
    works = [random_work(chance, 600) for _ in range(15)]
    rows = list(range(0, 15, 5))
    assert check(torch.randn(15, 600) * flat, works, Masks(rows, bits(len(rows), 600))) == 0


def test_a_large_vocabulary() -> None:
    size = 40_001
    works = [work(seed, size, greedy=False, top_n_tokens=20, **warp) for seed, warp in enumerate(WARPS[-3:])]
    works += [work(99, size, greedy=False, **CHANGES[-1], top_k=5000, top_p=0.5)]
    assert check(torch.randn(len(works), size) * 3, works) == 0


def kept(logits: torch.Tensor, works: list[Work], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Which tokens could have come."""
    steps: list[Any] = []
    step = kernels._Step
    monkeypatch.setattr(kernels, "_Step", lambda *parts: steps.append(step(*parts)) or steps[-1])
    draw(logits, works)
    deepest, center, far, top = steps[0].limits.cpu().T[:, :, None]
    depth = (top - logits) / torch.tensor([[w.submit.sampling.temperature] for w in works])
    return (depth <= deepest) & ((depth - center).abs() <= far)


@pytest.mark.parametrize("kind", ["steep", "flat", "few values"])
def test_limits_are_where_they_should_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, ties included."""
    logits = torch.randn(1, 900) * {"steep": 5.0, "flat": 0.2, "few values": 2.0}[kind]
    if kind == "few values":
        logits = logits.round()
    works = [work(seed, 900, greedy=False, **warp) for seed, warp in enumerate(WARPS) if set(warp) - {"temperature"}]
    logits = logits.expand(len(works), -1).contiguous()
    expected = torch_sampler._warp(logits, [w.submit.sampling for w in works]) > -math.inf
    found = kept(logits, works, monkeypatch)
    assert torch.equal(found, expected)
    assert len(set(found.sum(1).tolist())) > len(works) / 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("kind", extremes(300))
def test_extreme_numbers(kind: str) -> None:
    row = extremes(300)[kind]
    cold = [{"temperature": 1e-45}, {"temperature": 1e30}, {"temperature": 1e-3, "top_k": 50, "top_p": 0.9}]
    # Not typical-p: where tokens are equally far from the entropy, rounding says which are typical.
    works = [
        work(seed, 300, greedy=False, **fields)
        for seed, fields in enumerate([*cold, {"temperature": math.inf}, {"top_k": 40, "min_p": 0.1}])
    ]
    works += [work(0, 300, greedy=True, repetition_penalty=1e-30), work(0, 300, greedy=True)]
    reference = torch_sampler.draw(row.expand(len(works), -1), again(works)).read()
    found = draw(row.expand(len(works), -1).contiguous(), works)
    assert [token and token.id for token in found] == [token and token.id for token in reference]


def test_greedy_takes_the_first_of_equals() -> None:
    for size, places in [(5, [1, 3]), (600, [255, 256]), (600, [17, 18, 599]), (600, [598, 599]), (40, range(40))]:
        row = torch.zeros(1, size)
        row[0, list(places)] = 3.0
        (token,) = draw(row, [work(0, size)])
        assert token is not None and token.id == places[0]


def test_seeds_and_positions_at_their_ends() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    works = [work(seed, 500, position, greedy=False) for seed in seeds for position in (4, 5, 70_000)]
    assert check(torch.randn(1, 500).expand(len(works), -1).contiguous(), works) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_row_that_is_not_a_number_is_an_error_of_its_own() -> None:
    logits = torch.randn(8, 400)
    works = [work(seed, 400, greedy=seed % 3 == 0, top_p=[1.0, 0.9][seed % 2]) for seed in range(8)]
    before = draw(logits, works)
    logits[2, 5], logits[3], logits[4, 300], logits[6] = math.nan, math.nan, math.inf, -math.inf
    after = draw(logits, works)
    assert after == [None if row in (2, 3, 4, 6) else token for row, token in enumerate(before)]


def test_a_mask_that_allows_nothing_possible_still_gives_a_token() -> None:
    works = [work(seed, 300, greedy=seed == 0, top_k=[0, 0, 5][seed]) for seed in range(3)]
    tokens = draw(torch.randn(3, 300), works, Masks([0, 1, 2], numpy.zeros((3, 40), numpy.uint8)))
    assert all(token is not None and 0 <= token.id < 300 for token in tokens)


def test_what_was_impossible_stays_forbidden_under_a_repetition_penalty() -> None:
    """Penalties make finite numbers of infinite ones."""
    logits = torch.zeros(1, 300)
    logits[0, 0], logits[0, 7] = -math.inf, -math.inf
    allowed = numpy.zeros((1, 300), bool)
    allowed[0, 7] = True
    masks = Masks([0], numpy.packbits(allowed, 1, "little"))
    item = work(0, 300, greedy=True, repetition_penalty=1.5)  # of 0 and 7 among others
    (expected,) = torch_sampler.draw(logits, again([item]), masks).read()
    (token,) = draw(logits, [item], masks)
    assert token is not None and expected is not None and token.id == expected.id == 7


def test_rows_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(3)
    works = [random_work(chance, 500) for _ in range(8)]
    logits = torch.randn(8, 500)
    monkeypatch.setattr(kernels, "_AT_ONCE", 3)
    together = draw(logits, again(works))
    for row, item in enumerate(again(works)):
        assert draw(logits[row : row + 1], [item]) == [together[row]]


def test_what_is_remembered_of_a_request_follows_its_tokens() -> None:
    chance = random.Random(0)
    sampling = Sampling(
        repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2, logit_bias={3: 2.5}, min_tokens=20
    )
    tokens = [chance.randrange(400) for _ in range(500)]
    submit = Submit(0, tokens[:10], 10, 2000, [3, 8, 1000, -1], sampling, 0.0)
    scratch: dict[str, Any] = {}
    logits = torch.randn(1, 400) * 0.3
    for end in (10, 11, 29, 30, 31, 200, 201, 500):
        stepped = Work(submit, tokens[:end], end - 1, 1, end, True, [], scratch)
        (expected,) = torch_sampler.draw(logits, again([stepped])).read()
        assert draw(logits, [stepped]) == draw(logits, again([stepped]))
        (token,) = draw(logits, [stepped])
        assert token is not None and expected is not None and token.id == expected.id


class Launches:
    """Kernels by name, and how many rows they were launched for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, int] = {}
        for name in KERNELS:
            kernel = getattr(kernels, name)

            class Counted:
                def __getitem__(_, grid: tuple[int, ...], kernel: Any = kernel, name: str = name) -> Any:
                    self.rows[name] = grid[0]
                    return kernel[grid]

            monkeypatch.setattr(kernels, name, Counted())


def test_features_cost_the_rows_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    plain = [work(seed, 300, greedy=seed == 0, temperature=0.5) for seed in range(3)]
    draw(torch.randn(3, 300), plain)
    assert launches.rows == {"_survey": 3, "_draw": 3}
    works = [*plain, work(4, 300, greedy=False, top_p=0.5), work(5, 300, presence_penalty=1.0)]
    draw(torch.randn(5, 300), works)
    assert launches.rows == {"_copy": 1, "_penalize": 1, "_survey": 5, "_list": 1, "_limit": 1, "_weigh": 1, "_draw": 5}
    launches.rows.clear()
    draw(torch.randn(1, 300), [work(5, 300, min_tokens=2)])  # which are there
    assert launches.rows == {"_survey": 1, "_draw": 1}
