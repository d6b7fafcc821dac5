"""The next token of every row, by Triton's kernels: packs what requests wish, and waits for nothing."""

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tgi.core.plan import Masks, Work
from tgi.core.watermark import green_bits
from tgi.kernels.triton.choices import CHOICE, ENTRIES, FREE, GREEDY, LIMITED, Changes
from tgi.runtime.drawn import Drawn, tops

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""Extreme temperatures stop here: infinities and divisions by zero would make a row's numbers no numbers."""
_ALIGNED = 16
"""Bytes. Kernels are compiled anew for addresses that aren't."""
_Section = tuple[torch.dtype, Sequence[Any]]
"""The buffers that make up a tensor."""


class TritonSampler:
    """Draws the tokens that torch_sampler defines, unless rounding decides a race or a limit."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        """``vocabulary``: the width of logits; ``device``: where they are, and Triton runs."""
        from tgi.kernels.triton.sampling import draw  # imports Triton

        self._draw = draw
        self._vocabulary = vocabulary
        self._device = device

    def draw(self, logits: torch.Tensor, works: Sequence[Work], masks: Masks | None = None) -> Drawn:
        """One token for each row, of which there is at least one. logits: float32 [rows, vocabulary]; works: one a row,
        all of whose tokens are known; masks: of those that have one."""
        wishes = [self._wishes(work) for work in works]
        choices = np.frombuffer(bytearray(b"".join([own.choice for own in wishes])), CHOICE)
        choices["position"] = [len(work.tokens) for work in works]
        limited = _rows(choices["way"] == LIMITED)
        changes = self._changes(choices, wishes, works, masks)
        sent = _sent(self._device, [(torch.int32, [choices]), (torch.int32, [limited]), *changes])
        draws = self._draw(logits, sent[0], Changes(*sent[2:]) if changes else None, sent[1] if len(limited) else None)
        return Drawn(draws.ids, draws.said, tops(logits, draws.norms, [own.top_n for own in wishes]))

    def _wishes(self, work: Work) -> "_Wishes":
        wishes: _Wishes | None = work.scratch.get("wishes")
        if wishes is None:
            wishes = work.scratch["wishes"] = _Wishes(work, self._vocabulary)
        return wishes

    def _changes(
        self, choices: NDArray[Any], wishes: "Sequence[_Wishes]", works: Sequence[Work], masks: Masks | None
    ) -> list[_Section]:
        """What becomes Changes, or nothing if no row is changed. Enters in ``choices`` where rows find their own.

        Histories go there whole: 12 bytes for each different token, some 10 KB for 2,000 tokens of text, where the
        row's logits, which are read several times, have hundreds.
        """
        bits: list[NDArray[np.uint8]] = []
        end = 0
        if masks is not None:
            rows, width = masks.bits.shape
            choices["mask"][masks.rows] = np.arange(0, rows * width, width)
            bits.append(np.ascontiguousarray(masks.bits))
            end = rows * width
        entries: list[_Entries] = []
        owners = array("i")
        for row, (own, work) in enumerate(zip(wishes, works, strict=True)):
            if own.gamma is not None:
                green = green_bits(work.tokens[-1], self._vocabulary, own.gamma)
                bits.append(green)
                choices["green"][row], end = end, end + len(green)
            if own.entries is not None and own.entries.follow(work):
                entries.append(own.entries)
                owners.extend([row] * (len(own.entries.ids) // ENTRIES))
        changed = (choices["mask"] >= 0) | (choices["green"] >= 0)
        changed[owners] = True
        rows = _rows(changed)
        if not len(rows):
            return []
        choices["copy"][rows] = np.arange(len(rows))
        return [
            (torch.int32, [rows]),
            (torch.uint8, bits),
            (torch.int32, [owners]),
            (torch.int32, [own.ids for own in entries]),
            (torch.float32, [own.counts for own in entries]),
            (torch.float32, [own.bias for own in entries]),
        ]


def _rows(chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
    return chosen.nonzero()[0].astype(np.int32)


def _sent(device: torch.device, sections: Sequence[_Section]) -> list[torch.Tensor]:
    """Tensors on the device, all by one copy."""
    parts: list[Any] = []
    places: list[slice] = []
    end = 0
    for _, buffers in sections:
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        places.append(slice(end, end + size))
        gap = -size % _ALIGNED
        parts += [*buffers, bytes(gap)]
        end += size + gap
    packet = torch.empty(end, dtype=torch.uint8, pin_memory=device.type != "cpu")
    packet.numpy()[:] = np.frombuffer(b"".join(parts), np.uint8)
    packet = packet.to(device, non_blocking=True)
    return [packet[place].view(dtype) for place, (dtype, _) in zip(places, sections, strict=True)]


class _Wishes:
    """What a request wishes, as kernels read it. Lives in the request's scratch."""

    __slots__ = ("choice", "entries", "gamma", "top_n")

    def __init__(self, work: Work, vocabulary: int) -> None:
        s = work.submit.sampling
        choice = np.zeros((), CHOICE)
        for name, value in {
            "seed": s.seed & 0xFFFFFFFF,
            "seed_above": s.seed >> 32 & 0xFFFFFFFF,
            "way": GREEDY if s.greedy else LIMITED if s.limits else FREE,
            "copy": -1,
            "green": -1,
            "mask": -1,
            "delta": s.watermark[1] if s.watermark is not None else 0.0,
            "repetition": s.repetition_penalty,
            "frequency": s.frequency_penalty,
            "presence": s.presence_penalty,
            "temperature": 1.0 if s.greedy else min(max(s.temperature, _SMALLEST), _LARGEST),
            "top_k": min(s.top_k, vocabulary),
            "top_p": s.top_p,
            "typical_p": s.typical_p,
            "min_p": s.min_p,
        }.items():
            choice[name] = value
        self.choice = choice.tobytes()
        self.gamma = s.watermark[0] if s.watermark is not None else None
        self.top_n = s.top_n_tokens
        self.entries = _Entries(work, vocabulary) if s.logit_bias or s.min_tokens or s.remembers else None


