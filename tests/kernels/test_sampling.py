"""The sampling kernel against torch's sampler, which defines what is drawn, for every instruction set."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from tests.kernels.conftest import LIBRARY, native
from tests.kernels.test_linear import KINDS, panels_of
from tgi.core.messages import Sampling, Submit, Thinking, Token
from tgi.core.plan import Masks, Work
from tgi.kernels.library import Library
from tgi.kernels.linear import linear
from tgi.kernels.panels import pack
from tgi.kernels.sampling import Head, score
from tgi.runtime.sampler import Sampler

pytestmark = [native, pytest.mark.usefixtures("best_instructions_again")]

DEFINITION = Sampler(None)

CHANGES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"logit_bias": {0: 3.0, 5: -100.0, 6: 100.0}},
    {"watermark": (0.4, 2.0)},
    {"min_tokens": 50},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.2, "logit_bias": {0: -1.0}, "watermark": (0.5, 1.0)},
]
WARPS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 300},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"min_p": 0.05},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.95, "typical_p": 0.9, "min_p": 0.01},
    {"top_k": 200, "typical_p": 0.7},
]


@pytest.fixture
def best_instructions_again() -> Iterator[None]:
    yield
    assert LIBRARY is not None
    LIBRARY.choose(LIBRARY.isas[-1])


def work(seed: int, vocabulary: int, position: int = 10, **fields: Any) -> Work:
    if "logit_bias" in fields:
        fields["logit_bias"] = {id % vocabulary: bias for id, bias in fields["logit_bias"].items()}
    ids = [id * 7 % vocabulary for id in range(position)]
    submit = Submit(0, ids[:4], 4, 100, [1, 3, vocabulary + 5, -1], Sampling(seed=seed, **fields), 0.0)
    return Work(submit, ids, position - 1, 1, position, True, [], {})


def again(works: list[Work]) -> list[Work]:
    """The same requests, without what has been remembered of them."""
    return [Work(w.submit, w.tokens, w.start, w.length, w.told, True, w.blocks, {}) for w in works]


def check(logits: torch.Tensor, works: list[Work], masks: Masks | None = None) -> int:
    """Log-probabilities and likeliest tokens are as they should be, to the bit by every instruction set; returns how
    many other tokens than by torch were drawn."""
    assert LIBRARY is not None
    found = []
    for isa in LIBRARY.isas:
        LIBRARY.choose(isa)
        found.append(list(Sampler(LIBRARY).sample(logits, again(works), masks)))
    assert all(tokens == found[0] for tokens in found)
    own = logits.double().log_softmax(-1)
    others = 0
    for row, (token, reference) in enumerate(
        zip(found[0], DEFINITION.sample(logits, again(works), masks), strict=True)
    ):
        assert isinstance(token, Token) and isinstance(reference, Token)
        count = min(works[row].submit.sampling.top_n_tokens, logits.shape[1])
        ids = [id for id, _ in token.top]
        assert own[row, ids].tolist() == own[row].topk(count).values.tolist() and len(set(ids)) == count
        logprobs = [token.logprob, *(logprob for _, logprob in token.top)]
        assert logprobs == pytest.approx(own[row, [token.id, *ids]].tolist(), abs=2e-6, rel=1e-6)
        others += token.id != reference.id
    return others


def settings(vocabulary: int, greedy: bool = False) -> Iterator[Work]:
    for seed, (change, warp) in enumerate(itertools.product(CHANGES, [{}] if greedy else WARPS)):
        yield work(seed, vocabulary, 6 + seed % 9, greedy=greedy, top_n_tokens=seed % 4, **change, **warp)


@pytest.mark.parametrize("flat", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 1000])
def test_any_setting_with_any_other_in_any_vocabulary(vocabulary: int, flat: float):
    torch.manual_seed(vocabulary)
    works = [*settings(vocabulary), *settings(vocabulary, greedy=True)]
    logits = torch.randn(len(works), vocabulary + 3)[:, :vocabulary] * flat
    assert check(logits, works) <= 1, "rounding may decide a race, but hardly ever"
    bits = numpy.packbits(numpy.random.default_rng(0).random((len(works), vocabulary)) < 0.3, 1, "little")
    bits[:, 0] |= 1  # something is allowed
    rows = list(range(0, len(works), 2))
    assert check(logits, works, Masks(rows, bits[: len(rows)])) <= 1


@pytest.mark.parametrize("flat", [1.0, 3.0])
def test_a_large_vocabulary(flat: float):
    torch.manual_seed(0)
    size = 49_152
    works = [work(seed, size, greedy=False, top_n_tokens=20, **warp) for seed, warp in enumerate(WARPS)]
    works += [work(99, size, greedy=False, **CHANGES[-1], top_k=5000, top_p=0.5)]
    assert check(torch.randn(len(works), size) * flat, works) <= 1


def extremes(size: int) -> dict[str, torch.Tensor]:
    inf = float("inf")
    gaps, step, alone = torch.randn(size), torch.zeros(size), torch.full((size,), -inf)
    gaps[torch.rand(size) < 0.9] = -inf
    gaps[5] = 1.0
    step[size // 2 :] = 1.0
    alone[size - 2] = -7.0
    return {
        "equal": torch.full((size,), 2.5),
        "two values": step,
        "a few values": torch.randint(0, 3, (size,)).float(),
        "all but one infinitely unlikely": alone,
        "most infinitely unlikely": gaps,
        "huge": torch.randn(size) * 1e37,
        "the ends": torch.where(torch.rand(size) < 0.01, 3.4e38, -3.4e38),
        "tiny": torch.randn(size) * 1e-40,
        "far from zero": torch.randn(size) + 1e4,
    }


@pytest.mark.parametrize("size", [16, 300, 2000])
@pytest.mark.parametrize("kind", extremes(300))
def test_extreme_numbers(kind: str, size: int):
    torch.manual_seed(1)
    row = extremes(size)[kind]
    cold = [{"temperature": 1e-45}, {"temperature": 1e30}, {"temperature": 1e-3, "top_k": 50, "top_p": 0.9}]
    works = [work(seed, size, greedy=False, top_n_tokens=3, **warp) for seed, warp in enumerate([*WARPS, *cold] * 3)]
    works.append(work(0, size))
    # Where tokens are equally far from the entropy, rounding says which of them are typical.
    exact = [w for w in works if w.submit.sampling.typical_p == 1.0 or kind == "all but one infinitely unlikely"]
    assert check(row.expand(len(exact), -1), exact) <= 1
    check(row.expand(len(works), -1), works)


def test_greedy_takes_the_first_of_equals(kernels: Library):
    for size, places in [(5, [1, 3]), (600, [255, 256]), (600, [17, 18, 599]), (600, [598, 599]), (40, range(40))]:
        row = torch.zeros(1, size)
        row[0, list(places)] = 3.0
        (token,) = Sampler(kernels).sample(row, [work(0, size, top_n_tokens=2)])
        assert isinstance(token, Token) and token.id == places[0]
        assert [id for id, _ in token.top] == list(places[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1, 7, 256, 1003])
def test_rows_that_are_not_numbers_are_told_and_others_are_not_touched(kernels: Library, size: int, bad: float):
    torch.manual_seed(size)
    logits = torch.randn(8, size)
    clean = Sampler(kernels).sample(logits, [work(row, size, greedy=row % 2 == 0) for row in range(8)])
    for row, place in ((1, 0), (2, size - 1), (5, size // 2)):
        logits[row, :] = bad if math.isinf(bad) and bad < 0 else logits[row]
        logits[row, place] = bad
    works = [work(row, size, greedy=row % 2 == 0, top_n_tokens=2 * (row == 5)) for row in range(8)]
    found = Sampler(kernels).sample(logits, works)
    assert [isinstance(token, str) for token in found] == [row in (1, 2, 5) for row in range(8)]
    assert all(found[row] == clean[row] for row in (0, 3, 4, 6, 7))
    assert (
        list(found) == list(DEFINITION.sample(logits, again(works))) or size > 1
    )  # log-probabilities of one token are 0


def test_wishes_that_make_infinities_or_nothing_at_all_end_in_some_token(kernels: Library):
    """None is a token that could come by; what matters is that memory and other rows are safe."""
    logits = torch.zeros(4, 500)
    logits[:, :250] = float("-inf")
    works = [
        work(0, 500, greedy=False, repetition_penalty=1e-46),
        work(1, 500, greedy=False, min_p=0.5, typical_p=0.5, logit_bias={0: math.inf}),
        work(2, 500, greedy=False, top_k=3, top_p=0.5, logit_bias={400: math.inf, 401: -math.inf}),
        work(3, 500, greedy=False, top_p=0.5),
    ]
    nothing = Masks([3], numpy.zeros((1, 63), numpy.uint8))
    found = Sampler(kernels).sample(logits, works, nothing)
    assert all(isinstance(token, Token) and 0 <= token.id < 500 for token in found)


def test_a_row_is_the_same_alone_among_others_and_whatever_the_threads(kernels: Library):
    torch.manual_seed(3)
    works = [*settings(3000), *settings(3000, greedy=True)]
    logits = torch.randn(len(works), 3000) * 2
    expected = [Sampler(kernels).sample(logits[row : row + 1], [item])[0] for row, item in enumerate(again(works))]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sampler = Sampler(kernels)
            assert list(sampler.sample(logits, again(works))) == expected
            turned = sampler.sample(logits.flip(0), again(works[::-1]))
            assert list(turned)[::-1] == expected
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 3), (33, 1), (256, 100), (257, 49), (1000, 130), (5003, 7)])
def test_tokens_drawn_without_logits_are_those_drawn_of_logits(kernels: Library, vocabulary: int, rows: int, kind: str):
    torch.manual_seed(vocabulary)
    panels, _ = panels_of(kind, vocabulary, 96, random.Random(rows))
    head = Head(panels, factor=0.5)
    hidden = torch.randn(rows + 5, 128)[:, :96]
    places = torch.randperm(rows + 5)[:rows]
    hidden[places[rows // 2]] *= float("nan") if rows > 2 else 1.0
    temperatures = [1.0, 0.3, 1.7, 1e-46]
    works = [
        work(row, vocabulary, 3 + row, greedy=row % 3 == 0, temperature=temperatures[row % 4], top_k=2 * (row % 3 == 0))
        for row in range(rows)
    ]
    logits = linear(kernels, panels, hidden[places], alpha=0.5)
    expected = Sampler(kernels).sample(logits, again(works))
    sampler = Sampler(kernels, head)
    works = again(works)
    assert all(map(sampler.is_plain, works))
    program, count = sampler.plan(hidden, places.tolist(), works)
    program.run(count)
    assert sampler.drawn(count) == [token if isinstance(token, Token) else None for token in expected]
    assert sum(isinstance(token, str) for token in expected) == (rows > 2)


def test_only_plain_wishes_need_no_logits(kernels: Library):
    sampler = Sampler(kernels, Head(pack(torch.randn(1000, 8))))
    assert sampler.is_plain(work(0, 1000, greedy=True, top_p=0.5, top_k=3))
    assert sampler.is_plain(work(0, 1000, greedy=False, temperature=0.3))
    wishes = [*CHANGES[1:], {"top_n_tokens": 1}, {"grammar": "{}"}, {"thinking": Thinking(3, "<think>", "</think>")}]
    for greedy in (True, False):
        assert not any(sampler.is_plain(work(0, 1000, greedy=greedy, **fields)) for fields in wishes)
    assert not any(sampler.is_plain(work(0, 1000, greedy=False, **fields)) for fields in WARPS[2:])
    assert not Sampler(kernels).is_plain(work(0, 1000, greedy=True)), "nobody told it what makes logits"


def test_a_history_told_bit_by_bit_is_the_history(kernels: Library):
    torch.manual_seed(5)
    ids = torch.randint(0, 300, (900,)).tolist()
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=-0.2, logit_bias={3: 2.5})
    submit = Submit(0, ids[:10], 10, 2000, [], sampling, 0.0)
    scratch: dict[str, Any] = {}
    for end in (10, 11, 12, 200, 201, 899, 900):
        logits = torch.randn(1, 300)
        item = Work(submit, ids[:end], end - 1, 1, end, True, [], scratch)
        assert list(Sampler(kernels).sample(logits, [item])) == list(Sampler(kernels).sample(logits, again([item])))
        assert check(logits, [item]) == 0


@pytest.mark.parametrize("fields", [{}, {"top_k": 700}, {"top_p": 0.9}, {"temperature": 0.7, "min_p": 0.001}])
def test_draws_follow_the_distribution(fields: dict[str, Any]):
    torch.manual_seed(6)
    size, count = 1000, 8000
    row = torch.randn(size) * 1.5
    shares = (row.double() / fields.get("temperature", 1.0)).softmax(-1)
    ordered, order = shares.sort(descending=True)
    kept = torch.ones(size, dtype=torch.bool)
    if "top_k" in fields:
        kept = torch.arange(size) < fields["top_k"]
    elif "top_p" in fields:
        kept = ordered.cumsum(-1) - ordered < fields["top_p"]
    elif "min_p" in fields:
        kept = ordered >= fields["min_p"] * ordered[0]
    expected = torch.zeros(size, dtype=torch.float64)
    expected[order[kept]] = ordered[kept] / ordered[kept].sum()
    works = [work(seed, size, greedy=False, **fields) for seed in range(count)]
    found = Sampler(LIBRARY).sample(row.expand(count, -1), works)
    seen = torch.bincount(torch.tensor([token.id for token in found if isinstance(token, Token)]), minlength=size)
    assert not seen[expected == 0].any()
    common = expected * count >= 3
    statistic = float(((seen - expected * count) ** 2 / (expected * count))[common].sum())
    freedom = int(common.sum()) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), "chi-squared"
    rest = float(expected[~common].sum())
    assert abs(int(seen[~common].sum()) - rest * count) <= 5 * math.sqrt(count * rest) + 1e-9


@pytest.mark.parametrize("top", [0, 3, 2000])
def test_known_tokens_have_their_log_probabilities(kernels: Library, top: int):
    torch.manual_seed(7)
    logits = torch.randn(9, 1100)[:, :1003] * 3
    logits[4, 77] = float("nan")
    targets = torch.randint(0, 1003, (9,))
    logprobs, ids, values = score(kernels, logits, targets, top)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, targets[:, None])[:, 0], equal_nan=True)
    assert ids.shape == values.shape == (9, min(top, 1003))
    fine = [row for row in range(9) if row != 4]
    torch.testing.assert_close(values[fine], expected[fine].topk(min(top, 1003)).values)
    torch.testing.assert_close(expected[fine].gather(1, ids[fine].long()), values[fine])
