"""What the model will run on: GPUs by nvidia-smi, memory by the kernel and its control groups. Imports no torch."""

import dataclasses
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tgi.kernels.library import library
from tgi.kernels.triton import lacking
from tgi.launcher.errors import ArgumentValidation

log = logging.getLogger(__name__)


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
    """What is there. ``device``: auto, cpu or cuda. ``visible``: CUDA_VISIBLE_DEVICES."""
    gpu = None if device == "cpu" else _gpu(visible)
    if device == "cuda" and gpu is None:
        raise ArgumentValidation("`--device cuda`: nvidia-smi finds no GPU")
    if gpu is not None and (build := version("torch")).endswith("+cpu"):
        if device == "cuda":
            raise ArgumentValidation(f"`--device cuda`: torch {build} is built for CPUs only")
        log.warning("Running on CPU beside a %s: torch %s is built for CPUs only", gpu.name, build)
        gpu = None
    return gpu or dataclasses.replace(_cpu(Path("/")), native=library() is not None)


def _gpu(visible: str | None) -> Machine | None:
    """The visible GPUs, by nvidia-smi."""
    if visible in ("", "-1"):
        return None
    fields = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    if visible:
        command += ["-i", visible]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [line.rsplit(",", 3) for line in lines]
        gpus = tuple((int(total) << 20, int(free) << 20) for _, total, free, _ in rows)
        missing = lacking(min(float(capability) for *_, capability in rows))
        if missing is not None:
            log.warning(
                "Models run on torch's operations alone, quantized weights dequantized: Triton wants %s", missing
            )
        return Machine("cuda", rows[0][0].strip(), *gpus[0], triton=missing is None, gpus=gpus)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("nvidia-smi is there but says nothing useful (%s)", error)
        return None


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
