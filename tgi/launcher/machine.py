"""What the model will run on: GPUs by nvidia-smi or by torch, memory by the kernel and its control groups. Imports no
torch: where only that knows the GPUs, a process of its own asks it."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tgi.kernels.library import library
from tgi.kernels.triton import lacking
from tgi.launcher.errors import ArgumentValidation

log = logging.getLogger(__name__)

_BUILDS = {"cpu": "cpu", "rocm": "cuda", "xpu": "xpu"}
"""How torch's version may end → what it then calls its devices; otherwise it is built for NVIDIA's GPUs."""

_ASK = """
import json, sys, torch
gpus = torch.get_device_module(sys.argv[1])
print(json.dumps([[gpus.get_device_name(at), *gpus.mem_get_info(at)] for at in range(gpus.device_count())]))
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the model will run."""

    device: str
    name: str
    total: int
    """Bytes of memory the device has."""
    available: int
    """Bytes of it that are free now."""
    native: bool = False
    """Whether our own kernels run there, …"""
    triton: bool = False
    """… or, on a GPU, those in Triton."""
    gpus: tuple[tuple[int, int], ...] = ()
    """Of all visible GPUs ``total`` and ``available``, which are the first one's."""

    @property
    def kind(self) -> str:
        return "cpu" if self.device == "cpu" else "gpu"

    def part(self, ranks: int) -> "Machine":
        """What each of so many ranks may count on: the least that any of its GPUs has, or a share of the memory."""
        if not self.gpus:
            return dataclasses.replace(self, total=self.total // ranks, available=self.available // ranks)
        totals, frees = zip(*self.gpus[:ranks], strict=True)
        return dataclasses.replace(self, total=min(totals), available=min(frees))

    def compute_type(self, ranks: int) -> str:
        """As TGI names it: number of devices and their kind."""
        return "cpu" if self.device == "cpu" else f"{ranks}-{self.name.lower().replace(' ', '-')}"


def probe(device: str, visible: str | None) -> Machine:
    """What is there. ``device``: auto, cpu, xpu or cuda, which is torch's word for AMD's GPUs, too. ``visible``:
    CUDA_VISIBLE_DEVICES."""
    build = version("torch")
    maker = next((maker for maker in _BUILDS if build.partition("+")[2].startswith(maker)), None)
    served = _BUILDS.get(maker or "", "cuda")
    if device not in ("auto", "cpu", served):
        made_for = "CPUs only" if served == "cpu" else f"`--device {served}`"
        raise ArgumentValidation(f"`--device {device}`: torch {build} is built for {made_for}")
    gpu = None
    if device != "cpu":
        gpu = _asked(served) if maker in ("rocm", "xpu") else _smi(visible)
    if gpu is None and device not in ("auto", "cpu"):
        raise ArgumentValidation(f"`--device {device}`: {'torch' if maker else 'nvidia-smi'} finds no GPU")
    if gpu is not None and served == "cpu":
        log.warning("Running on CPU beside a %s: torch %s is built for CPUs only", gpu.name, build)
        gpu = None
    return gpu or dataclasses.replace(_cpu(Path("/")), native=library() is not None)


def _smi(visible: str | None) -> Machine | None:
    """NVIDIA's visible GPUs, by nvidia-smi."""
    if visible in ("", "-1"):
        return None
    fields = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    if visible:
        command += ["-i", visible]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [line.rsplit(",", 3) for line in lines]
        gpus = [(int(total) << 20, int(free) << 20) for _, total, free, _ in rows]
        capability = min(float(capability) for *_, capability in rows)
        return _gpus("cuda", rows[0][0].strip(), gpus, capability)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("nvidia-smi is there but says nothing useful (%s)", error)
        return None


def _asked(device: str) -> Machine | None:
    """The GPUs that a torch for AMD's or Intel's sees. It takes seconds to ask it, but no tool of theirs is always
    there, and each reads other variables to hide some."""
    command = [sys.executable, "-c", _ASK, device]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        rows: list[tuple[str, int, int]] = json.loads(told)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("torch can't say which GPUs there are (%s)", error)
        return None
    return _gpus(device, rows[0][0], [(total, free) for _, free, total in rows], None) if rows else None


def _gpus(device: str, name: str, gpus: Sequence[tuple[int, int]], capability: float | None) -> Machine:
    """``name``: of the first. ``capability``: the least of NVIDIA's."""
    missing = lacking(capability)
    if missing is not None:
        log.warning("Models run on torch's operations alone, quantized weights dequantized: Triton wants %s", missing)
    return Machine(device, name, *gpus[0], triton=missing is None, gpus=tuple(gpus))


def _cpu(root: Path) -> Machine:
    """Memory of the machine or, where smaller, what the control groups of this process leave."""
    info = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    total, available = (int(info[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    for limit, used in _groups(root):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return Machine("cpu", "cpu", total, available)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without file cache) of the memory control groups, version 1 and 2, from the process's own upwards.

    Inside a container the path in /proc/self/cgroup may not exist; its files then lie at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        for group in dict.fromkeys((folder, *folder.parents, top)):
            if not group.is_relative_to(top):
                continue
            try:
                limit = (group / names[0]).read_text().strip()
                used = int((group / names[1]).read_text())
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdecimal():
                yield int(limit), max(used - int(stat.get(names[2], 0)), 0)
