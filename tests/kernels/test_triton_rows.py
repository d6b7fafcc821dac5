"""Triton's kernels for rows and for plain matrices: what they compute, and what they become for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tgi.kernels.triton import matmul as products
from tgi.kernels.triton import rows as kernels
from tgi.kernels.triton import split


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_rows.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size", [4096, 16384])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_norms_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, size: int
) -> None:
    """They hold a row in registers."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    for name in ("_norm", "_add_norm", *(["_float8"] if capability >= 90 else [])):
        compiles.instead_of(kernels, name)
    x, weight = torch.zeros(3, size).bfloat16(), torch.ones(size).bfloat16()
    kernels.norm(x, weight, weight, 1e-5, center=True, add=True, out=x)
    kernels.add_norm(x, x, 1.0, weight, 1e-5, (weight, 1e-5))
    if capability >= 90:
        kernels.float8(x)
    compiles.check(f"{size}", recorded)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_activations_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, activation: str
) -> None:
    compiles = Compiler(capability, tmp_path, monkeypatch)
    compiles.instead_of(kernels, "_activation")
    kernels.gated(torch.zeros(3, 8192).bfloat16(), activation)
    compiles.check(activation, recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_products_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, dtype: torch.dtype
) -> None:
    """They use tensor cores, but for float32. The same for one row and for many."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)
    compiles.instead_of(products, "_matmul")
    compiles.instead_of(split, "_add")
    weight = torch.zeros(4096, 4096, dtype=dtype)
    made = []
    for rows in (1, 70):
        products.matmul(
            torch.zeros(rows, 4096, dtype=dtype), weight, into=torch.zeros(rows, 4096, dtype=dtype), fixed=True
        )
        made.append(compiles.made["_matmul"].asm["ptx"])
    assert made[0] == made[1]
    assert bool(re.search("wgmma|mma.sync", made[0])) == (dtype != torch.float32)
    compiles.check(f"{dtype}".removeprefix("torch."), recorded)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("groups", [1, 32])
def test_what_products_with_float8_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, groups: int, many: bool
) -> None:
    """Of many rows, activations in float8, too; but for one group, which torch multiplies."""
    compiles = Compiler(90, tmp_path, monkeypatch)
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)
    compiles.instead_of(products, "_matmul")
    compiles.instead_of(split, "_add")
    weight, scale = torch.zeros(4096, 4096).to(torch.float8_e4m3fn), torch.ones(groups, 4096)
    x = torch.zeros(70, 4096).bfloat16()
    if many and groups > 1:
        x_scale = torch.ones(70, groups)
        products.matmul(x.to(weight.dtype), weight, scale=scale, x_scale=x_scale, dtype=x.dtype)
        assert re.search(r"wgmma.*e4m3.e4m3", compiles.made["_matmul"].asm["ptx"])
    else:
        products.matmul(x, weight, scale=scale, rows=64 if many else 16)
        assert "wgmma" in compiles.made["_matmul"].asm["ptx"]
    compiles.check(f"float8, {groups} groups, {'many' if many else 'few'} rows", recorded)
