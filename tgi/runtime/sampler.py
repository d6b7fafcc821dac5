"""The next token of every row: watermark, penalties, mask, warpers, draw; by kernels on CPUs and GPUs, or by torch.

A draw is a pure function of (seed, position): the same request gives the same tokens alone, in a batch, after
preemption and after a restart. Log-probabilities are the model's own, before all of this.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from tgi.core.messages import Token
from tgi.core.plan import Masks, Work
from tgi.core.watermark import green_bits
from tgi.kernels.library import Library
from tgi.kernels.ops import Choice
from tgi.kernels.program import Program
from tgi.kernels.sampling import Draws, Head, HeadDraws
from tgi.runtime import torch_sampler
from tgi.runtime.triton_sampler import TritonSampler

NOT_A_NUMBER = "the model's output is not a number"

_ROWS = 64
"""Of a step's rows, at first."""

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""Extreme settings stop here: infinities and divisions by zero would make a row's numbers no numbers."""


class Draw(Protocol):
    """Tokens of some rows, which may still be being drawn."""

    @property
    def ids(self) -> torch.Tensor:
        """int64 [rows] on the device, which has them before the host does."""

    def read(self) -> list[Token | None]:
        """Wait for them; None for a row whose logits are not numbers."""


class _Known(NamedTuple):
    """Tokens that the host has drawn."""

    tokens: list[Token | None]

    @property
    def ids(self) -> torch.Tensor:
        return torch.tensor([0 if token is None else token.id for token in self.tokens])

    def read(self) -> list[Token | None]:
        return self.tokens


class Sampler:
    """Draws tokens for the rows of a step: of logits or, for requests with plain wishes, of what logits are made of."""

    def __init__(self, library: Library | None, head: Head | None = None, triton: TritonSampler | None = None) -> None:
        """``library``: for logits in the CPU's memory; ``triton``: on a GPU. With neither, torch draws. ``head``: what
        makes the logits."""
        self._draws = Draws(library) if library is not None else None
        self._triton = triton
        self._head = head
        self._head_draws = HeadDraws(library, head, _ROWS) if library is not None and head is not None else None

    def is_plain(self, work: Work) -> bool:
        """Whether ``plan`` can draw for it; else it takes logits."""
        if self._head is None or self._head_draws is None:
            return False
        return _wishes(work, self._head.panels.outs).plain

    def plan(self, hidden: torch.Tensor, places: Sequence[int], works: Sequence[Work]) -> tuple[Program, int]:
        """Draw one token per work, by running the program for so many rows.

        hidden: [tokens, hidden size], as it will be then; places: in it, the row that each work's token follows.
        """
        draws, rows = self._head_draws, len(works)
        assert draws is not None and self._head is not None
        if rows > draws.program.capacity:
            draws = self._head_draws = HeadDraws(draws.library, self._head, max(rows, 2 * draws.program.capacity))
        choices = array("Q", [work.scratch["wishes"].address for work in works])
        draws.prepare(hidden, array("i", places), choices, array("q", [len(work.tokens) for work in works]))
        return draws.program, rows

    def drawn(self, rows: int) -> list[Token | None]:
        """What came of the plan."""
        assert self._head_draws is not None
        return _tokens(self._head_draws.ids, self._head_draws.logprobs, rows)

    def draw(self, logits: torch.Tensor, works: Sequence[Work], masks: Masks | None = None) -> "Draw":
        """Draw one token for each of at least one row, without waiting for it. logits: float32 [rows, vocabulary];
        works: one a row; masks: of those that have one."""
        if self._draws is not None:
            return _Known(_sample(self._draws, logits, works, masks))
        return (self._triton or torch_sampler).draw(logits, works, masks)

    def sample(self, logits: torch.Tensor, works: Sequence[Work], masks: Masks | None = None) -> list[Token | str]:
        """The same, and wait. A row whose logits are not numbers gets an error text instead of a token."""
        return [token or NOT_A_NUMBER for token in self.draw(logits, works, masks).read()]


def _sample(draws: Draws, logits: torch.Tensor, works: Sequence[Work], masks: Masks | None) -> list[Token | None]:
    rows, vocabulary = logits.shape
    choices, positions = array("Q"), array("q")
    most, askers = 0, []
    for row, work in enumerate(works):
        wishes = _wishes(work, vocabulary)
        if wishes.change:
            wishes.follow(work, vocabulary)
        if wishes.top_n:
            count = min(wishes.top_n, vocabulary)
            askers.append((row, count))
            most = max(most, count)
        choices.append(wishes.address)
        positions.append(len(work.tokens))
    draws.draw(logits, choices, positions, _addresses(masks, rows) if masks is not None else None, most)
    tokens = _tokens(draws.ids, draws.logprobs, rows)
    for row, count in askers:
        token, at = tokens[row], row * most
        if token is not None:
            top = zip(draws.top_ids[at : at + count], draws.top_logprobs[at : at + count], strict=True)
            tokens[row] = Token(token.id, token.logprob, list(top))
    return tokens


