"""Operations run one by one, or are recorded as a program that runs as often as one likes, with one call.

Recording is to the CPU what capturing a graph is to a GPU: the model's forward runs once, for the most tokens a step may
have, and every kernel call is noted instead of done. Whatever else the forward asked torch to do would be missing from
the program, so it raises ``NotRecordable``.
"""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tgi.kernels.library import Library, threads
from tgi.kernels.ops import Op

_recording: "Program | None" = None


class NotRecordable(RuntimeError):
    """The forward does something that is not a kernel of ours."""


class Program:
    """Operations in order, and the memory between them."""

    def __init__(self, library: Library, capacity: int) -> None:
        """``capacity``: the most rows it will run for."""
        self._library = library
        self.capacity = capacity
        self._ops: list[Op] = []
        self._alive: list[object] = []
        self._free: defaultdict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        self._addresses: Any = None

    def record(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run ``forward`` on buffers of ``capacity`` rows, noting its kernels; returns its result's buffer."""
        global _recording
        assert _recording is None
        _recording = self
        try:
            with _OnlyKernels():
                result = forward()
        finally:
            _recording = None
        self._addresses = (ctypes.c_void_p * len(self._ops))(*map(ctypes.addressof, self._ops))
        return result

    def run(self, rows: int) -> None:
        assert rows <= self.capacity
        self._library.run(self._addresses, len(self._ops), rows, threads())

    def append(self, op: Op, alive: tuple[object, ...]) -> None:
        op.rows = -1
        self._ops.append(op)
        self._alive.append(alive)

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that goes to the next who asks once nobody holds it any more, as in a graph's memory pool."""
        key = width, dtype
        memory = self._free[key].pop() if self._free[key] else torch.empty(self.capacity, width, dtype=dtype)
        buffer = memory.view_as(memory)
        weakref.finalize(buffer, self._free[key].append, memory)
        return buffer


class _OnlyKernels(TorchDispatchMode):
    """Lets through what makes and cuts tensors, nothing that computes."""

    _ALLOWED = frozenset("empty view view_as slice split narrow select as_strided alias detach expand unsqueeze".split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") not in self._ALLOWED:
            raise NotRecordable(f"{func} is no kernel of ours")
        return func(*args, **(kwargs or {}))


def run(library: Library, op: Op, *alive: object) -> None:
    """Do ``op`` now, or note it; ``alive`` are the tensors whose memory it names."""
    if _recording is not None:
        _recording.append(op, (op, *alive))
    else:
        library.run((ctypes.c_void_p * 1)(ctypes.addressof(op)), 1, op.rows, threads())


def empty(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised memory for ``rows`` rows of ``width``, each beginning 64 bytes, times an odd number, after the last:
    rows that lie a power of two apart would fight for the same lines of the cache."""
    line = 64 // dtype.itemsize
    padded = (-(-width // line) | 1) * line
    if _recording is not None:
        assert rows == _recording.capacity
        return _recording.empty(padded, dtype)[:, :width]
    return torch.empty(rows, padded, dtype=dtype)[:, :width]
