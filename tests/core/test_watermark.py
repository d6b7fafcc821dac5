"""The watermark's lists against torch's permutations, and the statistics against their definitions."""

import hashlib
import math
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from tgi.core.watermark import Detection, detect, green

VOCABULARY = 49152


def following(count: int, *, greens: int, gamma: float, vocabulary: int = 1000) -> list[int]:
    """Ids of ``count`` different pairs, of which the first ``greens`` are green and the others are not."""

    def ids() -> Iterator[int]:
        seen, previous = set(), 7
        yield previous
        for place in range(count):
            wanted = place < greens
            bits = green(previous, vocabulary, gamma)
            previous = next(id for id in range(vocabulary) if bits[id] == wanted and id not in seen)
            seen.add(previous)
            yield previous

    return list(ids())


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 10, 1000, VOCABULARY, 128_256, 262_144])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_lists_are_those_of_torch_s_permutations(vocabulary: int, gamma: float) -> None:
    for previous in {0, 1, 2, 77, vocabulary // 2, vocabulary - 1}:
        generator = torch.Generator().manual_seed(15485863 * previous)
        chosen = torch.randperm(vocabulary, generator=generator)[: int(vocabulary * gamma)]
        expected = torch.zeros(vocabulary, dtype=torch.uint8).index_fill_(0, chosen, 1)
        assert torch.equal(torch.from_numpy(green(previous, vocabulary, gamma)), expected)


def test_the_lists_stay_what_they_are() -> None:
    """Texts that carry the watermark today must show it with any torch and any numpy to come."""
    digest = hashlib.sha256(b"".join(green(id, VOCABULARY, 0.5).tobytes() for id in (0, 1, 49151))).hexdigest()
    assert digest == "421391074db7fde34918e0e3c94b20f46c9ac6c229166a02f4dfd30ee80c1be0"


def test_a_list_that_is_changed_harms_no_later_one() -> None:
    green(3, 100, 0.5)[:] = 1
    assert green(3, 100, 0.5).sum() == 50


@pytest.mark.parametrize(
    ("pairs", "greens", "gamma", "z", "p"),
    [
        (16, 16, 0.5, 4.0, 2.0**-16),
        (16, 8, 0.5, 0.0, 39203 / 65536),
        (16, 0, 0.5, -4.0, 1.0),
        (12, 12, 0.25, 6.0, 4.0**-12),
        (1, 1, 0.25, math.sqrt(3), 0.25),
    ],
)
def test_known_values(pairs: int, greens: int, gamma: float, z: float, p: float) -> None:
    found = detect(following(pairs, greens=greens, gamma=gamma), 1000, gamma)
    assert found == Detection(pairs, greens, gamma)
    assert found.z == pytest.approx(z) and found.p == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("pairs", [1, 7, 200])
def test_p_is_the_tail_of_the_binomial_distribution(pairs: int, share: float) -> None:
    one = Fraction(share)
    tail = Fraction(0)
    for greens in range(pairs, -1, -1):
        tail += math.comb(pairs, greens) * one**greens * (1 - one) ** (pairs - greens)
        assert Detection(pairs, greens, share).p == pytest.approx(float(tail), rel=1e-9)


def test_long_texts_neither_overflow_nor_lose_their_p() -> None:
    assert Detection(10**6, 500_000, 0.5).p == pytest.approx(0.5, abs=1e-3)
    assert Detection(10**6, 10**6, 0.5).p == 0.0
    assert Detection(10**6, 0, 0.5).p == 1.0
    normal = math.erfc(4 / math.sqrt(2)) / 2
    assert Detection(10**6, 502_000, 0.5).p == pytest.approx(normal, rel=0.02)


def test_the_share_is_that_of_the_list_not_of_the_flag() -> None:
    assert detect([1, 2], 10, 0.37).share == 0.3


def test_a_pair_counts_once_unless_repeats_are_wanted() -> None:
    first, second = following(1, greens=1, gamma=0.5)
    ids = [first, second] * 20
    back = bool(green(second, 1000, 0.5)[first])
    assert detect(ids, 1000, 0.5) == Detection(2, 1 + back, 0.5)
    assert detect(ids, 1000, 0.5, repeats=True) == Detection(39, 20 + 19 * back, 0.5)


@pytest.mark.parametrize("ids", [[], [5]])
def test_a_text_without_pairs_shows_nothing(ids: list[int]) -> None:
    found = detect(ids, 1000, 0.5)
    assert (found.scored, found.z, found.best_z, found.p) == (0, 0.0, 0.0, 1.0)


def test_what_a_short_text_can_reach() -> None:
    assert Detection(15, 3, 0.5).best_z < 4 == Detection(16, 3, 0.5).best_z


@pytest.mark.parametrize("gamma", [0.0, 0.0009, 1.0])
def test_lists_that_say_nothing_are_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma {gamma:g} of 1000 tokens leaves nothing to detect"):
        detect([1, 2], 1000, gamma)


@pytest.mark.parametrize("id", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(id: int) -> None:
    for ids in ([id], [1, id], [id, 1]):
        with pytest.raises(ValueError, match=f"token {id} is not in the model's vocabulary of 1000"):
            detect(ids, 1000, 0.5)


def test_texts_that_know_nothing_of_the_lists_pass_as_often_as_p_says() -> None:
    chance = random.Random(0)
    found = [detect(chance.choices(range(1000), k=101), 1000, 0.25) for _ in range(300)]
    for level in (0.5, 0.1):
        share = sum(text.p <= level for text in found) / len(found)
        assert share == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / len(found)) + 0.05)
    assert max(text.z for text in found) < 4
