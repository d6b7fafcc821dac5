"""Triton's kernels that draw tokens: what they compute, in a process with Triton's interpreter, and what they become
for the GPUs that they are meant for, which need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.test_sampling import work
from tgi.runtime.triton_sampler import TritonSampler

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tests.kernels.interpreted_triton_sampling import KERNELS
from tgi.kernels.triton import sampling as kernels


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_sampling.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("vocabulary", [32_003, 128_256, 262_144])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, vocabulary: int
) -> None:
    """They fit into registers and shared memory, and spill nothing; wishes and rows make no others of them."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    for name in KERNELS:
        compiles.instead_of(kernels, name)
    sampler = TritonSampler(vocabulary, torch.device("cpu"))
    of = {}
    for rows in (1, 2, 16):
        works = [work(row, vocabulary, greedy=False, top_k=5, presence_penalty=0.5) for row in range(rows)]
        sampler.draw(torch.zeros(rows, vocabulary), works)
        assert of == {} or of == {name: kernel.hash for name, kernel in compiles.made.items()}
        of = {name: kernel.hash for name, kernel in compiles.made.items()}
    assert set(of) == set(KERNELS)
    compiles.check(f"vocabulary {vocabulary}", recorded)
