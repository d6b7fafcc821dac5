"""The sampling kernels: a token for each row of logits, or of a head's input; log-probabilities. Know no requests."""

import ctypes
from array import array
from dataclasses import dataclass

import torch

from tgi.kernels.library import Library
from tgi.kernels.linear import multiply
from tgi.kernels.ops import Choice, Finish, Kind, Pick, Sample
from tgi.kernels.ops import Head as HeadStruct
from tgi.kernels.panels import Panels
from tgi.kernels.program import Program, empty, once, run

_BUCKET = 256
"""csrc/sampling.h."""


class Draws:
    """Draws tokens again and again into the same memory: what comes of one step is overwritten by the next."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._op = Sample(Kind.SAMPLE)
        self.ids = array("i")
        """[at least rows]; -1 for logits that are not numbers."""
        self.logprobs = array("f")
        self.top_ids = array("i")
        """[at least rows · most]."""
        self.top_logprobs = array("f")

    def draw(
        self,
        logits: torch.Tensor,
        choices: "array[int]",
        positions: "array[int]",
        masks: "array[int] | None" = None,
        most: int = 0,
    ) -> None:
        """One token for each row of logits, float32 [rows, vocabulary].

        choices: "Q" [rows], the address of each row's Choice; positions: "q" [rows]; masks: "Q" [rows], the address of
        a row's bits, or 0; most: places for the likeliest tokens in each row, ``Choice.top_n`` of them being used.
        """
        assert logits.is_cpu and logits.dtype == torch.float32 and logits.stride(1) == 1
        rows, op = len(choices), self._op
        if rows > len(self.ids):
            self.ids, self.logprobs = array("i", bytes(4 * rows)), array("f", bytes(4 * rows))
            op.ids, op.logprobs = self.ids.buffer_info()[0], self.logprobs.buffer_info()[0]
        if rows * most > len(self.top_ids):
            self.top_ids, self.top_logprobs = array("i", bytes(4 * rows * most)), array("f", bytes(4 * rows * most))
            op.top_ids, op.top_logprobs = self.top_ids.buffer_info()[0], self.top_logprobs.buffer_info()[0]
        op.rows, op.most, op.vocabulary = rows, most, logits.shape[1]
        op.logits, op.stride = logits.data_ptr(), logits.stride(0)
        op.choices, op.positions = choices.buffer_info()[0], positions.buffer_info()[0]
        op.masks = masks.buffer_info()[0] if masks is not None else None
        once(self._library, op, min(rows, torch.get_num_threads()))


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: a matrix, and what becomes of the product."""

    panels: Panels
    bias: torch.Tensor | None = None
    """[panels · 16]."""
    factor: float = 1.0
    cap: float = 0.0
    """Not 0: logits become cap · tanh(logit / cap)."""


class HeadDraws:
    """Draws tokens without logits, for requests that are greedy or want a temperature, and nothing else.

    Bucket by bucket the head's product is looked at while it is in the processor's cache, and forgotten; the logits of
    many rows would be the largest tensor there is. Tokens and log-probabilities are those of Draws, to the bit.
    """

    def __init__(self, library: Library, head: Head, capacity: int) -> None:
        """``capacity``: the most rows of a step."""
        self.library = library
        self.program = Program(library, capacity)
        """Runs behind ``prepare``, for as many rows."""
        self.ids = array("i", bytes(4 * capacity))
        """[at least rows]; -1 for logits that are not numbers."""
        self.logprobs = array("f", bytes(4 * capacity))
        self._places = array("i", bytes(4 * capacity))
        self._choices = array("Q", bytes(8 * capacity))
        self._positions = array("q", bytes(8 * capacity))
        self._pick = Pick(Kind.PICK, capacity, place=self._places.buffer_info()[0])
        self.program.record(lambda: self._draw(library, head))

    def prepare(
        self, hidden: torch.Tensor, places: "array[int]", choices: "array[int]", positions: "array[int]"
    ) -> None:
        """hidden: float32 [tokens, inner], to be read only when the program runs; places: "i" [rows], which of its rows
        a token follows; the others as in ``Draws.draw``."""
        rows = len(places)
        self._pick.x, self._pick.x_stride = hidden.data_ptr(), hidden.stride(0)
        self._places[:rows], self._choices[:rows], self._positions[:rows] = places, choices, positions

    def _draw(self, library: Library, head: Head) -> torch.Tensor:
        capacity, panels, choices = self.program.capacity, head.panels, self._choices.buffer_info()[0]
        x = empty(capacity, panels.inner)
        self._pick.out, self._pick.out_stride, self._pick.size = x.data_ptr(), x.stride(0), panels.inner
        run(library, self._pick)
        sums = torch.empty(4, -(-panels.outs // _BUCKET), capacity)
        op = HeadStruct(
            Kind.HEAD,
            finish=Finish.STORE,
            alpha=head.factor,
            cap=head.cap,
            choices=choices,
            most=sums[0].data_ptr(),
            mass=sums[1].data_ptr(),
            warm=sums[2].data_ptr(),
            place=sums[3].data_ptr(),
            most_stride=capacity,
        )
        multiply(library, op, panels, x, head.bias)
        draw = Sample(
            Kind.SAMPLE,
            capacity,
            head=ctypes.addressof(op),
            choices=choices,
            positions=self._positions.buffer_info()[0],
            ids=self.ids.buffer_info()[0],
            logprobs=self.logprobs.buffer_info()[0],
        )
        # It multiplies once more by what was multiplied by before, so nothing may be lent in between.
        run(library, draw, sums)
        return x


def score(
    library: Library, logits: torch.Tensor, targets: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of known tokens, NaN for logits that are not numbers, and the likeliest tokens with theirs.

    logits: float32 [rows, vocabulary]; targets: int64 [rows] → [rows], int64 [rows, top], [rows, top].
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and targets.is_contiguous()
    rows, vocabulary = logits.shape
    most = min(top, vocabulary)
    ids, logprobs = torch.empty(rows, dtype=torch.int32), torch.empty(rows)
    top_ids, top_logprobs = torch.empty(rows, most, dtype=torch.int32), torch.empty(rows, most)
    choice = Choice(top_n=most)
    choices = array("Q", [ctypes.addressof(choice)]) * rows
    op = Sample(
        Kind.SAMPLE,
        rows,
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        choices=choices.buffer_info()[0],
        known=targets.data_ptr(),
        ids=ids.data_ptr(),
        logprobs=logprobs.data_ptr(),
        top_ids=top_ids.data_ptr(),
        top_logprobs=top_logprobs.data_ptr(),
        most=most,
        vocabulary=vocabulary,
    )
    once(library, op, torch.get_num_threads())
    return logprobs, top_ids.long(), top_logprobs
