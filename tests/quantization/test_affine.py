"""MLX's checkpoints, written by transformers' own converter for its Metal kernels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations import metal_quantization as theirs

from tests.quantization.packed_models import Pack, quantize, same, write
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check


def packer(bits: int, group: int, minima: str = "qbiases", dtype: torch.dtype = torch.float32) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        words, scales, least = theirs._affine_quantize_tensor(weight, group, bits)
        scales, least = scales.to(dtype), least.to(dtype)
        values = theirs._affine_dequantize_tensor(words, scales, least, group, bits)
        return {"weight": words, "scales": scales, minima: least}, values

    return pack


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "metal", "bits": bits, "group_size": group} | more


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_what_the_tensors_mean(tmp_path: Path, bits: int, group: int) -> None:
    same(write(tmp_path, packer(bits, group), config(bits, group), "qwen2"))


def test_mlx_s_own_names(tmp_path: Path) -> None:
    """Its config has no method; it quantizes embedding and head, too."""
    folder = write_model(tmp_path, "llama", hidden_size=128, intermediate_size=192, tie_word_embeddings=True)
    suffix = ("_proj.weight", "embed_tokens.weight")
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    quantize(folder, packer(4, 64, "biases", torch.bfloat16), settings, suffix)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization": settings}))
    same(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "bits: 3"),
        ({"group_size": -1}, "group_size: -1"),
        ({"mode": "mxfp4"}, "mode: 'mxfp4'"),
        ({"model.layers.0.mlp.down_proj": {"bits": 8}}, "model.layers.0.mlp.down_proj: settings of its own"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": config(4, 64) | settings})
