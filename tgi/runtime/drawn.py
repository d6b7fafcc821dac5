"""Tokens drawn on a device that runs by itself: they stay there for the next step, and are read when they have come."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tgi.core.messages import Token


class Tops(NamedTuple):
    """The likeliest tokens of the rows that ask for them."""

    rows: Sequence[int]
    counts: Sequence[int]
    """How many each of them asks for; no more than there are."""
    ids: torch.Tensor
    """[asking rows, most of the counts], best first."""
    logprobs: torch.Tensor
    """float32, likewise."""


class Drawn:
    """One token for each row. What the host needs goes there in one copy, for which nobody waits before ``read``."""

    def __init__(self, ids: torch.Tensor, said: torch.Tensor, tops: Tops | None = None) -> None:
        """ids: int64 [rows], always of the vocabulary. said: int32 [2, rows]: ids, or -1 for logits that are not
        numbers, and the bits of log-probabilities."""
        self.ids = ids
        self._tops = tops
        said = said.flatten()
        if tops is not None:
            said = torch.cat((said, tops.ids.flatten().int(), tops.logprobs.flatten().view(torch.int32)))
        if said.is_cpu:
            self._said, self._event = said, None
        else:
            self._said = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
            self._said.copy_(said, non_blocking=True)
            self._event = torch.accelerator.current_stream(said.device).record_event()

    def read(self) -> list[Token | None]:
        """Wait for the tokens; None for logits that are not numbers."""
        if self._event is not None:
            self._event.synchronize()
        rows = len(self.ids)
        ids, logprobs = self._said[:rows].tolist(), self._said[rows : 2 * rows].view(torch.float32).tolist()
        tops: dict[int, list[tuple[int, float]]] = {}
        if self._tops is not None:
            count = self._tops.ids.numel()
            shape = self._tops.ids.shape
            top_ids = self._said[2 * rows :][:count].view(shape).tolist()
            top_logprobs = self._said[2 * rows + count :].view(torch.float32).view(shape).tolist()
            for row, count, *top in zip(self._tops.rows, self._tops.counts, top_ids, top_logprobs, strict=True):
                tops[row] = list(zip(*top, strict=True))[:count]
        return [
            Token(id, logprob, tops.get(row, [])) if id >= 0 else None
            for row, (id, logprob) in enumerate(zip(ids, logprobs, strict=True))
        ]


def tops(logits: torch.Tensor, norms: torch.Tensor, asked: Sequence[int]) -> Tops | None:
    """The likeliest tokens, with log-probabilities. logits: [rows, vocabulary]; norms: [rows], their logsumexp; asked:
    how many for each row."""
    counts = [min(count, logits.shape[1]) for count in asked]
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return None
    if len(rows) < len(counts):
        asking = on_device(rows, logits.device)
        logits, norms = logits.index_select(0, asking), norms.index_select(0, asking)
    values, ids = logits.topk(max(counts))
    return Tops(rows, [counts[row] for row in rows], ids, values - norms[:, None])


def on_device(numbers: Sequence[int] | Sequence[float], device: torch.device) -> torch.Tensor:
    """A tensor of these, without waiting for what the device does."""
    return torch.tensor(numbers, pin_memory=device.type != "cpu").to(device, non_blocking=True)
