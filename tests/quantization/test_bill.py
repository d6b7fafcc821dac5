"""The memory ledger counts packed matrices as our kernels keep them, by the headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantization import packed_models
from tests.quantization import test_gptq as gptq
from tests.quantization.packed_models import edit, write
from tests.quantization.test_slices import FORMATS
from tests.quantization.writers import FORMATS as WRITTEN
from tests.quantization.writers import Format
from tgi.core.config import ModelFiles
from tgi.kernels.library import library
from tgi.kernels.panels import Panels
from tgi.launcher.fit import elements, fit
from tgi.launcher.flags import Options
from tgi.launcher.machine import Machine
from tgi.models.registry import load_model
from tgi.quantization.packed import Pack
from tgi.quantization.scheme import read_scheme

pytestmark = pytest.mark.skipif(library() is None, reason="only native kernels multiply packed forms")

GB = 10**9


def packer(form: Format) -> packed_models.Pack:
    return lambda module, weight: form.writer(weight)


CASES: dict[str, tuple[packed_models.Pack, dict[str, Any]]] = {
    **{
        name: (pack, config | ({"sym": True} if "symmetric" in name else {}))
        for name, (pack, config, _) in FORMATS.items()
    },
    **{name: (packer(form), dict(form.config)) for name, form in WRITTEN.items()},
    "orders that differ": (gptq.packer(4, 64, shuffled=True, apart=True), gptq.config(4, 64)),
    "groups of 24": (gptq.packer(4, 24), gptq.config(4, 24)),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_billed_as_they_are_kept(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, settings = CASES[name]
    folder = write(
        tmp_path, pack, settings, hidden_size=256, intermediate_size=384, num_key_value_heads=4, vocab_size=512
    )
    edit(folder, lambda t: t.update({key: t[key].bfloat16() for key in t if "embed" in key or "head" in key}))
    files = ModelFiles(model_id="m", folder=str(folder), weights=[str(folder / "model.safetensors")])
    plain = load_file(folder / "plain" / "model.safetensors")
    scheme = read_scheme(json.loads((folder / "config.json").read_text()))
    assert elements(files, scheme) == sum(tensor.numel() for tensor in plain.values())

    kept: list[Panels] = []
    panels = Pack.panels

    def noted(self: Pack, name: str, make: Any) -> Panels:
        kept.append(panels(self, name, make))
        return kept[-1]

    monkeypatch.setattr(Pack, "panels", noted)
    load_model(files, torch.bfloat16, torch.device("cpu"), quantize="stored", progress=lambda done, total: None)
    parts = [
        part
        for each in kept
        for part in (each.weight, each.scale, each.min, each.order, each.factors)
        if part is not None
    ]
    used = sum(part.numel() * part.itemsize for part in parts)
    options = Options(max_total_tokens=64)
    billed = fit(options, files, Machine("cpu", "cpu", 16 * GB, 8 * GB, native=True)).ledger["weights"]
    assert 0.93 * used < billed < 1.15 * used
    assert fit(options, files, Machine("cuda", "H100", 80 * GB, 70 * GB)).ledger["weights"] == 2 * elements(
        files, scheme
    )


def test_a_tensor_that_only_looks_packed_is_counted_as_it_is(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(8, 8), "a.scales": torch.zeros(8)}, tmp_path / "model.safetensors")
    files = ModelFiles(model_id="m", folder=str(tmp_path), weights=[str(tmp_path / "model.safetensors")])
    assert elements(files, read_scheme({"quantization_config": {"quant_method": "gptq", "bits": 4}})) == 72
