"""Operations run one by one, or are recorded as a program that runs as often as one likes, with one call.

Recording is to the CPU what capturing a graph is to a GPU: the model's forward runs once, on buffers for the most
tokens that a step may have, and every kernel call is noted instead of done. Whatever else the forward asked torch to do
would be missing from the program, so it raises NotRecordable.
"""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tgi.kernels.library import Library
from tgi.kernels.ops import Op
from tgi.kernels.ops import Program as ProgramStruct

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
        self._lasting: list[object] = []
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._addresses: Any = None
        self._call = (ProgramStruct * 2)()

    def record(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run ``forward`` on tensors of ``capacity`` rows, noting its kernels; returns its result's buffer."""
        global _recording
        assert _recording is None
        _recording = self
        try:
            with _OnlyKernels():
                result = forward()
        finally:
            _recording = None
        self._addresses = (ctypes.c_void_p * len(self._ops))(*map(ctypes.addressof, self._ops))
        self._call[0] = ProgramStruct(ctypes.addressof(self._addresses), len(self._ops))
        return result

    def run(self, rows: int, then: "tuple[Program, int] | None" = None) -> None:
        """``then``: another program, for so many rows, behind this one in the same call."""
        assert 0 < rows <= self.capacity
        self._call[0].rows = rows
        if then is not None:
            program, self._call[1].rows = then
            assert 0 < then[1] <= program.capacity
            self._call[1].op, self._call[1].ops = program._call[0].op, program._call[0].ops
        self._library.run(self._call, 1 if then is None else 2, torch.get_num_threads())

    def append(self, op: Op, lasting: tuple[object, ...]) -> None:
        assert op.rows % self.capacity == 0
        op.rows = -(op.rows // self.capacity)
        self._ops.append(op)
        self._lasting.append(lasting)

    def lend(self, size: int) -> torch.Tensor:
        """``size`` bytes, which go to the next who asks once nobody holds a tensor of them any more."""
        if self._free[size]:
            memory = self._free[size].pop()
        else:
            memory = torch.empty(size, dtype=torch.uint8)
            self._lasting.append(memory)
        lease = _lease(size).from_address(memory.data_ptr())
        weakref.finalize(lease, self._free[size].append, memory)
        return torch.frombuffer(lease, dtype=torch.uint8)


@cache
def _lease(size: int) -> Any:
    """A type of ``size`` bytes, of which one can tell when nobody uses them any more (ctypes' own can't)."""

    class Lease(ctypes.Array[ctypes.c_uint8]):
        _type_ = ctypes.c_uint8
        _length_ = size

    return Lease


class _OnlyKernels(TorchFunctionMode):
    """Lets through what makes, cuts and describes tensors, nothing that computes. (TorchDispatchMode would take a
    second to import.)"""

    _ALLOWED = frozenset(
        "empty frombuffer view view_as __getitem__ narrow select split expand unsqueeze unflatten "
        "__get__ __len__ size stride dim numel data_ptr is_contiguous is_floating_point".split()
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Indexing by a tensor or a list copies.
        gathers = func.__name__ == "__getitem__" and not all(
            index is None or index is ... or isinstance(index, int | slice)
            for index in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if gathers or func.__name__ not in self._ALLOWED:
            raise NotRecordable(f"{func.__name__} is no kernel of ours")
        return func(*args, **(kwargs or {}))


def run(library: Library, op: Op, *lasting: object) -> None:
    """Do ``op`` now, or note it. ``lasting`` is what it names beside the buffers of ``empty``: weights, pages."""
    if _recording is not None:
        _recording.append(op, lasting)
    else:
        once(library, op, torch.get_num_threads())


def once(library: Library, op: Op, threads: int) -> None:
    """Do ``op``, which says for how many rows."""
    address = ctypes.c_void_p(ctypes.addressof(op))
    library.run(ctypes.byref(ProgramStruct(ctypes.addressof(address), 1, op.rows)), 1, threads)


def empty(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised memory for ``rows`` rows of ``width``. From one row to the next it is an odd multiple of 64 bytes:
    rows a power of two apart would compete for the same lines of the cache."""
    line = 64 // dtype.itemsize
    padded = (-(-width // line) | 1) * line
    if _recording is not None:
        assert rows % _recording.capacity == 0
        return _recording.lend(rows * padded * dtype.itemsize).view(dtype).view(rows, padded)[:, :width]
    return torch.empty(rows, padded, dtype=dtype)[:, :width]


def vector(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for ``size`` numbers side by side."""
    if _recording is not None:
        return _recording.lend(size * dtype.itemsize).view(dtype)
    return torch.empty(size, dtype=dtype)
