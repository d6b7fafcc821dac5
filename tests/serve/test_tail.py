"""Whole servers of tiny models that have no row of ours."""

import json
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from tests import small_tokenizers
from tests.parity.conftest import reference, write_reference
from tests.serve.conftest import Server

SIZES = {
    "vocab_size": 431,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("family", "config", "by"),
    [
        ("jais2", {}, "paged attention"),
        ("granite_swa", {}, "paged attention"),
        (
            "llama4_text",
            {"head_dim": 16, "attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 4},
            "a cache of its own",
        ),
    ],
)
def test_greedy_text_is_the_references(tmp_path: Path, family: str, config: dict[str, int], by: str) -> None:
    folder = small_tokenizers.write(tmp_path / "model")
    write_reference(folder, family, **SIZES, **config)
    tokenizer, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), reference(folder)
    server = Server("--model-id", str(folder), "--device", "cpu", "--dtype", "float32", log=tmp_path / "log")
    try:
        server.wait_ready()
        for prompt in ("a cat sat on the mat", "a cat sat on the mat; the dog"):
            answer = server.generate(prompt, max_new_tokens=12, details=True)
            details = json.loads(json.dumps(answer["details"]))
            found = [token["id"] for token in details["tokens"]]
            ids = torch.tensor([tokenizer.encode(prompt).ids])
            with torch.inference_mode():
                for token in found:
                    assert int(theirs(input_ids=ids).logits[0, -1].argmax()) == token
                    ids = torch.cat((ids, torch.tensor([[token]])), 1)
        (line,) = (line for line in server.output.splitlines() if "has no row in" in line)
        assert by in line
        told = httpx.get(f"{server.url}/info").json()["implementation"]
        assert by in told["model"]
        assert bool(told["attention"]) == (by == "paged attention")
    finally:
        assert server.stop() == 0, server.output


def test_an_unknown_model_is_the_last_line(tmp_path: Path) -> None:
    folder = small_tokenizers.write(tmp_path / "model")
    write_reference(folder, "jais2", **SIZES)
    raw = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["OddForCausalLM"], "model_type": "odd"}))
    server = Server("--model-id", str(folder), "--device", "cpu", log=tmp_path / "log")
    assert server.process.wait(60) != 0
    last = server.output.splitlines()[-1]
    assert "OddForCausalLM" in last and "no causal language model of transformers" in last
