"""Numbers of a step on their way to the device: one copy, which nobody waits for, to a place that stays the same."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, TypeAlias

import numpy
import torch

Numbers: TypeAlias = "Sequence[int] | numpy.ndarray[Any, numpy.dtype[Any]]"

_GRAIN = 4
"""Parts begin at multiples of so many numbers, 16 bytes: Triton compiles kernels anew for what begins elsewhere."""
_TURNS = 4
"""Buffers on the host: one is filled while those of the steps under way may still be on their way."""


class Staging:
    """Int32 numbers. ``put`` may be called twice a step, as long as no more than two steps are under way."""

    def __init__(self, device: torch.device, room: int = 1 << 12) -> None:
        """``room``: numbers; it grows, and what reads the old place gets no more news then."""
        self._device = device
        self._make(room)

    @staticmethod
    def size(counts: Sequence[int]) -> int:
        """Room that parts of so many numbers take."""
        return sum(map(_filled, counts))

    def holds(self, parts: Sequence[Numbers]) -> bool:
        """Whether they can be put without more room."""
        return self.size([*map(len, parts)]) <= self._room

    def put(self, parts: Sequence[Numbers]) -> list[torch.Tensor]:
        """Send the parts; where each will be: where others of the same sizes are. The last takes all the room that is
        left, so that its size doesn't matter."""
        if not self.holds(parts):
            self._make(2 * self.size([*map(len, parts)]))
        source, at = next(self._sources), 0
        places = []
        for part in parts:
            source.numpy()[at : at + len(part)] = part
            places.append(self._place[at : at + len(part)])
            at += _filled(len(part))
        places[-1] = self._place[at - _filled(len(parts[-1])) :]
        if source is not self._place:
            self._place[:at].copy_(source[:at], non_blocking=True)
        return places

    def _make(self, room: int) -> None:
        self._room = room
        by_itself = self._device.type != "cpu"
        self._place = torch.zeros(room, dtype=torch.int32, device=self._device)
        sources = [torch.zeros(room, dtype=torch.int32, pin_memory=True) for _ in range(_TURNS)] if by_itself else []
        self._sources = cycle(sources or [self._place])


def _filled(count: int) -> int:
    return -(-count // _GRAIN) * _GRAIN
