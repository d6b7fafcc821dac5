"""What the ranks of one machine make of each other's rows, in memory that they share. csrc/link.h."""

import ctypes
import mmap
import os
import time
from collections.abc import Sequence

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Exchange, Kind
from tgi.kernels.ops import Link as LinkStruct
from tgi.kernels.program import empty, run

_HEAD = 64
_SLOT = 1 << 20
"""Bytes of a rank's rows that are exchanged at once: they stay in the processors' caches."""
_PATIENCE = 1.0
"""Seconds that another rank may take longer than three times what this one took, before it counts as hanging."""
_FIRST_PATIENCE = 60.0
"""The same in the first step, in which weights may come from disk."""


class Link:
    """This rank's hold of the memory. Programs may name it: what it does is noted while one is recorded."""

    def __init__(self, library: Library, file: int, rank: int, ranks: int) -> None:
        """``file``: the descriptor of a file in memory that they share, empty at first."""
        self._library = library
        self._rank, self._ranks = rank, ranks
        size = (_HEAD + 2 * _SLOT) * ranks
        os.ftruncate(file, size)
        self._memory = mmap.mmap(file, size)
        self._room = bytearray(ctypes.sizeof(LinkStruct) + 64)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self._struct = struct = LinkStruct.from_buffer(self._room, -begin % 64)
        struct.memory = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        struct.slot = _SLOT
        struct.ranks, struct.rank = ranks, rank
        struct.patience = _FIRST_PATIENCE

    def begin(self) -> None:
        """A step begins, on all ranks at about the same time."""
        if self._struct.began:
            self._struct.patience = _PATIENCE
        self._struct.began = time.monotonic()

    def total(self, x: torch.Tensor, into: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        """Sum of every rank's ``x``, float32 [rows, size], in its place; or ``factor`` times that added to ``into``.

        The same to the bit on all ranks.
        """
        out = x if into is None else into
        self._exchange(x, out, None, into is not None, factor)
        return out

    def joined(self, x: torch.Tensor, widths: Sequence[int], *, first_only: bool = False) -> torch.Tensor:
        """Every rank's ``x`` side by side; ``widths`` of the ranks. ``first_only``: the others get theirs back."""
        firsts = [sum(widths[:rank]) for rank in range(self._ranks + 1)]
        out = None if first_only and self._rank else empty(x.shape[0], firsts[-1])
        self._exchange(x, out, torch.tensor(firsts, dtype=torch.int32), add=False, factor=1.0)
        return x if out is None else out

    def _exchange(
        self, x: torch.Tensor, out: torch.Tensor | None, first: torch.Tensor | None, add: bool, factor: float
    ) -> None:
        assert x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[1] * 4 <= _SLOT
        op = Exchange(
            Kind.EXCHANGE,
            x.shape[0],
            link=ctypes.addressof(self._struct),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            size=x.shape[1],
            first=None if first is None else first.data_ptr(),
            add=add,
            factor=factor,
        )
        if out is not None:
            op.out, op.out_stride = out.data_ptr(), out.stride(0)
        run(self._library, op, self, first)