def _tokens(ids: "array[int]", logprobs: "array[float]", rows: int) -> list[Token | None]:
    return [
        Token(id, logprob) if id >= 0 else None
        for id, logprob in zip(ids[:rows].tolist(), logprobs[:rows].tolist(), strict=True)
    ]


def _addresses(masks: Masks, rows: int) -> "array[int]":
    """Of each row's mask; 0 for those that have none."""
    addresses = array("Q", bytes(8 * rows))
    first, stride = masks.bits.ctypes.data, masks.bits.strides[0]
    for place, row in enumerate(masks.rows):
        addresses[row] = first + place * stride
    return addresses


def _wishes(work: Work, vocabulary: int) -> "_Wishes":
    wishes: _Wishes | None = work.scratch.get("wishes")
    if wishes is None:
        wishes = work.scratch["wishes"] = _Wishes(work, vocabulary)
    return wishes


class _Wishes:
    """A request's wishes as the kernel reads them. Lives in the request's scratch."""

    __slots__ = ("_barred", "_bias", "_biased", "_choice", "_green", "_history", "address", "change", "plain", "top_n")

    def __init__(self, work: Work, vocabulary: int) -> None:
        s = work.submit.sampling
        self._biased, self._bias = array("i", s.logit_bias), array("f", s.logit_bias.values())
        # A model's files can name end tokens that it doesn't have.
        ends = [id for id in work.submit.stop_token_ids if 0 <= id < vocabulary]
        # The mask of a grammar sees to the end by itself: it may leave nothing but to stop.
        self._barred = array("i", ends if s.min_tokens and not s.grammar else [])
        self._history = _History() if s.remembers else None
        self._green: Any = None
        self._choice = Choice(
            seed=s.seed,
            biased=self._biased.buffer_info()[0],
            bias=self._bias.buffer_info()[0],
            biased_size=len(self._biased),
            barred=self._barred.buffer_info()[0],
            greedy=s.greedy,
            top_k=min(s.top_k, 1 << 30),
            top_n=s.top_n_tokens,
            delta=s.watermark[1] if s.watermark is not None else 0.0,
            repetition=s.repetition_penalty,
            frequency=s.frequency_penalty,
            presence=s.presence_penalty,
            temperature=min(max(s.temperature, _SMALLEST), _LARGEST),
            top_p=s.top_p,
            typical_p=s.typical_p,
            min_p=s.min_p,
        )
        self.address = ctypes.addressof(self._choice)
        self.top_n = s.top_n_tokens
        self.change = s.watermark is not None or self._history is not None or bool(self._barred)
        """Whether something depends on the tokens so far."""
        masked = bool(s.grammar) or s.thinking is not None
        self.plain = not (self.change or masked or self._biased or self.top_n or (s.limits and not s.greedy))
        """Whether nothing is wished but the likeliest token, or one drawn at some temperature."""

    def follow(self, work: Work, vocabulary: int) -> None:
        """Bring up to date what depends on the tokens so far."""
        choice, s = self._choice, work.submit.sampling
        if s.watermark is not None:
            self._green = green_bits(work.tokens[-1], vocabulary, s.watermark[0])
            choice.green = self._green.ctypes.data
        if self._history is not None:
            self._history.follow(work)
            choice.history, choice.history_size = self._history.ids.buffer_info()
            choice.counts = self._history.counts.buffer_info()[0]
        if self._barred:
            generated = len(work.tokens) - work.submit.prompt_length
            choice.barred_size = len(self._barred) if generated < s.min_tokens else 0


class _History:
    """Which ids a request holds, and how often it generated each."""

    def __init__(self) -> None:
        self._seen = 0
        self._places: dict[int, int] = {}
        self.ids = array("i")
        self.counts = array("f")

    def follow(self, work: Work) -> None:
        """Add the tokens that are new."""
        for position, token in enumerate(work.tokens[self._seen :], self._seen):
            place = self._places.get(token)
            if place is None:
                place = self._places[token] = len(self.ids)
                self.ids.append(token)
                self.counts.append(0.0)
            if position >= work.submit.prompt_length:
                self.counts[place] += 1
        self._seen = len(work.tokens)
