"""Triton's kernels compiled for GPUs that aren't there, and what they then take."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

SHARED = {80: 163, 90: 227}
"""Compute capability → KB of shared memory that a program may have."""
CAPABILITIES = sorted(SHARED)


class Figures:
    """What kernels take, as it was recorded: "kernel, variant, sm_90" → registers of a thread, bytes of shared memory.

    Compared as long as Triton is the recorded version; ``pytest tests/kernels --record`` records them anew.
    """

    def __init__(self, path: Path, *, record: bool) -> None:
        self._path = path
        self._record = record
        self._held: dict[str, Any] = json.loads(path.read_text())

    def compare(self, kernel: str, used: dict[str, int]) -> None:
        if self._record:
            kernels = self._held["kernels"] if self._held["triton"] == triton.__version__ else {}
            self._held = {"triton": triton.__version__, "kernels": dict(sorted((kernels | {kernel: used}).items()))}
            self._path.write_text(json.dumps(self._held, indent=1) + "\n")
        elif self._held["triton"] == triton.__version__:
            assert used == self._held["kernels"][kernel], f"{kernel} takes something else: record it if it is better"


class Device:
    """The driver of a GPU that isn't there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # each has what was compiled for it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, seen: Callable[[str, Any], None]) -> None:
        self._kernel = kernel
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **how: self._seen(self._kernel.__name__, self._kernel.warmup(*args, grid=grid, **how))


class Compiler:
    """Compiles kernels for a compute capability; what would launch them gets nothing computed."""

    def __init__(self, capability: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        monkeypatch.setattr(triton.runtime.driver, "_active", Device(capability))
        self._capability = capability
        self._folder = folder
        self._monkeypatch = monkeypatch
        self.made: dict[str, Any] = {}
        """By the kernels' names."""

    def instead_of(self, module: ModuleType, kernel: str) -> None:
        """From now on the module's kernel is compiled where it is launched."""
        self._monkeypatch.setattr(module, kernel, Compiled(getattr(module, kernel), self.made.__setitem__))

    def check(self, variant: str, recorded: Figures) -> None:
        """All that were made fit a multiprocessor, spill nothing, and take what was recorded."""
        for name, kernel in self.made.items():
            assert kernel.metadata.shared <= SHARED[self._capability] << 10
            used = resources(kernel.asm["cubin"], self._folder)
            assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills registers: {used}"
            figures = {"registers": used["REG"], "shared": kernel.metadata.shared}
            recorded.compare(f"{name.strip('_')}, {variant}, sm_{self._capability}", figures)


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """What a compiled kernel takes, by the names that NVIDIA's tools have for it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", told)}
