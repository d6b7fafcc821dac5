"""Triton's kernels for adapters: what they compute, in a process with Triton's interpreter, and what they become."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tgi.kernels.triton import lora
from tgi.kernels.triton.experts import Pairs


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_lora.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, rank: int
) -> None:
    """They use tensor cores, fit into registers and shared memory, and spill nothing."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    for name in ("_shrink", "_expand"):
        compiles.instead_of(lora, name)
    adapters = lora.Adapters(
        torch.zeros(4, rank, 1024).bfloat16(), torch.zeros(4, 512, rank).bfloat16(), torch.zeros(4)
    )
    rows = Pairs(torch.zeros(5, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), 1)
    lora.add(torch.zeros(32, 512).bfloat16(), torch.zeros(32, 1024).bfloat16(), adapters, rows)
    assert set(compiles.made) == {"_shrink", "_expand"}
    for kernel in compiles.made.values():
        assert re.search("wgmma|mma.sync", kernel.asm["ptx"])
    compiles.check(f"rank {rank}", recorded)
