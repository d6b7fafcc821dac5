"""Memory while a model is loaded: little more than its weights, in every format and however they are packed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_model
from tests.tiny_gguf import write_gguf

pytestmark = pytest.mark.long

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
"""A fifth of the weights is one matrix."""

SCRIPT = """
import gc, json, sys, threading, time, torch
from tgi.core.config import ModelFiles
from tgi.kernels.panels import Panels
from tgi.models import dense
from tgi.models.registry import load_model
import gguf

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

files = ModelFiles(**json.loads(sys.argv[1]))
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
quantize = json.loads(sys.argv[2])
model = load_model(files, torch.bfloat16, torch.device("cpu"), quantize=quantize, progress=lambda done, total: None)
done.set()
thread.join()
panels = {id(found): found for found in gc.get_objects() if type(found) is Panels}.values()
weights = sum(t.nbytes for p in panels for t in (p.weight, p.scale, p.min) if t is not None)
print(json.dumps([weights, peak - before]))
"""


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Format → folder and weights."""
    folder = write_model(tmp_path_factory.mktemp("large") / "model", "llama", **LARGE)
    from tgi.launcher.gguf import import_gguf

    quantized = write_gguf(folder, "Q8_0")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    return {
        "safetensors": (folder, folder / "model.safetensors"),
        "bin": (folder, folder / "pytorch_model.bin"),
        "gguf": (import_gguf(quantized, folder.parent), quantized),
    }


@pytest.mark.parametrize(
    ("form", "quantize"),
    [
        ("safetensors", None),
        ("safetensors", "int8"),
        ("safetensors", "int4"),
        ("bin", None),
        ("bin", "int8"),
        ("gguf", "stored"),
        ("gguf", None),
    ],
)
def test_the_peak_is_the_weights(formats: dict[str, tuple[Path, Path]], form: str, quantize: str | None) -> None:
    folder, path = formats[form]
    files = json.dumps({"model_id": "large", "folder": str(folder), "weights": [str(path)]})
    command = [sys.executable, "-c", SCRIPT, files, json.dumps(quantize)]
    weights, taken = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert weights > 50_000_000
    assert taken < 1.1 * weights, f"{taken / weights - 1:.1%} more than the weights"
