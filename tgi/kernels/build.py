"""Compiles the native kernels into one library: run when the package is installed, or `python -m tgi.kernels.build`.

Knows the compiler's options and nothing of torch, so that it runs in an empty build environment.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "libtgi_kernels.so"

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "avx512vnni": [*_AVX512, "-mavx512vnni"]},
    "aarch64": {"neon": []},
}
"""Machine → instruction sets, best last → what the compiler is told."""

# No contraction: a sum is rounded where the source says so, alike for every number of rows.
# (GCC's own intrinsics begin with values that it then warns about.)
_OPTIONS = "-O2 -std=c++17 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -Wall -Wno-psabi".split()
_OPTIONS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


# Where no compiler is installed, there may be no OpenMP runtime but torch's.
_LINK = ["-shared", "-fopenmp", "-Wl,-z,defs", "-Wl,-rpath,$ORIGIN/../../torch/lib"]


def build(target: Path = LIBRARY, *, compiler: str | None = None, machine: str = platform.machine()) -> None:
    """Write the library; OSError or CalledProcessError if that can't be done here."""
    command = shlex.split(compiler or os.environ.get("CXX", "g++"))
    if machine not in ISAS:
        raise OSError(f"no native kernels for {machine}")
    isas = ISAS[machine]
    objects = target.parent / f"{target.stem}.{os.getpid()}"

    def compile_one(job: tuple[str, list[str]]) -> str:
        name, options = job
        out = f"{objects}.{name}.o"
        source = SOURCES / ("run.cpp" if name == "run" else "kernels.cpp")
        subprocess.run([*command, *_OPTIONS, *options, "-c", str(source), "-o", out], check=True)
        return out

    everything = " ".join(f"DO({name})" for name in isas)
    jobs = [(name, [*options, f"-DTGI_ISA={name}"]) for name, options in isas.items()]
    jobs.append(("run", [f"-DTGI_ISAS(DO)={everything}"]))
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, jobs))
        subprocess.run([*command, *_LINK, *made, "-o", f"{objects}.so"], check=True)
        Path(f"{objects}.so").replace(target)
    finally:
        for leftover in target.parent.glob(f"{objects.name}.*"):
            leftover.unlink()


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:2]))
