"""Architectures that transformers hasn't, beside relatives that it has: the same weights under other names."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import (
    reference,
    reference_logits,
    same_in_a_batch,
    same_through_the_cache,
    write_reference,
)
from tgi.core.model_config import read_config

pytestmark = pytest.mark.usefixtures("kernels")

Tensors = dict[str, torch.Tensor]

_SIZES: dict[str, Any] = {
    "vocab_size": 431,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 512,
}


def rewrite(folder: Path, config: dict[str, Any], change: Callable[[Tensors], Tensors]) -> None:
    """Another architecture's config, and the tensors under its names."""
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """By regular expressions, the first that fits."""
    found = {}
    for name, tensor in tensors.items():
        pattern = next(pattern for pattern in names if re.fullmatch(pattern, name))
        found[re.sub(pattern, names[pattern], name)] = tensor
    return found


def packed(tensors: Tensors, name: str) -> Tensors:
    """q, k and v of each layer in one module."""
    rest = {key: tensor for key, tensor in tensors.items() if not re.search("[qkv]_proj", key)}
    for key in tensors:
        if "q_proj" in key:
            parts = [tensors[key.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            rest[key.replace("q_proj", name)] = torch.cat(parts)
    return rest


@pytest.mark.parametrize("kind", ["7b", "13b", "2-7b"])
def test_baichuan(tmp_path: Path, kind: str) -> None:
    """Beside Llama: where the 13B has ALiBi, all positions are 0 and the mask has the slopes; where Baichuan 2 has its
    own head, that head."""
    small = {"vocab_size": 125696, "hidden_size": 16, "num_attention_heads": 2} if kind == "2-7b" else {}
    sizes = _SIZES | small
    folder = write_reference(tmp_path, "llama", **sizes)
    model = reference(folder)
    if kind == "2-7b":
        model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight)

    @torch.inference_mode()
    def theirs(ids: torch.Tensor) -> torch.Tensor:
        if kind != "13b":
            return reference_logits(model, ids)
        place = torch.arange(len(ids))
        behind = (place[:, None] - place).float()
        slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None]
        mask = (-slopes * behind).masked_fill(behind < 0, float("-inf"))
        return model(ids[None], position_ids=torch.zeros_like(ids)[None], attention_mask=mask[None]).logits[0]

    config = read_config(folder) | {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    if kind == "13b":
        config["model_max_length"] = config.pop("max_position_embeddings")
    rewrite(folder, config, lambda tensors: packed(tensors, "W_pack"))
    same_in_a_batch(folder, theirs)
    same_through_the_cache(folder, theirs)


def test_santacoder(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, "gpt_bigcode", vocab_size=431, n_embd=64, n_layer=3, n_head=4, n_positions=512)
    theirs = partial(reference_logits, reference(folder))

    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            if "c_attn" in name:
                found[name.replace("c_attn", "q_attn")] = tensor[:64].t()
                found[name.replace("c_attn", "kv_attn")] = tensor[64:].t()
            else:
                found[name] = tensor.t() if re.search(r"c_(fc|proj)\.weight", name) else tensor
        return found

    config = read_config(folder) | {"architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2"}
    del config["multi_query"]
    rewrite(folder, config | {"attention_head_type": "multiquery", "activation_function": "gelu_fast"}, change)
    same_in_a_batch(folder, theirs)
    same_through_the_cache(folder, theirs)


@pytest.mark.parametrize("name", ["PhiForCausalLM", "MixFormerSequentialForCausalLM"])
def test_phi_under_its_first_names(tmp_path: Path, name: str) -> None:
    folder = write_reference(tmp_path, "phi", **_SIZES)
    theirs = partial(reference_logits, reference(folder))
    sequential = name != "PhiForCausalLM"
    layer, last = (r"layers.\1.", "layers.3.") if sequential else (r"transformer.h.\1.", "lm_head.")
    names = {
        r"model\.embed_tokens\.(.*)": r"layers.0.wte.\1" if sequential else r"transformer.embd.wte.\1",
        r"model\.layers\.(\d)\.input_layernorm\.(.*)": layer + r"ln.\2",
        r"model\.layers\.(\d)\.self_attn\.dense\.(.*)": layer + r"mixer.out_proj.\2",
        r"model\.layers\.(\d)\.self_attn\.Wqkv\.(.*)": layer + r"mixer.Wqkv.\2",
        r"model\.layers\.(\d)\.mlp\.(.*)": layer + r"mlp.\2",
        r"model\.final_layernorm\.(.*)": last + r"ln.\1",
        r"lm_head\.(.*)": last + r"linear.\1",
    }

    def change(tensors: Tensors) -> Tensors:
        found = packed(tensors, "Wqkv")
        if sequential:  # it counts layers from 1
            found = {re.sub(r"(?<=layers\.)\d", lambda m: str(int(m[0]) + 1), key): found[key] for key in found}
        return renamed(found, names)

    config = {
        "architectures": [name],
        "model_type": "mixformer-sequential" if sequential else "phi-msft",
        "vocab_size": 431,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_head_kv": None,
        "n_inner": 100,
        "n_positions": 512,
        "rotary_dim": 8,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    }
    rewrite(folder, config, change)
    same_in_a_batch(folder, theirs)
    same_through_the_cache(folder, theirs)
