"""Triton's kernels for coded matrices: what they compute, in a process with Triton's interpreter, and what they become
for the GPUs that they are meant for, which need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.kernels.coded_forms import FORMS
from tests.quantization.packed_models import write
from tests.quantization.test_slices import FORMATS
from tgi.core.config import ModelFiles
from tgi.core.model_config import read_config
from tgi.launcher.fit import fit
from tgi.launcher.flags import Options
from tgi.launcher.machine import Machine
from tgi.layers.checkpoint import Checkpoint
from tgi.models.config import DecoderConfig
from tgi.models.dense import DenseDecoder
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.parallel import Group

pytest.importorskip("triton")

from tests.kernels.compiled import CAPABILITIES, Compiler, Figures  # behind the check that it is there
from tgi.kernels.triton import linear as kernels
from tgi.kernels.triton import split
from tgi.quantization.device import CodedLinear


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_linear.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("form", ["4 bits, minima", "8 bits", "e4m3", "e2m1", "nf4"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Figures, capability: int, form: str
) -> None:
    """They use tensor cores, fit into registers and shared memory, and spill nothing."""
    compiles = Compiler(capability, tmp_path, monkeypatch)
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)
    for module, name in ((kernels, "_row"), (kernels, "_tile"), (kernels, "_float"), (split, "_add")):
        compiles.instead_of(module, name)
    method = CodedLinear.of([FORMS[form](64, 4096, 64)], 64, torch.device("cpu"), torch.zeros(64).bfloat16())
    for rows in (1, 64, 65):
        method(torch.zeros(rows, 4096).bfloat16())
    assert set(compiles.made) == {"_row", "_tile", "_add", "_float"}
    assert re.search("wgmma|mma.sync", compiles.made["_tile"].asm["ptx"])
    compiles.check(form, recorded)


@pytest.mark.parametrize("name", ["gptq, 3 bits", "gptq, symmetric", "marlin, one group", "eetq", "hqq"])
def test_memory_is_billed_as_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pack, settings, _ = FORMATS[name]
    claims: dict[str, Any] = {"sym": True} if "symmetric" in name else {}
    folder = write(tmp_path, pack, settings | claims, hidden_size=256, intermediate_size=384, num_key_value_heads=4)
    config = check(read_config(folder))
    assert isinstance(config, DecoderConfig)
    files = ModelFiles(model_id="m", folder=str(folder), weights=[str(folder / "model.safetensors")])
    made: list[CodedLinear] = []
    of = CodedLinear.of
    monkeypatch.setattr(CodedLinear, "of", lambda *args, **how: made.append(of(*args, **how)) or made[-1])
    with open_weights(files, config, lambda done, total: None) as weights:
        DenseDecoder(config, Checkpoint(weights, torch.bfloat16, torch.device("cpu"), Group(), None, "stored"), 64)
    numbers = {key: part.numel() for key, part in load_file(folder / "plain" / "model.safetensors").items()}
    plain = 2 * sum(count for key, count in numbers.items() if not key.endswith("_proj.weight"))
    gpu = Machine("cuda", "H100", 80 << 30, 70 << 30, triton=True)
    billed = fit(Options(max_total_tokens=64), files, gpu).ledger["weights"]
    assert 0.93 < (sum(method.weight.bytes for method in made) + plain) / billed <= 1
