"""Gemma 1 to 3."""

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, QkNorm, Raw, architecture, integer, number
from tgi.models.config import Family, NormNames, keys_of
from tgi.models.families.llama import local_rope, patterned_windows


def _gemma(raw: Raw, shape: ModelShape) -> dict[str, object]:
    if (act := raw.get("hidden_activation")) not in (None, "gelu_pytorch_tanh"):
        raise StartupError(f"config.json: hidden_activation: {act!r} is not implemented for {architecture(raw)}")
    return {"norm_offset": 1.0, "embedding_multiplier": shape.hidden**0.5}


def _sandwiched(raw: Raw, shape: ModelShape, every: int) -> dict[str, object]:
    """Gemma 2 and 3. ``every``: as in patterned_windows."""
    return {
        "norm_offset": 1.0,
        "embedding_multiplier": shape.hidden**0.5,
        "norms": NormNames(
            behind_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            behind_mlp="post_feedforward_layernorm",
        ),
        "windows": patterned_windows(raw, shape, every),
        "attention_scale": number(raw, "query_pre_attn_scalar") ** -0.5,
        "logit_cap": number(raw, "final_logit_softcapping", 0.0),
    }


def _gemma2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _sandwiched(raw, shape, 2) | {"softcap": number(raw, "attn_logit_softcapping", None)}


def _gemma3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    every = integer(raw, "sliding_window_pattern", integer(raw, "_sliding_window_pattern", 6))
    local = local_rope(raw, shape, number(raw, "rope_local_base_freq", 10_000.0))
    return _sandwiched(raw, shape, every) | {"local_rope": local, "qk_norm": QkNorm()}


_SANDWICHED = keys_of("query_pre_attn_scalar sliding_window layer_types final_logit_softcapping hidden_act")
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# What "gelu" means there is its approximation.
GEMMA = Family(
    _gemma,
    frozenset({"hidden_activation"}),
    activations={"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    defaults=_GEMMA_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"},
)
GEMMA2 = Family(
    _gemma2,
    _SANDWICHED | {"attn_logit_softcapping"},
    activation="hidden_activation",
    defaults=_GEMMA2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
GEMMA3 = Family(
    _gemma3,
    _SANDWICHED
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern", "local_rope_parameters"},
    activation="hidden_activation",
    defaults=_GEMMA2_DEFAULTS | {"rope_theta": 1_000_000.0},
    local_rope=True,
)
