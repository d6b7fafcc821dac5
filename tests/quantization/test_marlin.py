"""Marlin's checkpoints, written by the tables of its own package: where each number goes, one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import load
from tests.quantization.packed_models import Pack, edit, rounded, same, stream, write
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check


def places() -> list[int]:
    """Of the 1024 numbers of 16 inputs by 64 outputs, four blocks of 16 by 16 one behind the other, in the order that
    they are stored in."""
    found: list[int] = []
    for thread in range(32):
        column = thread // 4
        rows = [2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1]
        own = [16 * row + column + 8 * half for half in (0, 1) for row in rows]
        for block in range(4):
            found += [own[which] + 256 * block for which in (0, 2, 4, 6, 1, 3, 5, 7)]
    return found


SCALES = [i + 8 * j for i in range(8) for j in range(8)]
ONE_GROUP = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def packer(group: int) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outs, inner = weight.shape
        groups = torch.arange(inner) // (inner if group == -1 else group)
        stored, _, scale, values = rounded(weight, 4, groups, symmetric=True)
        tiles = stored.T.reshape(inner // 16, 16, outs // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
        order = SCALES if len(groups.unique()) > 1 else ONE_GROUP
        return {
            "B": stream(tiles[:, places()].reshape(inner // 16, -1).T, 4).T,
            "s": scale.T.reshape(-1, len(order))[:, order].reshape(-1, outs),
            "workspace": torch.zeros(outs // 128 * 16, dtype=torch.int32),
        }, values

    return pack


def config(group: int, **more: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": group, "sym": True, "desc_act": False} | more


SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 4}
SPELLINGS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "is_marlin_format": True},
    {"quant_method": "gptq", "checkpoint_format": "marlin"},
    {"quant_method": "marlin"},
]


@pytest.mark.parametrize("group", [128, -1])
def test_what_the_tensors_mean(tmp_path: Path, group: int) -> None:
    same(write(tmp_path, packer(group), config(group, **SPELLINGS[0]), **SIZES))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(tmp_path: Path, spelling: dict[str, Any]) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    scheme = check(raw | {"quantization_config": config(128, **spelling)}).scheme
    assert scheme is not None and scheme.method == "marlin"


def test_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, packer(128), config(128, quant_method="marlin"), **SIZES)
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(StartupError, match="bits: 8"):
        check(raw | {"quantization_config": config(128, quant_method="marlin", bits=8)})
    name = "model.layers.1.mlp.up_proj.s"
    edit(folder, lambda t: t.update({name: t[name][:1]}))
    with pytest.raises(StartupError, match=f"{name} has shape .* group_size 128 implies"):
        load(folder)
