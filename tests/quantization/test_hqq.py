"""HQQ's checkpoints as transformers saves them: tensors for all that a module knows, written by hqq's layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import load
from tests.quantization.packed_models import Pack, edit, same, write
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check

FIELDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Numbers of a word; of 3 bits, to a word of 32."""


def packer(bits: int, group: int, dtype: torch.dtype = torch.float16, *, as_float: bool = False) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        blocks = weight.reshape(-1, group)
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        scale = ((high - low) / ((1 << bits) - 1)).to(dtype)
        zero = (-low / scale.float()).to(dtype)
        stored = (blocks / scale.float() + zero.float()).round().clamp(0, (1 << bits) - 1)
        values = ((stored - zero.float()) * scale.float()).view_as(weight)
        each = FIELDS[bits]
        # The first part of all rows is in the highest bits, the last in the lowest.
        parts = torch.nn.functional.pad(stored.long(), (0, 0, 0, -len(stored) % each)).chunk(each)
        words = sum(part << bits * (each - 1 - at) for at, part in enumerate(parts))
        assert isinstance(words, torch.Tensor)
        words = words.to(torch.int32 if bits == 3 else torch.uint8)
        return {
            "W_q": words.view(dtype) if as_float else words,
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor(weight.shape),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "axis": torch.tensor(1, dtype=torch.int32),
            "packing": text("4bit_u8"),
            "unpack_view_dtype": text("torch.uint8"),
            "compute_dtype": text("torch.float16"),
            **{key: torch.tensor(0, dtype=torch.uint8) for key in ("quant_scale", "quant_zero", "offload_meta")},
            **{key: torch.tensor(1, dtype=torch.uint8) for key in ("encoded_state_dict", "stores_quant_config")},
            **{key: torch.tensor(1, dtype=torch.uint8) for key in ("channel_wise", "optimize", "round_zero")},
            "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
        }, values

    return pack


def text(value: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


def params(bits: int, group: int, **more: Any) -> dict[str, Any]:
    weight = {"nbits": bits, "channel_wise": True, "group_size": group, "optimize": True, "round_zero": True, "axis": 1}
    return {"weight_quant_params": weight | more, "scale_quant_params": None, "zero_quant_params": None}


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "hqq", "quant_config": params(bits, group, **more), "skip_modules": ["lm_head"]}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_what_the_tensors_mean(tmp_path: Path, bits: int) -> None:
    same(write(tmp_path, packer(bits, 64), config(bits, 64), "qwen2"))


@pytest.mark.parametrize("bits", [4, 3])
def test_integers_stored_as_floating_point(tmp_path: Path, bits: int) -> None:
    dtype = torch.bfloat16 if bits == 4 else torch.float32
    same(write(tmp_path, packer(bits, 32, dtype, as_float=True), config(bits, 32)))


def test_layers_of_other_settings(tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return packer(8, 32)(module, weight) if "down" in module else packer(4, 64)(module, weight)

    tags = {f"self_attn.{part}_proj": params(4, 64) for part in "qkvo"}
    tags |= {"mlp.gate_proj": params(4, 64), "mlp.up_proj": params(4, 64), "mlp.down_proj": params(8, 32)}
    same(write(tmp_path, pack, {"quant_method": "hqq", "quant_config": tags, "skip_modules": []}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (config(5, 64), "nbits: 5"),
        (config(4, 64, axis=0), "axis: 0"),
        (config(4, 64, channel_wise=False), "channel_wise: False"),
        ({"quant_method": "hqq", "quant_config": params(4, 64) | {"zero_quant_params": {"nbits": 8}}}, "zero_quant"),
        ({"quant_method": "hqq"}, "quant_config: expected"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": settings})


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{NAME}.axis"].fill_(0), "axis is 0"),
        (lambda t: t[f"{NAME}.nbits"].fill_(5), "nbits is 5"),
        (lambda t: t[f"{NAME}.quant_zero"].fill_(1), "quant_zero is true"),
        (lambda t: t.update({f"{NAME}.W_q": t[f"{NAME}.W_q"][1:]}), "W_q has .* bytes"),
        (lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"][1:]}), "zero has shape .* 383 groups"),
        (lambda t: t.pop(f"{NAME}.zero"), "zero is missing"),
    ],
)
def test_tensors_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    folder = write(tmp_path, packer(4, 64), config(4, 64))
    edit(folder, change)
    with pytest.raises(StartupError, match=words):
        load(folder)
