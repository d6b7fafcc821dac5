"""AWQ's checkpoints, written by AutoAWQ's layouts."""

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

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours each nibble of a word has, the lowest first."""


def interleaved(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] → words along the columns."""
    rows, columns = values.shape
    return stream(values.view(rows, columns // 8, 8)[:, :, ORDER].reshape(rows, columns).T, 4).T


def gemm(group: int) -> Pack:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inner = weight.shape[1]
        stored, zero, scale, values = rounded(weight, 4, torch.arange(inner) // (inner if group == -1 else group))
        return {"qweight": interleaved(stored.T), "qzeros": interleaved(zero.T), "scales": scale.T}, values

    return pack


def gemv(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Groups of 64, of which a row has multiples of 16: its kernel reads the zeros of so many at once."""
    inner = weight.shape[1]
    stored, zero, scale, values = rounded(weight, 4, torch.arange(inner) // 64)
    filled = -(-inner // 64 // 16) * 16 - inner // 64
    zero, scale = (torch.nn.functional.pad(part, (0, filled)) for part in (zero, scale))
    return {"qweight": stream(stored.T, 4).T, "qzeros": stream(zero.T, 4).T, "scales": scale}, values


def config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"} | more


@pytest.mark.parametrize("group", [32, 128, -1])
def test_gemm(tmp_path: Path, group: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384}
    same(write(tmp_path, gemm(group), config(group_size=group), "qwen2", **sizes))


def test_gemv(tmp_path: Path) -> None:
    same(write(tmp_path, gemv, config(version="gemv")))


def test_autoawq_s_own_file(tmp_path: Path) -> None:
    folder = write(tmp_path, gemm(64), {})
    settings = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(settings))
    same(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "bits: 3"),
        ({"version": "gemv_fast"}, "version: 'gemv_fast'.*gemm, gemv"),
        ({"version": "marlin"}, "version: 'marlin'"),
        ({"zero_point": False}, "zero_point: False"),
        ({"backend": "llm-awq"}, "backend: 'llm-awq'"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": config(**settings)})


NAME = "model.layers.1.mlp.up_proj"


def test_tensors_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, gemm(64), config())
    edit(folder, lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:1]}))
    with pytest.raises(StartupError, match=f"{NAME}.scales has shape .* awq with group_size 64 implies"):
        load(folder)
    edit(folder, lambda t: t.pop(f"{NAME}.scales"))
    with pytest.raises(StartupError, match=f"{NAME}.scales is missing"):
        load(folder)


def test_scales_of_an_activation_are_not_passed_over(tmp_path: Path) -> None:
    """AutoAWQ divides the activations of some families by numbers that have no module here."""
    folder = write(tmp_path, gemm(64), config())
    edit(folder, lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(192)}))
    with pytest.raises(StartupError, match=r"act\.scales is not used"):
        load(folder)
