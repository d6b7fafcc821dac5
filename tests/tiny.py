"""Tiny model folders of every family: random weights, a config of the family's own keys, a tokenizer that works.

Whole servers start on them in a second. Needs neither torch nor transformers.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests import small_tokenizers

EOS = 2

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 431,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float32",
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": None,
        "original_max_position_embeddings": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_bias": False,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 0.11,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.7,
    },
}

_GEMMA = {
    "head_dim": 24,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_FAMILIES |= {
    "gemma": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **_GEMMA, "hidden_act": "gelu"},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_GEMMA,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_GEMMA,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 300.0,
    },
}

FAMILIES = tuple(_FAMILIES)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def write_model(folder: Path, family: str, **overrides: Any) -> Path:
    """A model of ``family`` under ``folder``; ``overrides`` are config keys (None removes one). Returns the folder.

    The end token's row in the head is zero, so greedy decoding runs to its length.
    """
    config = {key: value for key, value in (_COMMON | _FAMILIES[family] | overrides).items() if value is not None}
    small_tokenizers.write(
        folder,
        config=config,
        generation_config={"eos_token_id": EOS},
        tokenizer_config={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": config["max_position_embeddings"],
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    save_file(tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of this config, by its name there. The same config gives the same values."""
    random = np.random.default_rng(0)
    family = config["model_type"]
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    o_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    found: dict[str, np.ndarray] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = random.normal(0, 1 / math.sqrt(columns), (rows, columns)).astype(np.float32)
        if bias:
            found[f"{name}.bias"] = random.normal(0, 0.3, rows).astype(np.float32)

    gemma = family.startswith("gemma")

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = random.normal(0 if gemma else 1, 0.2, size).astype(np.float32)

    linear("model.embed_tokens", vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        norm(f"{name}.input_layernorm", hidden)
        norm(f"{name}.post_attention_layernorm", hidden)
        if family in ("gemma2", "gemma3_text"):
            norm(f"{name}.pre_feedforward_layernorm", hidden)
            norm(f"{name}.post_feedforward_layernorm", hidden)
        if family == "phi3":
            linear(f"{name}.self_attn.qkv_proj", q + 2 * kv, hidden)
            linear(f"{name}.mlp.gate_up_proj", 2 * intermediate, hidden)
        else:
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{name}.self_attn.{part}_proj", rows, hidden, qkv_bias)
            for part in ("gate", "up"):
                linear(f"{name}.mlp.{part}_proj", intermediate, hidden, mlp_bias)
        if family in ("qwen3", "gemma3_text"):
            norm(f"{name}.self_attn.q_norm", head_dim)
            norm(f"{name}.self_attn.k_norm", head_dim)
        linear(f"{name}.self_attn.o_proj", hidden, q, o_bias)
        linear(f"{name}.mlp.down_proj", hidden, intermediate, mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", vocab, hidden)
    found["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"] *= 4
    found["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"][EOS] = 0
    return found
