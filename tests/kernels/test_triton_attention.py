"""Triton's kernels for attention: what they compute, in a process with Triton's interpreter, and what they become for
the GPUs that they are meant for, which need not be there."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi.attention.base import AttnSpec, Precision, Segment
from tgi.attention.placed import PADDING, Placed
from tgi.attention.triton import TritonAttention
from tgi.layers.attention import HeadNorm, Turn

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tgi.kernels.triton import attention as kernels

KERNELS = ("_store", "_attend", "_merge_splits")
BF16 = Precision(torch.bfloat16, torch.bfloat16)
LLAMA = AttnSpec(32, 8, 128, 0.1)
VARIANTS = {
    "dim 128": (LLAMA, BF16),
    "dim 128, fixed": (LLAMA, Precision(torch.bfloat16, torch.bfloat16, fixed=True)),
    "dim 256, window and cap": (AttnSpec(8, 4, 256, 0.1, window=4096, softcap=50.0), BF16),
    "dim 80, slopes and sinks": (AttnSpec(32, 32, 80, 0.1, slopes=(0.5,) * 32, sinks=True), BF16),
    "dim 128, float8": (LLAMA, Precision(torch.bfloat16, torch.float8_e4m3fn)),
    "latent 576": (AttnSpec(128, 1, 576, 0.1, latent=512), BF16),
}
ONE, CHUNK = [Segment(20, 1, [0, 1])], [Segment(3, 20, [1, 2])]
CPU = torch.device("cpu")


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_attention.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def run(spec: AttnSpec, precision: Precision, segments: Sequence[Segment], placed: Placed | None = None) -> None:
    """A step whose numbers nobody looks at."""
    backend = TritonAttention(spec, precision, CPU)
    tokens = sum(segment.length for segment in segments)
    heads = spec.heads + (1 if spec.latent else 2) * spec.kv_heads
    half = 32 if spec.latent else spec.head_dim // 2
    angles = torch.zeros(tokens, half), torch.zeros(tokens, half)
    norm = None
    if not spec.latent:
        norm = HeadNorm(torch.ones(spec.heads + spec.kv_heads, spec.head_dim, dtype=precision.compute), 1e-5)
    sinks = torch.zeros(spec.heads, dtype=precision.compute) if spec.sinks else None
    turn = Turn(spec.heads, spec.kv_heads, angles, norm, spec.latent, sinks=sinks)
    qkv = torch.zeros(tokens, heads * spec.head_dim, dtype=precision.compute)
    backend.prepare(segments, placed).run(backend.allocate(4), qkv, turn)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, variant: str
) -> None:
    """They use tensor cores, fit into registers and shared memory, and spill nothing."""
    spec, precision = VARIANTS[variant]
    if capability < 89 and precision.stored == torch.float8_e4m3fn:
        precision = Precision(precision.compute, torch.float8_e5m2)
    compiles = Compiler(capability, tmp_path, monkeypatch)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    for name in KERNELS:
        compiles.instead_of(kernels, name)
    for what, segments in (("one token", ONE), ("many tokens", CHUNK)):
        compiles.made.clear()
        run(spec, precision, segments)
        assert set(compiles.made) == set(KERNELS if what == "one token" else KERNELS[:2])
        assert re.search("wgmma|mma.sync", compiles.made["_attend"].asm["ptx"])
        compiles.check(f"{variant}, {what}", recorded)


class Launches:
    """Notes how kernels are launched, but for what lies in device memory."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def note(*args: Any, **constants: Any) -> None:
            self.seen.append(
                (grid, [None if isinstance(arg, torch.Tensor | tuple) else arg for arg in args], constants)
            )

        return note


@pytest.mark.parametrize("spec, precision", VARIANTS.values(), ids=list(VARIANTS))
def test_steps_of_single_tokens_are_launched_by_their_number_alone(
    monkeypatch: pytest.MonkeyPatch, spec: AttnSpec, precision: Precision
) -> None:
    """So a captured graph may be replayed over other lengths and pages."""
    launches = Launches()
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, launches)
    recorded = []
    for segments in ([PADDING] * 3, [Segment(0, 1, [3]), Segment(60, 1, [1, 0, 2, 3]), PADDING]):
        run(spec, precision, segments)
        recorded.append(launches.seen.copy())
        launches.seen.clear()
    assert recorded[0] == recorded[1] and recorded[0]


@pytest.mark.parametrize(
    "spec, precision, reason",
    [
        (LLAMA, BF16, None),
        (AttnSpec(128, 1, 576, 0.1, latent=512), BF16, None),
        (AttnSpec(4, 4, 640, 0.1), BF16, "no heads of 640 dimensions"),
        (LLAMA, Precision(torch.float64, torch.bfloat16), "no arithmetic in torch.float64"),
        (LLAMA, Precision(torch.bfloat16, torch.int8), "no cache in torch.int8"),
    ],
)
def test_the_backend_declines_what_the_kernels_cannot_do(
    monkeypatch: pytest.MonkeyPatch, spec: AttnSpec, precision: Precision, reason: str | None
) -> None:
    monkeypatch.setattr("tgi.attention.triton.runs_on", lambda device: True)
    assert TritonAttention.declines(spec, precision, CPU) == reason


def test_it_declines_where_triton_does_not_run() -> None:
    assert TritonAttention.declines(LLAMA, BF16, CPU) == "Triton doesn't run on cpu"
