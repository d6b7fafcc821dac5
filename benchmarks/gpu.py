"""Everything that is to be known of a GPU, in eight minutes: kernels, the model, the server; nothing is downloaded.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --only attention step      # some parts
    python benchmarks/gpu.py --out FOLDER --only tune                # FOLDER/tiles.json: the best tiles of this device
    python benchmarks/gpu.py --out FOLDER --small                    # everything tiny, on a CPU, too: does it run?

Each part is a process with a time of its own: one that fails or takes too long is written down, and the next begins.
Each figure is appended to FOLDER/gpu.jsonl at once. FOLDER/gpu.md has all of them beside what the device allows, and
beside what is to be reached. Weights are synthetic, of Llama-3.1-8B's shape.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from gpu_report import markdown
from machine import description
from records import Data, Journal, Record

if TYPE_CHECKING:
    from gpu_run import Run


@dataclass(frozen=True, slots=True)
class Part:
    place: str
    """module.function, which takes a Run."""
    seconds: float
    usual: bool = True


PARTS = {
    "ceilings": Part("gpu_kernels.ceilings", 20),
    "attention": Part("gpu_kernels.attention", 60),
    "linear": Part("gpu_kernels.linears", 50),
    "sampling": Part("gpu_kernels.sampling", 25),
    "step": Part("gpu_model.step", 80),
    "correctness": Part("gpu_model.correctness", 50),
    "server": Part("gpu_server.server", 190),
    "transformers": Part("gpu_server.transformers", 60),
    "tune": Part("gpu_tiles.tune", 300, usual=False),
}
"""In their order: what others are judged by comes first."""

_GRACE = 15.0
"""Seconds in which a part that is told to end stops its servers."""


def run_part(name: str, arguments: argparse.Namespace, scratch: str, seconds: float) -> str | None:
    """In a process of its own, since what breaks a device's context breaks all that follows. What went wrong."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--part", name, "--scratch", scratch]
    command += ["--seconds", str(seconds), "--device", arguments.device, *(["--small"] if arguments.small else [])]
    with subprocess.Popen(command) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"took more than {seconds:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
    return f"ended with {process.returncode}" if process.returncode else None


def part(arguments: argparse.Namespace) -> None:
    """This process's own."""
    import torch

    from gpu_run import FULL, SMALL, Run

    signal.signal(signal.SIGTERM, _end)
    run = Run(
        arguments.part,
        arguments.out,
        Journal(arguments.out / "gpu.jsonl"),
        torch.device(arguments.device) if arguments.device == "cpu" else torch.device(arguments.device, 0),
        SMALL if arguments.small else FULL,
        Path(arguments.scratch),
        time.monotonic() + arguments.seconds,
    )
    with run.attempt("all of it"):
        part_of(arguments.part)(run)


def part_of(name: str) -> "Callable[[Run], None]":
    module, _, function = PARTS[name].place.partition(".")
    found: Callable[[Run], None] = getattr(importlib.import_module(module), function)
    return found


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit("out of time")


def about(arguments: argparse.Namespace) -> Record:
    """What the figures depend on."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        gpu = ""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "numpy")}
    told = {"gpu": gpu, "commit": commit.stdout.strip(), **versions, **description()}
    return told | {"device": arguments.device, "small": arguments.small}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    usual = [name for name, part in PARTS.items() if part.usual]
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=usual, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="auto", help="as torch calls it; auto: a GPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that everything works")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part(arguments)
        return
    if arguments.device == "auto":
        arguments.device = _gpu() or parser.error("no GPU that torch can use; --small --device cpu shows that it runs")
    signal.signal(signal.SIGTERM, _end)
    deadline = time.monotonic() + 60 * arguments.minutes
    journal = Journal(arguments.out / "gpu.jsonl")
    journal.write("run", **about(arguments))
    try:
        with tempfile.TemporaryDirectory(dir=_memory(), prefix="tgi-gpu-") as scratch:
            for name in arguments.only:
                begin = time.monotonic()
                seconds = min(PARTS[name].seconds, deadline - begin)
                wrong = run_part(name, arguments, scratch, seconds) if seconds > 0 else "no time was left"
                if wrong is not None:
                    journal.write("error", part=name, what="all of it", error=wrong)
                journal.write("part", part=name, seconds=time.monotonic() - begin)
    finally:
        told = markdown(Data.read([arguments.out / "gpu.jsonl"]))
        (arguments.out / "gpu.md").write_text(told)
        print(told)


def _gpu() -> str | None:
    """What torch calls it."""
    from tgi.launcher.machine import probe

    device = probe("auto", os.environ.get("CUDA_VISIBLE_DEVICES")).device
    return None if device == "cpu" else device


def _memory() -> str | None:
    """A folder in memory with room for a checkpoint, so that starts don't wait for a disk."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return None
    free = os.statvfs(folder)
    return str(folder) if free.f_bavail * free.f_frsize > 24 << 30 else None


if __name__ == "__main__":
    main()
