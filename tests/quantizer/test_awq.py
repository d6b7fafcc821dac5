"""AWQ: what is scaled where, and that clipping and scaling are worth it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.conftest import load, logits, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.job import Job
from tgi.quantizer import awq
from tgi.quantizer.process import quantize

INNER, GROUP = 64, 32


def inputs() -> torch.Tensor:
    """A few channels are much larger than the others."""
    torch.manual_seed(0)
    x = torch.randn(200, INNER)
    x[:, 3::9] *= 30
    return x


def error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> float:
    return float((x @ (values - weight).T).square().mean())


def test_scales_and_clipping_lower_the_error_of_the_product() -> None:
    x = inputs()
    activity = awq.Activity.of(x, GROUP)
    weight = torch.randn(48, INNER)
    plain = error(x, weight, awq.quantize(weight, None, group=GROUP).values)
    clipped = error(x, weight, awq.quantize(weight, activity, group=GROUP).values)
    scale = awq.search(activity, [weight])
    scaled = error(x, weight, awq.quantize(weight * scale, None, group=GROUP).values / scale)
    both = awq.quantize(weight * scale, awq.Activity.of(x / scale, GROUP), group=GROUP).values / scale
    assert scale[3] > 2 * scale[4]
    assert clipped < 0.9 * plain
    assert scaled < 0.5 * plain
    assert error(x, weight, both) < min(clipped, scaled)


def test_inputs_of_one_source_share_a_scale() -> None:
    source = torch.arange(INNER) // 4 + 7
    scale = awq.search(awq.Activity.of(inputs(), GROUP), [torch.randn(48, INNER)], source)
    assert scale.unique().numel() > 2
    assert torch.equal(scale.view(-1, 4), scale.view(-1, 4)[:, :1].expand(-1, 4))


@dataclass
class Exact:
    """A matrix that wasn't rounded."""

    values: torch.Tensor

    def divide(self, divisors: torch.Tensor) -> None:
        self.values = self.values / divisors[:, None]


FAMILIES = """neox falcon-40b gpt2 bigcode opt opt-350m qwen2-moe granite-moe dbrx deepseek-v2-grouped cohere olmo2
    glm4-tied llama phi3 gemma2""".split()


@pytest.mark.parametrize("name", FAMILIES)
def test_scaling_alone_changes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    if name in VARIANTS:
        write_reference(folder, VARIANTS[name][0], **VARIANTS[name][1])
    else:
        write_model(folder, name)
    _exact(monkeypatch, transposed=name == "gpt2")
    quantize(_job(folder, output))
    _without_quantization(output)
    ids = tokens(40)
    before, after = (logits(load(path, max_total_tokens=64), ids) for path in (folder, output))
    assert (after - before).abs().max() < 1e-3 * before.std()
    changed = _changed(folder, output)
    folded = name not in ("opt-350m", "olmo2")  # their norms stand behind
    assert any("norm" in each or "ln_" in each for each in changed) == folded
    modules = {each.split(".")[-2] for each in changed}
    if name in ("llama", "gemma2"):
        assert {"v_proj", "up_proj"} <= modules and "can't be scaled" not in caplog.text
    elif name == "opt":  # ReLU passes scales on
        assert {"v_proj", "fc1"} <= modules
    elif name == "olmo2":
        assert "model.layers.*.mlp.gate_proj: its inputs can't be scaled" in caplog.text


def _exact(monkeypatch: pytest.MonkeyPatch, *, transposed: bool) -> None:
    """Let nothing be rounded, whatever its size."""

    def tensors(_self: object, quantized: Exact) -> Mapping[str, torch.Tensor]:
        return {"weight": quantized.values.T if transposed else quantized.values}

    monkeypatch.setattr("tgi.quantizer.methods.Awq.quantize", lambda self, weight, seen: Exact(weight))
    monkeypatch.setattr("tgi.quantizer.methods.Awq.tensors", tensors)
    monkeypatch.setattr("tgi.quantizer.methods.Awq.declines", lambda self, outs, inner: None)
    monkeypatch.setattr("tgi.quantizer.methods._group", lambda asked, inputs: 4)
    monkeypatch.setattr("tgi.quantizer.calibration.sequences", lambda *_: tokens(96).view(3, 32))


def _job(folder: Path, output: Path) -> Job:
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    return Job(model=files, output=str(output), method="awq", bits=4, sequence_length=32)


def _without_quantization(folder: Path) -> None:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))


def _changed(folder: Path, output: Path) -> set[str]:
    """Tensors that both have, with other numbers."""
    before = load_file(folder / "model.safetensors")
    after = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name for name in before.keys() & after.keys() if not torch.allclose(before[name], after[name], rtol=1e-3)}
