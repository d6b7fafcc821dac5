"""Triton's kernels for coded matrices: what they compute, in a process with Triton's interpreter, and what they become
for the GPUs that they are meant for, which need not be there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
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

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  # behind the check that it is there

from tgi.kernels.triton import linear as kernels  # noqa: E402
from tgi.quantization.device import CodedLinear  # noqa: E402

SHARED = {80: 163, 90: 227}
"""Compute capability → KB of shared memory that a program may have."""


def test_what_they_compute() -> None:
    checks = Path(__file__).with_name("interpreted_triton_linear.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


class Device:
    """The driver of a GPU that isn't there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # each has what was compiled for it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, seen: Callable[[str, Any], None]) -> None:
        self._kernel = kernel
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **how: self._seen(self._kernel.__name__, self._kernel.warmup(*args, grid=grid, **how))


@pytest.mark.parametrize("form", ["4 bits, minima", "8 bits", "e4m3", "e2m1", "nf4"])
@pytest.mark.parametrize("capability", SHARED)
def test_what_they_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, form: str) -> None:
    """They use tensor cores, fit into registers and shared memory, and spill nothing."""
    made: dict[str, Any] = {}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", Device(capability))
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    for name in ("_row", "_tile", "_add", "_float"):
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), made.__setitem__))
    method = CodedLinear.of([FORMS[form](64, 4096, 64)], 64, torch.device("cpu"), torch.zeros(64).bfloat16())
    for rows in (1, 64, 65):
        method(torch.zeros(rows, 4096).bfloat16())
    assert set(made) == {"_row", "_tile", "_add", "_float"}
    assert re.search("wgmma|mma.sync", made["_tile"].asm["ptx"])
    for name, kernel in made.items():
        assert kernel.metadata.shared <= SHARED[capability] << 10
        used = resources(kernel.asm["cubin"], tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills registers: {used}"


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
    monkeypatch.setattr(CodedLinear, "of", lambda *how: made.append(of(*how)) or made[-1])
    with open_weights(files, config, lambda done, total: None) as weights:
        DenseDecoder(config, Checkpoint(weights, torch.bfloat16, torch.device("cpu"), Group(), None, "stored"), 64)
    numbers = {key: part.numel() for key, part in load_file(folder / "plain" / "model.safetensors").items()}
    plain = 2 * sum(count for key, count in numbers.items() if not key.endswith("_proj.weight"))
    gpu = Machine("cuda", "H100", 80 << 30, 70 << 30, triton=True)
    billed = fit(Options(max_total_tokens=64), files, gpu).ledger["weights"]
    assert 0.93 < (sum(method.weight.bytes for method in made) + plain) / billed <= 1


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """What a compiled kernel takes, by the names that NVIDIA's tools have for it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", told)}
