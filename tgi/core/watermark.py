"""The watermark of Kirchenbauer et al. 2023 (arXiv:2301.10226) with a context of one token: which tokens are green, and
the test whether a text follows it. Knows token ids; no text, no model, and no torch, so that the test starts at once.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_PRIME = 15485863
"""The millionth prime, as in the published code. Times the token before it is the list's seed."""


def green(previous: int, vocabulary: int, gamma: float) -> NDArray[np.uint8]:
    """Which tokens are favoured behind the token ``previous``: 1 for these, 0 for the others; [vocabulary].

    The lists are TGI's on CPU: of torch's permutation by a generator seeded so, the first ``gamma * vocabulary``.
    ``vocabulary`` is the width of the model's logits; another one gives other lists.
    """
    return np.unpackbits(green_bits(previous, vocabulary, gamma), count=vocabulary, bitorder="little")


@functools.lru_cache(2048)
def green_bits(previous: int, vocabulary: int, gamma: float) -> NDArray[np.uint8]:
    """The list as bits, bit t % 8 of byte t // 8 for token t; not to be changed.

    Of the lists that a text needs, some 85 % are among the 2048 used last; these take 12 MiB for 49,152 tokens and
    64 MiB for 262,144.

    torch permutes by Fisher and Yates: step i swaps place i with place ``i + draw % (vocabulary - i)``, the draws being
    those of a 32-bit Mersenne twister, which is numpy's RandomState, too, and frozen there. Places behind the steps get
    their last content from a step's own place, which got it from an earlier step's: so the red tokens are found without
    going through the steps one by one.
    """
    steps = np.arange(int(gamma * vocabulary), dtype=np.uint32)
    draws = np.random.RandomState(_PRIME * previous % 2**32).randint(0, 2**32, len(steps), np.uint32)
    source = np.arange(vocabulary)
    source[steps + draws % (np.uint32(vocabulary) - steps)] = steps  # of several steps into a place the last one stays
    red = source[len(steps) :]
    while not np.array_equal(earlier := source[red], red):
        red = earlier
    bits = np.ones(vocabulary, np.bool_)
    bits[red] = False
    return np.packbits(bits, bitorder="little")


@dataclass(frozen=True, slots=True)
class Detection:
    """How a text's tokens stand to the green lists."""

    scored: int
    """Pairs of a token and the one before it. A text that begins where the answer did lacks one: that with the prompt's
    last token."""
    green: int
    share: float
    """Of the vocabulary that is green, and so of the pairs in a text that knows nothing of the lists."""

    @property
    def z(self) -> float:
        """Standard deviations above that share; 0 for a text without pairs."""
        return self._z(self.green)

    @property
    def best_z(self) -> float:
        """What a text of this length can reach."""
        return self._z(self.scored)

    @property
    def p(self) -> float:
        """How likely a text that knows nothing of the lists has as many green pairs: the binomial distribution's tail,
        exactly, not by way of z."""
        return _at_least(self.green, self.scored, self.share)

    def _z(self, green: int) -> float:
        if not self.scored:
            return 0.0
        return (green - self.share * self.scored) / math.sqrt(self.scored * self.share * (1 - self.share))


def detect(ids: Sequence[int], vocabulary: int, gamma: float, *, repeats: bool = False) -> Detection:
    """Count the green pairs of a text, each pair once. With ``repeats`` each as often as it comes; a text that says the
    same again and again can then pass for a watermarked one, since what is counted isn't independent.

    Raises ValueError for a list that is empty or holds every token, and for ids outside the vocabulary.
    """
    size = int(gamma * vocabulary)
    if not 0 < size < vocabulary:
        raise ValueError(f"gamma {gamma:g} of {vocabulary} tokens leaves nothing to detect")
    for id in ids:
        if not 0 <= id < vocabulary:
            raise ValueError(f"token {id} is not in the model's vocabulary of {vocabulary}")
    pairs = sorted(pairwise(ids) if repeats else set(pairwise(ids)))  # those of a list side by side
    found = sum(1 for previous, id in pairs if green(previous, vocabulary, gamma)[id])
    return Detection(len(pairs), found, size / vocabulary)


def _at_least(hits: int, trials: int, share: float) -> float:
    """P(X ≥ hits) for X binomial with ``trials`` and ``share``, 0 < share < 1."""
    if hits <= 0:
        return 1.0
    if hits <= trials * share:  # the larger part: one minus the rest
        return 1 - _at_least(trials - hits + 1, trials, 1 - share)
    ways = math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
    term = math.exp(ways + hits * math.log(share) + (trials - hits) * math.log1p(-share))
    total = 0.0
    for k in range(hits, trials + 1):
        total += term
        term *= (trials - k) / (k + 1) * share / (1 - share)
        if term < total * 1e-17:
            break
    return total