class _Entries:
    """The tokens that a request's penalties, bias and ``min_tokens`` change, as in Changes."""

    __slots__ = ("_barred", "_ends", "_places", "_seen", "bias", "counts", "ids")

    def __init__(self, work: Work, vocabulary: int) -> None:
        s = work.submit.sampling
        # A model's files can name end tokens that it doesn't have; the mask of a grammar sees to the end by itself.
        ends = [id for id in work.submit.stop_token_ids if 0 <= id < vocabulary]
        self._ends = ends if s.min_tokens and not s.grammar else []
        self._barred = False
        self._seen = 0
        self._places: dict[int, int] = {}
        self.ids = array("i")
        self.counts = array("f")
        self.bias = array("f")
        for id, bias in s.logit_bias.items():
            self.bias[self._place(id)] = bias

    def follow(self, work: Work) -> bool:
        """Add the tokens that are new. Returns whether there is anything to change."""
        s, prompt = work.submit.sampling, work.submit.prompt_length
        barred = bool(self._ends) and len(work.tokens) - prompt < s.min_tokens
        if barred != self._barred:
            self._barred = barred
            for id in self._ends:
                self.bias[self._place(id)] = -math.inf if barred else s.logit_bias.get(id, 0.0)
        if s.remembers:
            for position, id in enumerate(work.tokens[self._seen :], self._seen):
                place = self._place(id)
                self.counts[place] = max(self.counts[place], 0.0) + (position >= prompt)
            self._seen = len(work.tokens)
        return s.remembers or barred or bool(s.logit_bias)

    def _place(self, id: int) -> int:
        place = self._places.setdefault(id, len(self._places))
        if place == len(self.ids):
            self.ids.extend([-1] * ENTRIES)
            self.counts.extend([-1.0] * ENTRIES)
            self.bias.extend([0.0] * ENTRIES)
        self.ids[place] = id
        return place
