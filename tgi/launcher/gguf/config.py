"""GGUF metadata and tensor names → Hugging Face's config.json and names, one row per architecture."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tgi.core.errors import StartupError
from tgi.launcher.gguf.reader import GgufFile, Section

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one ``general.architecture`` is spelled in Hugging Face's terms."""

    name: str
    model_type: str
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys of numbers beyond the common ones → config keys."""
    window: bool = False
    """All layers slide their window, if the file gives one."""
    permuted: bool = False
    """q and k rows were reordered for rotary pairs that lie side by side; the engine turns them back."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer that are named otherwise than the common ones."""
    norm_shift: float = 0.0
    """What the file's norms have beyond the checkpoint's; the engine takes it off."""


_SANDWICHED = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3"),
    "phi3": _Architecture(
        "Phi3ForCausalLM",
        "phi3",
        window=True,
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
    "gemma": _Architecture("GemmaForCausalLM", "gemma", norm_shift=1.0),
    "gemma2": _Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        window=True,
        tensors=_SANDWICHED,
        norm_shift=1.0,
    ),
    "gemma3": _Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"final_logit_softcapping": "final_logit_softcapping"},
        window=True,
        tensors=_SANDWICHED,
        norm_shift=1.0,
    ),
}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL_SIZES = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
_READ_ELSEWHERE = {
    "vocab_size",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
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
    name = file.metadata.get("general.architecture")
    row = _ARCHITECTURES.get(str(name))
    if row is None:
        raise StartupError(f"general.architecture: {name!r} is not implemented; known: {', '.join(_ARCHITECTURES)}")
    section = file.section(str(name))
    _refuse_unknown(file, section, row)
    config: dict[str, Any] = {"architectures": [row.name], "model_type": row.model_type}
    config |= {target: _size(section, key) for key, target in _SIZES.items()}
    config |= {target: _size(section, key) for key, target in _OPTIONAL_SIZES.items() if key in section.values}
    for key, target in {**_NUMBERS, **row.numbers}.items():
        if (number := section.get(key, float)) is not None:
            config[target] = number
    if row.window and (window := section.get("attention.sliding_window", int)):
        config["sliding_window"] = window
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "head_dim" not in config and hidden % heads:
        raise StartupError(f"{name}.attention.head_count: {heads} does not divide {name}.embedding_length {hidden}")
    head_dim = config.setdefault("head_dim", hidden // heads)
    if row.tensors is _SANDWICHED:
        # Files don't tell; of the largest models of both generations it is the share of the hidden size.
        largest = (config["model_type"], config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
        config["query_pre_attn_scalar"] = hidden // heads if largest else head_dim
    if section.get("attention.value_length", int) not in (None, head_dim):
        raise StartupError(f"{name}.attention.value_length: not implemented when it differs from the key length")
    if "token_embd.weight" not in file.tensors:
        raise StartupError("tensor token_embd.weight is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "blk.0.attn_q.bias" in file.tensors and name != "qwen2":  # whose biases go without saying
        config["attention_bias"] = True
    if "blk.0.ffn_up.bias" in file.tensors:
        config["mlp_bias"] = True
    if (rotary := section.get("rope.dimension_count", int) or head_dim) != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if scaling := _rope_scaling(file, section, config["max_position_embeddings"]):
        config["rope_scaling"] = scaling
    return config, _index(file, row, config)


def _refuse_unknown(file: GgufFile, section: Section, row: _Architecture) -> None:
    """What is unknown about rotary embedding or attention would change the maths; other unknown keys are named."""
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *row.numbers, *_READ_ELSEWHERE}
    if row.window:
        known.add("attention.sliding_window")
    if section.get("expert_count", int):
        raise StartupError(f"{section.prefix}.expert_count: mixtures of experts are not implemented")
    for key in sorted(section.values.keys() - known):
        if key.startswith(("rope.", "attention.")):
            raise StartupError(f"{section.prefix}.{key}: {section.values[key]!r} is not implemented")
        log.warning("%s: %s.%s is unknown and has no effect", file.path.name, section.prefix, key)


def _size(section: Section, key: str) -> int:
    """A positive number; files may give one per layer, all alike."""
    value = section.values.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if type(value) is not int or value < 1:
        raise StartupError(f"{section.prefix}.{key}: expected one positive number for all layers, got {value!r}")
    return value


def _rope_scaling(file: GgufFile, section: Section, positions: int) -> dict[str, Any] | None:
    short, long = file.floats("rope_factors_short.weight"), file.floats("rope_factors_long.weight")
    attention = section.get("rope.scaling.attn_factor", float)
    trained = {
        "original_max_position_embeddings": section.get("rope.scaling.original_context_length", int) or positions
    }
    if short is not None and long is not None:
        scale = {} if attention is None else {"attention_factor": attention}
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **scale, **trained}
    if (factors := file.floats("rope_freqs.weight")) is not None:
        # Llama 3's rule, already worked out: one divisor per frequency at every length.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": attention or 1.0,
            **trained,
        }
    kind = section.get("rope.scaling.type", str) or "none"
    if kind == "yarn":
        factor = section.need("rope.scaling.factor", float)
        scaling = {"rope_type": "yarn", "factor": factor, **trained}
        for name in ("beta_fast", "beta_slow"):
            if (value := section.get(f"rope.scaling.yarn_{name}", float)) is not None:
                scaling[name] = value
        if attention is not None:
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        return scaling
    if attention not in (None, 1.0):
        raise StartupError(f"{section.prefix}.rope.scaling.attn_factor: {attention} is not implemented for {kind!r}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": section.need("rope.scaling.factor", float)}
    if kind != "none":
        raise StartupError(
            f"{section.prefix}.rope.scaling.type: {kind!r} is not implemented; known: none, linear, yarn"
        )
    return None


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
            if row.norm_shift and part.endswith("norm"):
                entry["shift"] = -row.norm_shift
        else:
            stem, _, kind = name.rpartition(".")
            if stem in _OUTER:
                target = f"{_OUTER[stem]}.{kind}"
            if row.norm_shift and stem == "output_norm":
                entry["shift"] = -row.norm_shift
        index[target] = entry
    return index
