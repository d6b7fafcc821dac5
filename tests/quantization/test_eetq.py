"""EETQ's checkpoints: int8 in CUTLASS's order for mixed products, written step by step as EETQ does it."""

import json
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import load
from tests.quantization.packed_models import edit, same, write
from tgi.core.errors import StartupError
from tgi.models.registry import check

CONFIG = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}


def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    outs, inner = weight.shape
    scale = (weight.abs().amax(1) / 127).half()
    rounded = (weight / scale.float()[:, None]).round().clamp(-128, 127)
    rows = rounded.T.to(torch.int8)  # [inner, outs]
    # Rows in another order, 16 by 16.
    rows = rows.view(-1, 16, outs)[:, [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]].reshape(inner, outs)
    columns = rows.T.contiguous()
    # Of two columns 64 numbers by turns.
    turns = torch.empty(outs // 2, inner // 64, 2, 64, dtype=torch.int8)
    for column in range(outs):
        turns[column // 2, :, column % 2] = columns[column].view(-1, 64)
    # 128 more, and of each four the middle ones change places.
    flat = (turns.int() + 128).to(torch.uint8).view(torch.int8).view(-1, 4)[:, [0, 2, 1, 3]]
    return {"weight": flat.reshape(inner, outs), "weight_scales": scale}, rounded * scale.float()[:, None]


def test_what_the_tensors_mean(tmp_path: Path) -> None:
    same(write(tmp_path, pack, CONFIG, "qwen2", hidden_size=256, num_key_value_heads=4))


def test_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, pack, CONFIG, hidden_size=256, num_key_value_heads=4)
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(StartupError, match="weights: 'int4'"):
        check(raw | {"quantization_config": CONFIG | {"weights": "int4"}})
    name = "model.layers.1.mlp.up_proj.weight_scales"
    edit(folder, lambda t: t.update({name: t[name][1:]}))
    with pytest.raises(StartupError, match=f"{name} has shape"):
        load(folder)
    edit(folder, lambda t: t.pop(name))
    with pytest.raises(StartupError, match=r"up_proj\.weight has type I8, which eetq forbids"):
        load(folder)
