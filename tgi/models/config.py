"""The one decoder of models/dense.py as data, and how each family's config.json becomes it. No torch.

Reading is strict. Every key is in one of three places: a family's rule reads it; NEUTRAL lists it, since it does not
change what inference computes; or PLAIN gives the values at which it changes nothing, and any other value is refused by
name. A key in none of them is unknown to us: it gets one warning.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, Raw, Rope, architecture, flag, integer, number, read_rope

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """A pre-norm decoder with rotary attention and a gated MLP."""

    shape: ModelShape
    rope: Rope
    eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before they are rotated."""
    packed: bool = False
    """The checkpoint holds qkv_proj and gate_up_proj instead of five matrices."""
    windows: tuple[int | None, ...]
    """Sliding window per layer."""
    attention_scale: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    """Divides the logits."""


def _check_rope(rope: Rope, shape: ModelShape) -> None:
    """That the embedding fits the heads."""
    size = int(shape.head_dim * rope.partial)
    if size % 2 or size < 4:
        raise StartupError(f"config.json: head_dim: {size} of {shape.head_dim} dimensions can't rotate in pairs")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.type == "longrope" and len(factors) != size // 2:
            raise StartupError(f"config.json: {name}: expected {size // 2} numbers, got {len(factors)}")


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BASE = _keys(
    """architectures model_type hidden_size num_attention_heads num_key_value_heads head_dim num_hidden_layers
    intermediate_size vocab_size max_position_embeddings tie_word_embeddings hidden_act rms_norm_eps rope_scaling
    rope_parameters rope_theta original_max_position_embeddings"""
)

NEUTRAL = _keys(
    """torch_dtype dtype transformers_version _name_or_path name_or_path auto_map use_cache initializer_range
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id tokenizer_class prefix task_specific_params problem_type id2label label2id num_labels
    finetuning_task return_dict output_hidden_states output_attentions output_scores return_dict_in_generate
    torchscript use_bfloat16 pruned_heads tf_legacy_loss keys_to_ignore_at_inference tie_encoder_decoder
    gradient_checkpointing tie_last_hidden_states
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attn_implementation use_flash_attn
    unsloth_version unsloth_fixed is_llama_config transformers.js_config chunk_size_feed_forward"""
)

PLAIN: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "max_window_layers": (),
    "layer_types": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "per_layer_config": (),
    "quantization_config": (),
    "compression_config": (),
    "medusa_num_heads": (),
}
"""Values beside null at which a key that a family does not read changes nothing."""


Rule = Callable[[Raw, ModelShape], dict[str, object]]
"""What a family adds to or changes in the plain decoder."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture's config.json is read."""

    rule: Rule
    keys: frozenset[str]
    """Keys that ``rule`` reads."""

    def read(self, raw: Raw, *, rope_scaling: str | None = None, rope_factor: float | None = None) -> DenseConfig:
        """StartupError names the key at fault."""
        if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise StartupError(f"config.json: hidden_act: {act!r} is not implemented; known: silu")
        for key in sorted(set(raw) - _BASE - NEUTRAL - self.keys):
            value = raw[key]
            if key not in PLAIN:
                log.warning("config.json: %s is unknown for %s and has no effect", key, architecture(raw))
            elif value is not None and value not in PLAIN[key]:
                raise StartupError(f"config.json: {key}: {value!r} is not implemented for {architecture(raw)}")
        shape = ModelShape.read(raw, rope_scaling=rope_scaling, rope_factor=rope_factor)
        rope = read_rope(raw, scaling=rope_scaling, factor=rope_factor)
        _check_rope(rope, shape)
        values: dict[str, object] = {
            "shape": shape,
            "rope": rope,
            "eps": number(raw, "rms_norm_eps"),
            "windows": (None,) * shape.layers,
            "attention_scale": shape.head_dim**-0.5,
        }
        return DenseConfig(**(values | self.rule(raw, shape)))  # type: ignore[arg-type]  # each rule names fields


def _llama(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": flag(raw, "mlp_bias", False)}


def _window(raw: Raw) -> int | None:
    """Mistral's and Qwen's configs mean 4096 where they leave the key out, and none where it is null."""
    window: int | None = integer(raw, "sliding_window", None)
    return window if "sliding_window" in raw else 4096


def _mistral(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {"windows": (_window(raw),) * shape.layers}


def _qwen2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {"qkv_bias": True, "windows": _layer_windows(raw, shape)}


def _qwen3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": _layer_windows(raw, shape)}


def _layer_windows(raw: Raw, shape: ModelShape) -> tuple[int | None, ...]:
    """Qwen's rule: ``layer_types`` if given, else a window from layer ``max_window_layers`` on; none at all unless
    ``use_sliding_window``."""
    window = _window(raw) if flag(raw, "use_sliding_window", False) else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        if type(first) is not int:
            raise StartupError(f"config.json: max_window_layers: expected an integer, got {first!r}")
        return tuple(window if layer >= first else None for layer in range(shape.layers))
    if not isinstance(types, list) or len(types) != shape.layers:
        raise StartupError(f"config.json: layer_types: expected a list of {shape.layers} names, got {types!r}")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise StartupError(f"config.json: layer_types: {name!r} is not implemented")
    return tuple(window if name == "sliding_attention" else None for name in types)


def _phi3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {"packed": True, "windows": (integer(raw, "sliding_window", None),) * shape.layers}


def _granite(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _llama(raw, shape) | {
        "attention_scale": number(raw, "attention_multiplier", 1.0),
        "embedding_multiplier": number(raw, "embedding_multiplier", 1.0),
        "residual_multiplier": number(raw, "residual_multiplier", 1.0),
        "logits_scaling": number(raw, "logits_scaling", 1.0),
    }


_BIASES = frozenset({"attention_bias", "mlp_bias"})
_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

LLAMA = Family(_llama, _BIASES)
MISTRAL = Family(_mistral, frozenset({"sliding_window"}))
QWEN2 = Family(_qwen2, _WINDOWS)
QWEN3 = Family(_qwen3, _WINDOWS | {"attention_bias"})
PHI3 = Family(_phi3, frozenset({"sliding_window", "partial_rotary_factor"}))
GRANITE = Family(
    _granite, _BIASES | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"}
)
