"""Packed weights on disk: the same model from them, and only from what they were made of."""

import os
import time
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.kernels.library import library
from tgi.models.registry import Model, load_model

pytestmark = pytest.mark.skipif(library() is None, reason="only native kernels have packed weights")


@pytest.fixture(autouse=True)
def tiny_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.quantization.packed._WORTH", 0)


def load(folder: Path, packed: Path, quantize: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Model:
    weights = sorted(str(path) for path in folder.glob("*.safetensors"))
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=weights)
    return load_model(
        files, dtype, torch.device("cpu"), quantize=quantize, packed=packed, progress=lambda done, total: None
    )


def logits(model: Model) -> torch.Tensor:
    from tests.parity.conftest import logits

    return logits(model, torch.arange(3, 40))


def packs(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8", "bitsandbytes-nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen3-moe", "granite-moe"])
def test_the_second_start_maps_what_the_first_has_packed(tmp_path: Path, family: str, quantize: str | None) -> None:
    if family in VARIANTS:
        kind, config = VARIANTS[family]
        folder = write_reference(tmp_path / "model", kind, **config)
    else:
        folder = write_model(tmp_path / "model", family)
    first = logits(load(folder, tmp_path / "packed", quantize))
    (pack,) = packs(tmp_path / "packed")
    before = (pack / "panels.bin").stat().st_mtime_ns
    assert torch.equal(logits(load(folder, tmp_path / "packed", quantize)), first)
    assert (pack / "panels.bin").stat().st_mtime_ns == before
    assert packs(tmp_path / "packed") == [pack]


def test_other_content_or_another_way_is_another_pack(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    load(folder, tmp_path / "packed")
    load(folder, tmp_path / "packed", "int8")
    load(folder, tmp_path / "packed", dtype=torch.float32)
    assert len(packs(tmp_path / "packed")) == 3
    other = write_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    load(other, tmp_path / "packed")
    assert len(packs(tmp_path / "packed")) == 4


def test_a_broken_pack_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    load(folder, tmp_path / "packed")
    (pack,) = packs(tmp_path / "packed")
    (pack / "panels.bin").write_bytes(b"short")
    with pytest.raises((StartupError, OSError), match="truncated"):
        load(folder, tmp_path / "packed")


def test_what_can_not_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model", "llama")
    (tmp_path / "packed").write_text("a file is in the way")
    expected = logits(load(folder, tmp_path / "elsewhere"))
    assert torch.equal(logits(load(folder, tmp_path / "packed")), expected)
    assert "No packed weights are kept" in caplog.text


def test_what_nothing_used_for_a_month_goes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    load(folder, tmp_path / "packed")
    (old,) = packs(tmp_path / "packed")
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    load(folder, tmp_path / "packed", "int8")
    assert old not in packs(tmp_path / "packed")
