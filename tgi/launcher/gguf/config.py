"""GGUF metadata and tensor names → Hugging Face's config.json and names, one row per architecture."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tgi.core.errors import StartupError
from tgi.launcher.gguf.reader import GgufFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one ``general.architecture`` is spelled in Hugging Face's terms."""

    name: str
    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys beyond the common ones → config keys."""
    permuted: bool = False
    """q and k rows were reordered for rotary pairs that lie side by side; the engine turns them back."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer that are named otherwise than the common ones."""


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3"),
    "phi3": _Architecture(
        "Phi3ForCausalLM",
        "phi3",
        {"attention.sliding_window": "sliding_window"},
        tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "granite": _Architecture(
        "GraniteForCausalLM",
        "granite",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        permuted=True,
    ),
    # Its norms and names differ; the engine refuses it by its architecture's name before it reads a tensor.
    "gemma3": _Architecture("Gemma3ForCausalLM", "gemma3_text", {"attention.sliding_window": "sliding_window"}),
}

_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
_READ_ELSEWHERE = {
    "vocab_size",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
"""Read here, into the config."""


def convert_config(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and gguf_index.json: Hugging Face's tensor name → type, shape, offset, bytes, and, where q or k rows
    are permuted, the number of heads."""
    metadata = file.metadata
    prefix = metadata.get("general.architecture")
    row = _ARCHITECTURES.get(str(prefix))
    if row is None:
        known = ", ".join(_ARCHITECTURES)
        raise StartupError(f"general.architecture: {prefix!r} is not implemented; known: {known}")
    known_keys = {*_COMMON, *_OPTIONAL, *_READ_ELSEWHERE, *row.keys}
    for key, value in metadata.items():
        name = key.removeprefix(f"{prefix}.")
        if name == key or name in known_keys:
            continue
        if name.startswith(("rope.", "attention.")):
            raise StartupError(f"{key}: {value!r} is not implemented")
        log.warning("%s: %s is unknown and has no effect", file.path.name, key)

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{prefix}.{key}", default)

    def need(key: str) -> Any:
        if (value := get(key)) is None:
            raise StartupError(f"{prefix}.{key} is missing")
        return value

    if get("expert_count", 0) > 0:
        raise StartupError(f"{prefix}.expert_count: mixtures of experts are not implemented")
    config: dict[str, Any] = {"architectures": [row.name], "model_type": row.model_type}
    config |= {name: need(key) for key, name in _COMMON.items()}
    config |= {name: get(key) for key, name in (_OPTIONAL | dict(row.keys)).items() if get(key) is not None}
    for name, value in config.items():
        if isinstance(value, list) and name != "architectures":
            if len(set(value)) != 1:
                raise StartupError(f"{name}: sizes that differ by layer are not implemented")
            config[name] = value[0]
    if not config.get("sliding_window", 1):  # 0 stands for none
        del config["sliding_window"]
    head_dim = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if get("attention.value_length", head_dim) != head_dim:
        raise StartupError(f"{prefix}.attention.value_length: not implemented when it differs from the key length")
    if "token_embd.weight" not in file.tensors:
        raise StartupError("tensor token_embd.weight is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "blk.0.attn_q.bias" in file.tensors and prefix != "qwen2":  # whose biases go without saying
        config["attention_bias"] = True
    if "blk.0.ffn_up.bias" in file.tensors:
        config["mlp_bias"] = True
    config["rope_theta"] = get("rope.freq_base", 10_000.0)
    rotary = get("rope.dimension_count", head_dim)
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if scaling := _rope_scaling(file, get, config, rotary):
        config["rope_scaling"] = scaling
    return config, _index(file, row, config)


def _rope_scaling(file: GgufFile, get: Any, config: Mapping[str, Any], rotary: int) -> dict[str, Any] | None:
    short, long = file.floats("rope_factors_short.weight"), file.floats("rope_factors_long.weight")
    original = get("rope.scaling.original_context_length", config["max_position_embeddings"])
    attention = get("rope.scaling.attn_factor")
    if short is not None and long is not None:
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if attention is not None:
            scaling["attention_factor"] = attention
        return scaling | {"original_max_position_embeddings": original}
    if (factors := file.floats("rope_freqs.weight")) is not None:
        # Llama 3's rule, already worked out: one divisor per frequency at every length.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original,
        }
    match get("rope.scaling.type", "none"):
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": get("rope.scaling.factor", 1.0)}
        case "yarn":
            factor = get("rope.scaling.factor", 1.0)
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for name in ("beta_fast", "beta_slow"):
                if (value := get(f"rope.scaling.yarn_{name}")) is not None:
                    scaling[name] = value
            if attention is not None:
                scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
            return scaling
        case other:
            raise StartupError(f"rope.scaling.type: {other!r} is not implemented; known: none, linear, yarn, longrope")


def _index(file: GgufFile, row: _Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    layer_names = _LAYER | dict(row.tensors)
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads", heads["attn_q"])
    index: dict[str, Any] = {}
    for name, tensor in file.tensors.items():
        if name in _ROPE_TENSORS:
            continue
        entry = asdict(tensor)
        target = name
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part in layer_names:
                target = f"model.layers.{layer}.{layer_names[part]}.{kind}"
            if row.permuted and part in heads:
                entry["permuted_heads"] = heads[part]
        else:
            stem, _, kind = name.rpartition(".")
            if stem in _OUTER:
                target = f"{_OUTER[stem]}.{kind}"
        index[target] = entry
    return index
