"""Sparse-Marlin's checkpoints: of four inputs two are kept, which torch's own converter chooses and describes; then
where each number goes, one by one, by the tables of its packer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from tests.parity.conftest import load
from tests.quantization.packed_models import Pack, edit, rounded, same, stream, write
from tests.quantization.writers import llm_compressor
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check


def places(bits: int) -> list[int]:
    """Of the 1024 numbers of 16 kept inputs by 64 outputs, four blocks of 16 by 16 one behind the other."""
    found: list[int] = []
    for thread in range(32):
        column = thread // 4
        rows = [2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1]
        for j in range(4):
            own = [16 * row + 256 * (column // 2) + 8 * (column % 2) + 4 * half + j for half in (0, 1) for row in rows]
            turns = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3, 4, 6, 5, 7)
            found += [own[at] for at in turns]
    return found


SCALES = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
NAMES = ("B_24", "B_meta", "s")


def packer(bits: int, group: int, names: tuple[str, str, str] = NAMES) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outs, inner = weight.shape
        fours = weight.view(outs, -1, 4)
        kept = fours.masked_fill(fours.abs().argsort(-1).argsort(-1) < 2, 0).view(outs, inner)
        groups = torch.arange(inner) // (inner if group == -1 else group)
        stored, _, scale, values = rounded(kept, bits, groups, symmetric=True)
        half = 1 << bits - 1
        sparse, meta = sparse_semi_structured_from_dense_cutlass((stored - half).half())
        numbers = (sparse.float() + half).T
        tiles = numbers.reshape(inner // 32, 16, outs // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
        words = stream(tiles[:, places(bits)].reshape(inner // 32, -1).T, bits).T
        scales = scale.T.reshape(-1, 64)[:, SCALES].reshape(-1, outs) if len(scale.T) > 1 else scale.T
        return dict(zip(names, (words, meta.reshape(inner // 32, -1), scales), strict=True)), values

    return pack


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": bits, "group_size": group} | more


SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 4}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [128, -1])
def test_what_the_tensors_mean(tmp_path: Path, bits: int, group: int) -> None:
    same(write(tmp_path, packer(bits, group), config(bits, group), **SIZES))


def test_llm_compressor_s_names(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    pack = packer(4, 128, ("weight_packed", "meta", "scale_packed"))
    same(write(tmp_path, pack, llm_compressor("marlin-24", weights), **SIZES))


def test_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, packer(4, 128), config(4, 128), **SIZES)
    name = "model.layers.1.mlp.up_proj.B_meta"
    edit(folder, lambda t: t.update({name: t[name][1:]}))
    with pytest.raises(StartupError, match=f"{name} has shape"):
        load(folder)
    raw = json.loads((write_model(tmp_path / "other", "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match="bits: 2"):
        check(raw | {"quantization_config": config(2, 128)})
