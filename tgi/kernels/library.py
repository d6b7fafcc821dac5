"""The compiled library: found, loaded, and set to the best instruction set that this processor has. Imports no torch.

Whoever computes has imported torch before, so that torch's OpenMP runtime serves both: one pool of threads.
"""

import ctypes
from functools import cache

from tgi.kernels import ops
from tgi.kernels.build import LIBRARY

DTYPES = ("float32", "bfloat16")
"""Number formats of the weights that the kernels multiply, quantized ones aside."""


class Library:
    """The C functions."""

    def __init__(self, path: str) -> None:
        """Raises OSError if it can't be loaded, fits another source than this, or finds no instruction set."""
        self._c = ctypes.CDLL(path)
        self._c.tgi_size.restype = ctypes.c_int64
        self.run = self._c.tgi_run
        self.plan = self._c.tgi_plan
        for which, struct in enumerate(ops.STRUCTS):
            if self._c.tgi_size(which) != ctypes.sizeof(struct):
                raise OSError(f"{path} is older than its sources: install the package again")
        names = ctypes.create_string_buffer(256)
        self._c.tgi_isas(names, len(names))
        self.isas = names.value.decode().split()
        """Instruction sets that run here, best last."""
        if not self.isas:
            raise OSError("the processor has none of the instruction sets they are made for (AVX2, FMA and F16C)")
        self.choose(self.isas[-1])

    def choose(self, isa: str) -> None:
        """Use another instruction set than the best."""
        if self._c.tgi_choose(isa.encode()):
            raise ValueError(f"{isa} does not run here")
        self.isa = isa

    def profile(self, seconds: "ctypes.Array[ctypes.c_double] | None") -> None:
        """From now on add each kind's seconds to ``seconds``, by Kind; None ends it."""
        self._c.tgi_profile(seconds)


def library() -> Library | None:
    """The library, or None if there is none that runs here."""
    found = _load()
    return found if isinstance(found, Library) else None


def why_not() -> str | None:
    """Why there is none."""
    found = _load()
    return None if isinstance(found, Library) else found


@cache
def _load() -> Library | str:
    try:
        return Library(str(LIBRARY))
    except OSError as error:
        return str(error)
