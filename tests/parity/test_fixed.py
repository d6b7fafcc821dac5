"""What `--deterministic` changes is the order of sums, not what is summed; that rows don't know of each other is tested
with the kernels."""

from pathlib import Path

import pytest
import torch

from tests.parity.conftest import DEVICES, load, logits, tokens, write_reference
from tests.parity.test_more import VARIANTS


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["deepseek-v2", "qwen3-moe", "falcon-11b"])
def test_logits_are_the_same(tmp_path: Path, name: str, device: str) -> None:
    family, config = VARIANTS[name]
    folder = write_reference(tmp_path, family, **config)
    sequences = [tokens(length, seed).to(device) for seed, length in enumerate((30, 1, 11))]
    usual, fixed = (logits(load(folder, device, fixed=fixed), *sequences) for fixed in (False, True))
    assert (fixed - usual).abs().max() < 1e-5 * usual.abs().max()
    assert torch.isfinite(fixed).all()
