"""What the machine is, what it can do at most, and who uses it: ceilings, foreign load, processor time and memory of a
server's processes. Linux only; knows no server."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")

_CEILINGS = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
def best(f, n=9):
    times = []
    for _ in range(n):
        t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return min(times)
a = torch.ones(100_000_000)
x = torch.randn(2048, 2048)
w = torch.ops.mkldnn._reorder_linear_weight(x, None)
packed = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
read, gemm = min(best(a.sum), best(a.max)), min(best(packed), best(lambda: x @ x))
print(json.dumps({"read_gb_s": 0.4 / read, "gemm_gflop_s": 2 * 2.048**3 / gemm}))
"""


def ceilings(threads: int) -> dict[str, float]:
    """Best of several: reading 400 MB of memory, GB/s, and a float32 matrix product of 2048³, GFLOP/s. Needs torch."""
    command = [sys.executable, "-c", _CEILINGS, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def description() -> dict[str, str | int | None]:
    """Model and vector extensions, as far as the kernel tells."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    flags = set(fields.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "vectors": ", ".join(flag for flag in known if flag in flags),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    session: int
    state: str
    """The kernel's letter; Z: it has ended, and nobody has asked how."""
    cpu: float
    """Seconds of processor time, with that of children it has waited for."""

    @property
    def command(self) -> list[str]:
        return [part.decode(errors="replace") for part in _read(self.pid, "cmdline").split(b"\0") if part]

    @property
    def resident(self) -> int:
        """Bytes of memory; what several processes share counts in parts."""
        for line in _read(self.pid, "smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
        return 0


def _read(pid: int, name: str) -> bytes:
    """Empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def processes(session: int) -> list[Process]:
    """All that live of a session: a server that was started as the leader of one, with its descendants."""
    return [process for process in _all() if process.session == session and process.state not in "ZX"]


def _all() -> Iterator[Process]:
    for entry in os.listdir("/proc"):  # noqa: PTH208  # ten times as fast as a Path for each
        if entry.isdigit() and (stat := _read(int(entry), "stat")):
            fields = stat.rpartition(b")")[2].split()
            cpu = sum(int(ticks) for ticks in fields[11:15]) / _TICK
            yield Process(int(entry), int(fields[1]), int(fields[3]), fields[0].decode(), cpu)


@dataclass(frozen=True, slots=True)
class _Usage:
    """Processor seconds since the machine started."""

    at: float
    all: float
    own: float
    stolen: float
    """Taken by other guests of the same host."""

    @classmethod
    def now(cls, session: int) -> "_Usage":
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + softirq
        own = sum(p.cpu for p in _all() if p.session == session or p.pid == os.getpid())
        return cls(time.monotonic(), busy / _TICK, own, steal / _TICK)


class Watch:
    """Measures who else uses the machine: begin it, do the work, ask."""

    def __init__(self, session: int) -> None:
        """``session``: of the server under load; its use and this process's own are not foreign."""
        self._session = session
        self._begin = _Usage.now(session)

    def foreign(self) -> dict[str, float]:
        """Cores in use by others since it began, on this machine and on its host."""
        end, begin = _Usage.now(self._session), self._begin
        seconds = max(end.at - begin.at, 1e-6)
        others = (end.all - begin.all) - (end.own - begin.own)
        return {
            "foreign_cores": max(0.0, others / seconds),
            "stolen_cores": (end.stolen - begin.stolen) / seconds,
        }


def wait_for_quiet(session: int, below: float, patience: float, window: float = 1.0) -> bool:
    """Until others use less than ``below`` cores in one window; False if that doesn't happen within ``patience`` s."""
    deadline = time.monotonic() + patience
    while True:
        watch = Watch(session)
        time.sleep(window)
        if watch.foreign()["foreign_cores"] < below:
            return True
        if time.monotonic() > deadline:
            return False
