"""What the routers of one server tell each other: a row of numbers for each, in memory that all of them read.

A router writes its own row only, but for cells that they have in common. What it counts outlives it: the next process
in its place counts on. What holds for the moment only is cleared.
"""

import fcntl
import mmap
import os
from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

_ROW = 1 << 16
"""Bytes of a router's row."""
_MOMENT = 4 * 8
"""Of these, the first: the board's own cells, which hold for the moment only."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Cells(Generic[Number]):
    """Some numbers of each row. Plain lists where there is one router: nobody pays for others who aren't there."""

    own: MutableSequence[Number]
    all: Sequence[MutableSequence[Number]]
    """Of each router, in order."""

    @property
    def common(self) -> "Cells[Number]":
        """The first router's, for all to write."""
        return Cells(self.all[0], self.all[:1])

    def sums(self) -> Sequence[Number]:
        """Over all routers."""
        if len(self.all) == 1:
            return self.own
        return [sum(numbers) for numbers in zip(*self.all, strict=True)]


class _Lock:
    """No other router is in it meanwhile. It takes microseconds, and a router's end unlocks it."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)


class Board:
    """One router's view. All routers ask for the same cells in the same order."""

    def __init__(self, index: int = 0, count: int = 1, file: int | None = None) -> None:
        """``file``: a descriptor of memory; it is needed if there is more than one router."""
        self.index = index
        self.shared = file is not None
        self.lock: AbstractContextManager[None] = nullcontext()
        self._used = 0
        if file is not None:
            self.lock = _Lock(file)
            os.ftruncate(file, count * _ROW)
            memory = memoryview(mmap.mmap(file, count * _ROW))
            self._rows = [memory[row * _ROW : (row + 1) * _ROW] for row in range(count)]
        self.connections = self.integers(1)
        """That are open, and 1 more if the router accepts any."""
        self.generations = self.integers(1)
        self.queued = self.integers(1)
        self.suspects = self.integers(1)

    def integers(self, size: int) -> Cells[int]:
        """The next ``size`` numbers of each row, at first 0."""
        return self._cells("q", [0] * size)

    def floats(self, size: int) -> Cells[float]:
        return self._cells("d", [0.0] * size)

    def _cells(self, kind: Literal["q", "d"], zeros: list[Number]) -> Cells[Number]:
        if not self.shared:
            return Cells(zeros, [zeros])
        start, self._used = self._used, self._used + 8 * len(zeros)
        assert self._used <= _ROW
        rows: list[Any] = [row[start : self._used].cast(kind) for row in self._rows]
        return Cells(rows[self.index], rows)


def clear(file: int, index: int) -> None:
    """A router has ended: of the moment, nothing is left."""
    os.pwrite(file, bytes(_MOMENT), index * _ROW)
