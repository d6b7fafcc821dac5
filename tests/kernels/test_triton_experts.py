"""Triton's kernels for mixtures of experts: what they compute, in a process with Triton's interpreter, and what they
become for the GPUs that they are meant for, which need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.coded_forms import FORMS

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tgi.kernels.triton import coded
from tgi.kernels.triton import experts as kernels
from tgi.kernels.triton.experts import Matrices, Pairs
from tgi.quantization.device import code

COUNT, HIDDEN, INNER = 128, 1024, 256
TOKENS = {"few": 4, "many": 512}
ROUTING: dict[str, Any] = {
    "per_token": 8,
    "score": "sigmoid",
    "groups": 8,
    "groups_per_token": 4,
    "group_best": 2,
    "norm": 1.0,
    "factor": 2.5,
}
"""The most that is asked for: DeepSeek V3's."""


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_experts.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def stack(form: str, outs: int, inner: int) -> Matrices:
    """One expert's numbers for all: nobody computes with them."""
    if form == "plain":
        return Matrices(torch.zeros(COUNT * outs, inner).bfloat16(), COUNT)
    matrix = code(FORMS[form](outs, inner, 128))
    return Matrices(coded.assemble([matrix] * COUNT, COUNT * outs, torch.device("cpu")), COUNT)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_they_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int) -> None:
    """They fit into registers and shared memory, spill nothing, and products use tensor cores."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    for name in ("_route", "_arrange", "_plain", "_mix"):
        compiles.instead_of(kernels, name)
    kernels.route(torch.zeros(4, 256), torch.zeros(256), **ROUTING)
    check(compiles, "_route", "experts", recorded)
    gate_up, down = stack("plain", 2 * INNER, HIDDEN), stack("plain", HIDDEN, INNER)
    for rows, tokens in TOKENS.items():
        pairs = kernels.arrange(torch.zeros(tokens, 8, dtype=torch.int64), COUNT)
        check(compiles, "_arrange", "experts", recorded)
        inner = kernels.gate(torch.zeros(tokens, HIDDEN).bfloat16(), gate_up, pairs, "silu")
        check(compiles, "_plain", f"experts, gated, {rows}", recorded)
        outs = kernels.linear(inner, down, pairs)
        check(compiles, "_plain", f"experts, {rows}", recorded)
        kernels.mix(outs, torch.zeros(tokens, 8), torch.zeros(tokens, HIDDEN).bfloat16())
        check(compiles, "_mix", "experts", recorded)


@pytest.mark.parametrize("form", ["4 bits", "e4m3"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_those_of_quantized_ones_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, form: str
) -> None:
    compiles = Compiler(capability, tmp_path, monkeypatch)
    compiles.instead_of(kernels, "_coded")
    gate_up = stack(form, 2 * INNER, HIDDEN)
    for rows, tokens in TOKENS.items():
        first = torch.zeros(COUNT + 1, dtype=torch.int32)
        pairs = Pairs(first, torch.zeros(8 * tokens, dtype=torch.int32), 8)
        kernels.gate(torch.zeros(tokens, HIDDEN).bfloat16(), gate_up, pairs, "silu")
        check(compiles, "_coded", f"experts, {form}, gated, {rows}", recorded)


def check(compiles: Compiler, kernel: str, variant: str, recorded: Figures) -> None:
    assert list(compiles.made) == [kernel]
    if kernel in ("_plain", "_coded"):
        assert re.search("wgmma|mma.sync", compiles.made[kernel].asm["ptx"])
    compiles.check(variant, recorded)
    compiles.made.clear()
