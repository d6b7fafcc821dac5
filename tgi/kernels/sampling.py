"""The sampling kernel: a token for each row of logits, and log-probabilities. Knows no requests."""

import ctypes
from array import array

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Choice, Kind, Sample


class Draws:
    """Draws tokens again and again into the same memory: what comes of one step is overwritten by the next."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._op = Sample(Kind.SAMPLE)
        self._address = (ctypes.c_void_p * 1)(ctypes.addressof(self._op))
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
        self._library.run(self._address, 1, rows, min(rows, torch.get_num_threads()))


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
    library.run((ctypes.c_void_p * 1)(ctypes.addressof(op)), 1, rows, torch.get_num_threads())
    return logprobs, top_ids.long(), top_logprobs
