"""A new family is one file and one row of the registry."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from tests.models.made_up import MADE_UP
from tests.parity.conftest import Engine, tokens
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.messages import Sampling, Submit
from tgi.launcher.fit import fit
from tgi.launcher.flags import Options
from tgi.launcher.machine import Machine
from tgi.models.registry import ARCHITECTURES, Row, document

NAME = "MadeUpForCausalLM"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama's checkpoint, whose layers have a scale instead of norms."""
    monkeypatch.setitem(ARCHITECTURES, NAME, Row("tests.models.made_up", "MadeUpDecoder", MADE_UP, "made up"))
    write_model(tmp_path, "llama")
    (path,) = tmp_path.glob("*.safetensors")
    weights = {name: tensor for name, tensor in load_file(path).items() if "layernorm" not in name}
    layers = {name.split(".")[2] for name in weights if ".layers." in name}
    torch.manual_seed(1)
    save_file(weights | {f"model.layers.{index}.scale": torch.rand(64) for index in layers}, path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [NAME]}))
    return tmp_path


def expected(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of every token, by the definition."""
    (path,) = folder.glob("*.safetensors")
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = weights["model.embed_tokens.weight"][ids]
    half = config["hidden_size"] // heads // 2
    angles = torch.arange(len(ids))[:, None] * config["rope_theta"] ** (-torch.arange(half) / half)

    def turned(y: torch.Tensor) -> torch.Tensor:
        a, b = y.split(half, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    for index in range(config["num_hidden_layers"]):
        layer = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"model.layers.{index}.")}
        q, k, v = (
            (x @ layer[f"self_attn.{kind}_proj.weight"].T).view(len(ids), count, -1).transpose(0, 1)
            for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        out = scaled_dot_product_attention(turned(q)[None], turned(k)[None], v[None], is_causal=True, enable_gqa=True)
        x = x + layer["scale"] * (out[0].transpose(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T)
        gate, up = (x @ layer[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + layer["scale"] * ((silu(gate) * up) @ layer["mlp.down_proj.weight"].T)
    x = rms_norm(x, x.shape[-1:], weights["model.norm.weight"], config["rms_norm_eps"])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def test_a_new_family_is_one_file_and_one_row(folder: Path) -> None:
    """It is planned for, loaded and documented, and served in chunks, preempted, beside others."""
    files = ModelFiles(model_id="made-up", folder=str(folder), weights=[str(p) for p in folder.glob("*.safetensors")])
    assert fit(Options(), files, Machine("cpu", "cpu", 16 << 30, 8 << 30)).limits.max_total_tokens == 512
    assert f"| `{NAME}` | made up |" in document()
    engine = Engine(folder, blocks=8, step_tokens=24)
    prompts = [tokens(length, seed=length).tolist() for length in (20, 60)]
    engine.run(*(Submit(number, ids, len(ids), 30, [], Sampling(), 0.0) for number, ids in enumerate(prompts)))
    assert engine.preempted
    for number, prompt in enumerate(prompts):
        text = engine.text(number)
        logits = expected(folder, prompt + text)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == text
