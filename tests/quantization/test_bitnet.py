"""BitNet's checkpoints as transformers packs them: a byte has a number of each quarter of the rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantization.packed_models import Pack, same, write
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check

CONFIG = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}


def packer(*, divides: bool = True) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        mean = weight.abs().mean().bfloat16().reshape(1)
        stored = (weight / mean.float()).round().clamp(-1, 1)
        scale = 1 / mean if divides else mean
        values = stored / scale.float() if divides else stored * scale.float()
        quarters = (stored + 1).to(torch.uint8).chunk(4)
        packed = sum(part << 2 * at for at, part in enumerate(quarters))
        assert isinstance(packed, torch.Tensor)
        return {"weight": packed, "weight_scale": scale}, values

    return pack


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_what_the_tensors_mean(tmp_path: Path, linear_class: str) -> None:
    same(write(tmp_path, packer(divides=linear_class == "bitlinear"), CONFIG | {"linear_class": linear_class}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linear_class": "linear"}, "linear_class: 'linear'"),
        ({"quantization_mode": "online"}, "quantization_mode: 'online'"),
        ({"use_rms_norm": True}, "use_rms_norm: True"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": CONFIG | settings})
