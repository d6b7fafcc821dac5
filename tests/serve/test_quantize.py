"""The demo model, quantized by the command: what is lost on a text that it didn't read meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import kl_div

from tests.parity.conftest import load, logits
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store
from tgi.models.registry import load_model

pytestmark = [pytest.mark.real, pytest.mark.long]

COMMAND = [sys.executable, "-c", "import sys; from tgi.cli import server as main; sys.exit(main())", "quantize"]
TEXT = Path(__file__).parents[2] / "benchmarks" / "text.txt"


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (["--groupsize", "32", "--samples", "16"], 0.25),
        (["--method", "awq", "--groupsize", "32", "--samples", "16"], 0.25),
        (["--method", "int8"], 0.02),
        (["--method", "fp8"], 0.05),
    ],
    ids=["gptq", "awq", "int8", "fp8"],
)
def test_divergence_from_the_model_as_it_was(tmp_path: Path, arguments: list[str], most: float) -> None:
    subprocess.run([*COMMAND, flags.DEFAULT_MODEL, str(tmp_path), *arguments], check=True)
    files = resolve_model(flags.DEFAULT_MODEL, None, store(flags.parse([], {})[0]))
    before = load_model(files, torch.float32, torch.device("cpu"), progress=lambda done, total: None)
    ids = torch.tensor(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT.read_text()).ids[:500])
    expected, found = (logits(model, ids).log_softmax(-1) for model in (before, load(tmp_path)))
    assert kl_div(found, expected, reduction="batchmean", log_target=True) < most
