"""More families: our logits are those of transformers, which also makes the checkpoints."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kernels.conftest import native
from tests.parity.conftest import (
    load,
    logits,
    pools,
    reference,
    reference_logits,
    same_in_a_batch,
    same_through_the_cache,
    tokens,
    write_reference,
)
from tests.parity.ranks import same_in_ranks
from tgi.attention.base import Precision
from tgi.core.errors import StartupError
from tgi.core.model_config import read_config
from tgi.runtime.forward import Recorded, choose
from tgi.runtime.kvcache import KVCache

_SIZES: dict[str, Any] = {
    "vocab_size": 431,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"vocab_size": 431, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_FALCON = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
_LAYERS = _SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_MOE = _SIZES | {
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
}
_LOCAL = _SIZES | {"num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3}
_PHIMOE = _LOCAL | {"num_experts_per_tok": 2, "router_jitter_noise": 0.3}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
    "short_mscale": 1.2,
    "long_mscale": 1.3,
}
_GLM = _SIZES | {
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
_LATENT = _SIZES | {
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.5}
_OPT = _FALCON | {"ffn_dim": 100, "word_embed_proj_dim": 64}
_BLOOM: dict[str, Any] = {"vocab_size": 431, "hidden_size": 64, "n_layer": 3, "n_head": 4}
_MPT: dict[str, Any] = {"vocab_size": 431, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gpt_neox", _SIZES),
    "neox-in-turn": ("gpt_neox", _SIZES | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "neox-tied": ("gpt_neox", _SIZES | {"tie_word_embeddings": True, "attention_bias": False}),
    "gptj": ("gptj", _GPT | {"rotary_dim": 8}),
    "gptj-whole": ("gptj", _GPT | {"rotary_dim": 16, "n_inner": 72}),
    "phi": ("phi", _SIZES),
    "phi-grouped": ("phi", _SIZES | {"num_key_value_heads": 2, "partial_rotary_factor": 0.25}),
    "falcon-7b": ("falcon", _FALCON),
    "falcon-40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "falcon",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 8},
    ),
    "falcon-alibi": ("falcon", _FALCON | {"alibi": True, "ffn_hidden_size": 96}),
    "gpt2": ("gpt2", _GPT),
    "bigcode": ("gpt_bigcode", _GPT),
    "bigcode-heads": ("gpt_bigcode", _GPT | {"multi_query": False, "n_inner": 72}),
    "opt": ("opt", _OPT),
    "opt-biasless": ("opt", _OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "bloom": ("bloom", _BLOOM),
    "bloom-6": ("bloom", _BLOOM | {"n_head": 6, "hidden_size": 96}),
    "mpt": ("mpt", _MPT),
    "mpt-6": ("mpt", _MPT | {"n_heads": 6, "d_model": 96}),
    "starcoder2": ("starcoder2", _SIZES | {"num_key_value_heads": 2}),
    "starcoder2-window": ("starcoder2", _SIZES | {"sliding_window": 9, "use_bias": False}),
    "mixtral": ("mixtral", _SIZES | {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 80}),
    "qwen3-moe": ("qwen3_moe", _MOE | {"norm_topk_prob": True, "head_dim": 24, "mlp_only_layers": [1]}),
    "granite-moe": ("granitemoe", _LOCAL | {"attention_multiplier": 0.3, "residual_multiplier": 0.4}),
    "olmoe": ("olmoe", _SIZES | {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3}),
    "glm4-moe": ("glm4_moe", _GLM | {"n_group": 2, "use_qk_norm": True, "head_dim": 24}),
    "glm4-moe-bias": ("glm4_moe", _GLM | {"attention_bias": True, "routed_scaling_factor": 2.0, "num_mtp_layers": 0}),
    "dbrx": (
        "dbrx",
        {"vocab_size": 431, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 3}},
    ),
    "phimoe": ("phimoe", _PHIMOE | {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 512}}),
    "phimoe-long": (
        "phimoe",
        # Where it chooses by length, transformers has one list of factors for all.
        _PHIMOE
        | {"attention_bias": True, "lm_head_bias": True}
        | {"rope_parameters": _LONGROPE | {"long_factor": _LONGROPE["short_factor"]}},
    ),
    "deepseek-v2": ("deepseek_v2", _LATENT),
    "deepseek-v2-grouped": (
        "deepseek_v2",
        _LATENT
        | {"q_lora_rank": 40, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 2.0, "rope_parameters": _YARN | {"rope_type": "yarn", "rope_theta": 1000.0}},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _LATENT | {"q_lora_rank": 40, "n_group": 4, "topk_group": 2, "attention_bias": True, "num_mtp_layers": 0},
    ),
    "deepseek-v3-plain": (
        "deepseek_v3",
        _LATENT
        | {"rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"tie_word_embeddings": True, "num_mtp_layers": 0},
    ),
    "stablelm": ("stablelm", _SIZES | {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm",
        _SIZES | {"num_key_value_heads": 4, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "cohere": ("cohere", _SIZES | {"num_key_value_heads": 2, "logit_scale": 0.7}),
    "cohere-qk-norm": ("cohere", _SIZES | {"num_key_value_heads": 2, "logit_scale": 0.7, "use_qk_norm": True}),
    "cohere2": ("cohere2", _LAYERS | {"sliding_window": 9, "logit_scale": 0.7, "sliding_window_pattern": 3}),
    "cohere2-untied": (
        "cohere2",
        _LAYERS
        | {"sliding_window": 9, "logit_scale": 1.0, "attention_bias": True, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "olmo": ("olmo", _SIZES | {"num_key_value_heads": 2}),
    "olmo-clipped": ("olmo", _SIZES | {"clip_qkv": 0.7, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", _LAYERS),
    "olmo2-tied": ("olmo2", _SIZES | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", _LAYERS | {"sliding_window": 9}),
    "olmo3-yarn": (
        "olmo3",
        _LAYERS
        | {"sliding_window": 9, "tie_word_embeddings": True}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
    ),
    "phi-qk-norm": ("phi", _SIZES | {"num_key_value_heads": 2, "qk_layernorm": True}),
    "stablelm-qk-norm": ("stablelm", _SIZES | {"num_key_value_heads": 2, "qk_layernorm": True}),
    "smollm3": ("smollm3", _LAYERS),
    "smollm3-window": (
        "smollm3",
        _LAYERS
        | {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 9}
        | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "arcee": ("arcee", _SIZES | {"num_key_value_heads": 2}),
    "arcee-biases": ("arcee", _SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "seed-oss": ("seed_oss", _LAYERS | {"head_dim": 24}),
    "seed-oss-biases": (
        "seed_oss",
        _LAYERS | {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "ernie": ("ernie4_5", _LAYERS | {"head_dim": 24}),
    "ernie-biases": ("ernie4_5", _LAYERS | {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "helium": ("helium", _LAYERS | {"head_dim": 16}),
    "helium-biases": (
        "helium",
        _LAYERS | {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "glm": ("glm", _LAYERS | {"head_dim": 24}),
    "glm4": ("glm4", _LAYERS | {"head_dim": 24}),
    "glm4-tied": ("glm4", _LAYERS | {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    "exaone4": ("exaone4", _LAYERS | {"sliding_window": 9}),
    "exaone4-tied": (
        "exaone4",
        _LAYERS | {"sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
    ),
    "nemotron": ("nemotron", _LAYERS | {"head_dim": 24}),
    "nemotron-biases": (
        "nemotron",
        _LAYERS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
    ),
    "opt-350m": ("opt", _OPT | {"word_embed_proj_dim": 48, "do_layer_norm_before": False}),
    "opt-350m-untied": (
        "opt",
        _OPT | {"word_embed_proj_dim": 96, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    ),
    "opt-plain-norms": ("opt", _OPT | {"layer_norm_elementwise_affine": False}),
    "mpt-clipped": ("mpt", _MPT | {"attn_config": {"clip_qkv": 0.7}}),
    "cohere-untied": ("cohere", _SIZES | {"tie_word_embeddings": False, "attention_bias": True, "logit_scale": 1.5}),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    family, config = request.param
    return write_reference(tmp_path_factory.mktemp(family), family, **config)


def theirs_of(folder: Path) -> torch.nn.Module:
    """Falcon's by SDPA: transformers' eager attention adds its ALiBi twice."""
    return reference(folder, "sdpa" if read_config(folder)["model_type"] == "falcon" else "eager")


@pytest.mark.usefixtures("kernels")
def test_two_sequences_in_one_batch(made: Path) -> None:
    same_in_a_batch(made, partial(reference_logits, theirs_of(made)))


@pytest.mark.usefixtures("kernels")
def test_through_the_cache_in_chunks(made: Path) -> None:
    same_through_the_cache(made, partial(reference_logits, theirs_of(made)))


@native
def test_a_step_is_one_program(made: Path) -> None:
    model, cpu = load(made), torch.device("cpu")
    cache = KVCache(model.specs, pools(model, 1), Precision(model.compute, torch.float32), cpu)
    assert isinstance(choose(model, cache, 16, cpu), Recorded)


@native
def test_ranks_compute_what_one_does(made: Path) -> None:
    same_in_ranks(made)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path, family: str) -> None:
    """Names lack their beginning; the masks that old exports hold are passed over."""
    folder = write_reference(tmp_path, *VARIANTS[family][:1], **VARIANTS[family][1])
    expected = logits(load(folder, max_total_tokens=64), tokens(20))
    path = folder / "model.safetensors"
    stored = {name.partition(".")[2]: tensor for name, tensor in load_file(path).items() if name != "lm_head.weight"}
    if family == "gpt2":
        stored["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        stored["h.0.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(stored, path)
    assert torch.equal(logits(load(folder, max_total_tokens=64), tokens(20)), expected)


def test_layers_for_multi_token_prediction_are_passed_over(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, *VARIANTS["deepseek-v3"][:1], **VARIANTS["deepseek-v3"][1])
    expected = logits(load(folder, max_total_tokens=64), tokens(20))
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}, path)
    with pytest.raises(StartupError, match=r"model.layers.3.eh_proj.weight is not used"):
        load(folder, max_total_tokens=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert torch.equal(logits(load(folder, max_total_tokens=64), tokens(20)), expected)
