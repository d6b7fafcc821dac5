"""AutoRound's checkpoints, which hold GPTQ's or AWQ's tensors and say so in their own way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantization import test_awq as awq
from tests.quantization import test_gptq as gptq
from tests.quantization.packed_models import same, write
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check


def config(packing: str | None, bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    settings = {"quant_method": "auto-round", "bits": bits, "group_size": group, "data_type": "int", "iters": 200}
    return settings | ({} if packing is None else {"packing_format": packing}) | more


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq", None])
def test_gptq_of_version_1(tmp_path: Path, packing: str | None) -> None:
    method = {"quant_method": "intel/auto-round"} if packing is None else {}
    same(write(tmp_path, gptq.packer(4, 32), config(packing, sym=False) | method))


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel"])
def test_zeros_as_they_are(tmp_path: Path, packing: str) -> None:
    same(write(tmp_path, gptq.packer(3, 32, version=2), config(packing, 3, sym=False)))


def test_awq(tmp_path: Path) -> None:
    same(write(tmp_path, awq.gemm(64), config("auto_round:auto_awq", group=64)))


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    """A module's own come before a pattern's."""

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        bits, group = (8, 64) if "down" in module else (2, 32)
        return gptq.packer(8 if module == "model.layers.1.mlp.up_proj" else bits, group)(module, weight)

    own = {r".*down_proj.*": {"bits": 8, "group_size": 64}, "model.layers.1.mlp.up_proj": {"bits": 8}}
    own |= {"lm_head": {"bits": 16}, r".*up_proj.*": {"bits": 2}}
    same(write(tmp_path, pack, config("auto_round:auto_gptq", 2, extra_config=own)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing_format": "auto_round:nv_fp"}, "packing_format: 'auto_round:nv_fp'"),
        ({"data_type": "mx_fp"}, "data_type: 'mx_fp'"),
        ({"act_bits": 8}, "act_bits: 8"),
        ({"bits": 5}, "bits: 5"),
        ({"extra_config": {"lm_head": {"bits": 7}}}, "bits: 7"),
        ({"extra_config": {"lm_head": 16}}, "extra_config: expected an object of objects"),
        ({"extra_config": {"a": {"bits": 8}}, "packing_format": "auto_round:auto_awq"}, "extra_config.*auto_awq"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": config("auto_round:auto_gptq") | settings})
