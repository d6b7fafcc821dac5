"""Quantized checkpoints of all formats: what their weights mean, whole and cut, and the models that they make."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import load, logits, reference, reference_logits, tokens
from tests.quantization.writers import FORMATS, write
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.model_config import read_config
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.quantization.quantized import Entry


@contextmanager
def entries(folder: Path) -> Iterator[dict[str, Entry]]:
    """What the model finds."""
    files = ModelFiles(
        model_id="tiny", folder=str(folder), weights=[str(path) for path in folder.glob("*.safetensors")]
    )
    with open_weights(files, check(read_config(str(folder))), lambda done, total: None) as weights:  # type: ignore[arg-type]
        yield dict(weights._left)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_was_written(tmp_path: Path, name: str) -> None:
    _, meant = write(tmp_path, FORMATS[name])
    close = "asymmetric" in name or name == "int8"  # a rounding more or less
    with entries(tmp_path) as found:
        assert set(found) == set(load_file(tmp_path / "plain" / "model.safetensors"))
        for key, values in meant.items():
            entry = found[key]
            assert entry.shape == values.shape
            for rows in (slice(None), slice(5, 12), slice(1, 20, 2)):
                torch.testing.assert_close(
                    entry.values[rows], values[rows], rtol=0, atol=1e-6 * float(values.abs().max()) if close else 0.0
                )
                if entry.stored is None:
                    assert "order" in name
                    continue
                stored = entry.stored[rows]
                assert not isinstance(stored, torch.Tensor)
                for columns in (slice(None), slice(0, 32), slice(32, 64), slice(8, 24)):
                    torch.testing.assert_close(
                        stored.columns(columns).dequantize(), entry.values[rows][:, columns], rtol=0, atol=0
                    )
