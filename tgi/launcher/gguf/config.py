"""GGUF metadata and tensor names → Hugging Face's config.json and names, one row per architecture."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tgi.core.errors import StartupError
from tgi.launcher.gguf.reader import GgufFile, Section

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Names:
    """Hugging Face's names of tensors: GGUF's → theirs."""

    layers: str
    layer: Mapping[str, str]
    """Of those in a layer. {} stands for an expert's number: the file has all of them in one tensor."""
    outer: Mapping[str, str]

    def but(self, layers: str | None = None, outer: Mapping[str, str] | None = None, **layer: str) -> "_Names":
        """The same with others in place of some."""
        return _Names(layers or self.layers, {**self.layer, **layer}, {**self.outer, **(outer or {})})


_LLAMA = _Names(
    "model.layers",
    {
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
    },
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
)
_SANDWICHED = _LLAMA.but(
    post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    post_ffw_norm="post_feedforward_layernorm",
)
_BEHIND = _LLAMA.but(post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm")
_MIXTRAL = _LLAMA.but(
    ffn_gate_inp="block_sparse_moe.gate",
    ffn_gate_exps="block_sparse_moe.experts.{}.w1",
    ffn_up_exps="block_sparse_moe.experts.{}.w3",
    ffn_down_exps="block_sparse_moe.experts.{}.w2",
)
_QWEN_MOE = _LLAMA.but(
    ffn_gate_inp="mlp.gate",
    ffn_gate_exps="mlp.experts.{}.gate_proj",
    ffn_up_exps="mlp.experts.{}.up_proj",
    ffn_down_exps="mlp.experts.{}.down_proj",
    ffn_gate_inp_shexp="mlp.shared_expert_gate",
    ffn_gate_shexp="mlp.shared_expert.gate_proj",
    ffn_up_shexp="mlp.shared_expert.up_proj",
    ffn_down_shexp="mlp.shared_expert.down_proj",
)
_GPT2 = _Names(
    "transformer.h",
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
)
_MPT = _GPT2.but(
    "transformer.blocks",
    {"output_norm": "transformer.norm_f"},
    attn_norm="norm_1",
    attn_qkv="attn.Wqkv",
    attn_output="attn.out_proj",
    ffn_norm="norm_2",
    ffn_up="ffn.up_proj",
    ffn_down="ffn.down_proj",
)
_BLOOM = _Names(
    "transformer.h",
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    {
        "token_embd": "transformer.word_embeddings",
        "token_embd_norm": "transformer.word_embeddings_layernorm",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
)
_NEOX = _BLOOM.but(
    "gpt_neox.layers",
    {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
    attn_qkv="attention.query_key_value",
    attn_output="attention.dense",
)

_PAIRS = {"attn_q": "pairs", "attn_k": "pairs"}
"""Rows were reordered for rotary pairs that lie side by side."""
_GROUPS = {"attn_qkv": "groups"}
"""q lies above k above v; the checkpoint has the query heads of a kv head, then its key and its value."""
_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one ``general.architecture`` is spelled in Hugging Face's terms."""

    name: str
    model_type: str
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys of numbers beyond the common ones → config keys."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """The same for positive integers."""
    switches: tuple[str, ...] = ()
    """Metadata keys of booleans that the config has under the same name."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the first layer → config keys that say whether they are there."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """What the file leaves unsaid."""
    names: _Names = _LLAMA
    order: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose rows the engine puts in another order, and in which."""
    window: bool = False
    """There may be a sliding window."""
    norm_shift: float = 0.0
    """What the file's norms have beyond the checkpoint's; the engine takes it off."""
    variants: "Mapping[str, _Architecture]" = field(default_factory=dict)
    """Tensors of the first layer → what the file is instead, if it has them."""


_EPS = "attention.layer_norm_epsilon"
_BIASES = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}
_FALCON = _Architecture(
    "FalconForCausalLM",
    "falcon",
    {_EPS: "layer_norm_epsilon"},
    flags={"attn_qkv.bias": "bias"},
    constants={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    names=_BLOOM,
    order=_GROUPS,
)

_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(
        "LlamaForCausalLM",
        "llama",
        flags=_BIASES,
        order=_PAIRS,
        variants={
            "ffn_gate_inp.weight": _Architecture(
                "MixtralForCausalLM",
                "mixtral",
                sizes={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
                names=_MIXTRAL,
                order=_PAIRS,
            )
        },
    ),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": _Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        sizes=_EXPERTS
        | {"expert_count": "num_experts", "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        flags={"attn_q.bias": "qkv_bias"},
        constants={"norm_topk_prob": False},
        names=_QWEN_MOE,
    ),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", flags=_BIASES),
    "qwen3moe": _Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        sizes=_EXPERTS | {"expert_count": "num_experts"},
        flags={"attn_q.bias": "attention_bias"},
        constants={"norm_topk_prob": True},
        names=_QWEN_MOE,
    ),
    "phi2": _Architecture(
        "PhiForCausalLM",
        "phi",
        {_EPS: "layer_norm_eps"},
        names=_LLAMA.but(
            outer={"output_norm": "model.final_layernorm"},
            attn_output="self_attn.dense",
            ffn_up="mlp.fc1",
            ffn_down="mlp.fc2",
        ),
    ),
    "phi3": _Architecture(
        "Phi3ForCausalLM",
        "phi3",
        window=True,
        names=_LLAMA.but(attn_qkv="self_attn.qkv_proj", ffn_up="mlp.gate_up_proj"),
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
        flags=_BIASES,
        order=_PAIRS,
    ),
    "gemma": _Architecture("GemmaForCausalLM", "gemma", norm_shift=1.0),
    "gemma2": _Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        names=_SANDWICHED,
        window=True,
        norm_shift=1.0,
    ),
    "gemma3": _Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"final_logit_softcapping": "final_logit_softcapping"},
        names=_SANDWICHED,
        window=True,
        norm_shift=1.0,
    ),
    "olmo": _Architecture(
        "OlmoForCausalLM",
        "olmo",
        {_EPS: "layer_norm_eps", "attention.clamp_kqv": "clip_qkv"},
        order=_PAIRS,
    ),
    "olmo2": _Architecture("Olmo2ForCausalLM", "olmo2", names=_BEHIND),
    "command-r": _Architecture(
        "CohereForCausalLM",
        "cohere",
        {_EPS: "layer_norm_eps", "logit_scale": "logit_scale"},
        flags={"attn_q.bias": "attention_bias", "attn_q_norm.weight": "use_qk_norm"},
    ),
    "cohere2": _Architecture(
        "Cohere2ForCausalLM",
        "cohere2",
        {_EPS: "layer_norm_eps", "logit_scale": "logit_scale"},
        flags={"attn_q.bias": "attention_bias"},
        window=True,
    ),
    "stablelm": _Architecture(
        "StableLmForCausalLM",
        "stablelm",
        {_EPS: "layer_norm_eps"},
        flags={"attn_q.bias": "use_qkv_bias"},
        constants={"use_parallel_residual": True},
        variants={
            "ffn_norm.weight": _Architecture(
                "StableLmForCausalLM", "stablelm", {_EPS: "layer_norm_eps"}, flags={"attn_q.bias": "use_qkv_bias"}
            )
        },
    ),
    "starcoder2": _Architecture(
        "Starcoder2ForCausalLM",
        "starcoder2",
        {_EPS: "norm_epsilon"},
        flags={"attn_q.bias": "use_bias"},
        names=_LLAMA.but(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
    ),
    "nemotron": _Architecture("NemotronForCausalLM", "nemotron", {_EPS: "norm_eps"}, flags=_BIASES, norm_shift=1.0),
    "gptneox": _Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {_EPS: "layer_norm_eps"},
        switches=("use_parallel_residual",),
        flags={"attn_qkv.bias": "attention_bias"},
        names=_NEOX,
        order=_GROUPS,
    ),
    # In the file GPT-2's matrices aren't transposed, and so they are those of its relative.
    "gpt2": _Architecture(
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        {_EPS: "layer_norm_epsilon"},
        constants={"multi_query": False},
        names=_GPT2,
        order=_GROUPS,
    ),
    "starcoder": _Architecture("GPTBigCodeForCausalLM", "gpt_bigcode", {_EPS: "layer_norm_epsilon"}, names=_GPT2),
    "bloom": _Architecture("BloomForCausalLM", "bloom", {_EPS: "layer_norm_epsilon"}, names=_BLOOM, order=_GROUPS),
    "falcon": replace(
        _FALCON,
        variants={
            "attn_norm_2.weight": replace(
                _FALCON,
                constants={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
                names=_BLOOM.but(attn_norm="ln_mlp", attn_norm_2="ln_attn"),
            )
        },
    ),
    "mpt": _Architecture(
        "MptForCausalLM",
        "mpt",
        {
            _EPS: "layer_norm_epsilon",
            "attention.max_alibi_bias": "attn_config.alibi_bias_max",
            "attention.clamp_kqv": "attn_config.clip_qkv",
        },
        names=_MPT,
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
    "tensor_data_layout",
    "use_parallel_residual",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}

_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
"""Read here, into the config."""


def convert_config(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and gguf_index.json: Hugging Face's tensor name → type, shape, offset, bytes, and, where it is
    needed, ``order`` of its rows and ``shift`` of its numbers."""
    name = str(file.metadata.get("general.architecture"))
    row = _ARCHITECTURES.get(name)
    if row is None:
        raise StartupError(f"general.architecture: {name!r} is not implemented; known: {', '.join(_ARCHITECTURES)}")
    row = next((variant for tensor, variant in row.variants.items() if f"blk.0.{tensor}" in file.tensors), row)
    section = file.section(name)
    _refuse_unknown(file, section, row)
    config: dict[str, Any] = {"architectures": [row.name], "model_type": row.model_type, **row.constants}
    config |= {target: _size(section, key) for key, target in (*_SIZES.items(), *row.sizes.items())}
    config |= {target: _size(section, key) for key, target in _OPTIONAL_SIZES.items() if key in section.values}
    for key, target in {**_NUMBERS, **row.numbers}.items():
        if (number := section.get(key, float)) is not None:
            outer, _, inner = target.rpartition(".")
            (config.setdefault(outer, {}) if outer else config)[inner] = number
    config |= {key: f"blk.0.{tensor}" in file.tensors for tensor, key in row.flags.items()}
    if row.window and (window := section.get("attention.sliding_window", int)):
        config["sliding_window"] = window
    config |= {key: value for key in row.switches if (value := section.get(key, bool)) is not None}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "head_dim" not in config and hidden % heads:
        raise StartupError(f"{name}.attention.head_count: {heads} does not divide {name}.embedding_length {hidden}")
    head_dim = config.setdefault("head_dim", hidden // heads)
    if row.names is _SANDWICHED:
        # Files don't tell; of the largest models of both generations it is the share of the hidden size.
        largest = (config["model_type"], config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
        config["query_pre_attn_scalar"] = hidden // heads if largest else head_dim
    if section.get("attention.value_length", int) not in (None, head_dim):
        raise StartupError(f"{name}.attention.value_length: not implemented when it differs from the key length")
    if "token_embd.weight" not in file.tensors:
        raise StartupError("tensor token_embd.weight is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["partial_rotary_factor"] = (section.get("rope.dimension_count", int) or head_dim) / head_dim
    if scaling := _rope_scaling(file, section, config["max_position_embeddings"]):
        config["rope_scaling"] = scaling
    return config, _index(file, row, config)


def _refuse_unknown(file: GgufFile, section: Section, row: _Architecture) -> None:
    """What is unknown about rotary embedding, attention or experts would change the maths; other unknown keys are
    named."""
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *row.numbers, *row.sizes, *_READ_ELSEWHERE}
    if row.window:
        known.add("attention.sliding_window")
    for key in sorted(section.values.keys() - known):
        if key.startswith(("rope.", "attention.", "expert")) and section.values[key]:
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
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    orders = {"pairs": {"attn_q": heads, "attn_k": kv_heads}, "groups": {"attn_qkv": [heads, kv_heads]}}
    index: dict[str, Any] = {}
    for name, tensor in file.tensors.items():
        if name in _ROPE_TENSORS:
            continue
        entry = asdict(tensor)
        stem, _, kind = name.rpartition(".")
        target = row.names.outer.get(stem)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            layer, stem = match.groups()
            if stem in row.names.layer:
                target = f"{row.names.layers}.{layer}.{row.names.layer[stem]}"
            if order := row.order.get(stem):
                entry["order"] = [order, orders[order][stem]]
        if row.norm_shift and stem.endswith("norm") and kind == "weight":
            entry["shift"] = -row.norm_shift
        if stem == "ffn_gate_inp_shexp":
            entry["shape"] = (1, tensor.shape[-1])
        if target is None:
            index[name] = entry
        elif "{}" not in target:
            index[f"{target}.{kind}"] = entry
        else:
            count, *shape = tensor.shape
            for expert in range(count):
                place = {"offset": tensor.offset + expert * tensor.bytes // count, "bytes": tensor.bytes // count}
                index[f"{target.format(expert)}.{kind}"] = entry | place | {"shape": shape}
    return index
