"""Gemma 1 to 3."""

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, Raw, architecture, integer, number, read_rope
from tgi.models.config import Family, GemmaConfig, keys_of
from tgi.models.families.llama import typed_windows


def _gemma(raw: Raw, shape: ModelShape) -> dict[str, object]:
    if (act := raw.get("hidden_activation")) not in (None, "gelu_pytorch_tanh"):
        raise StartupError(f"config.json: hidden_activation: {act!r} is not implemented for {architecture(raw)}")
    return {"norm_offset": 1.0, "embedding_multiplier": shape.hidden**0.5}


def _sandwiched(raw: Raw, shape: ModelShape, every: int) -> dict[str, object]:
    """Gemma 2 and 3. ``every``: of so many layers the last sees all, unless ``layer_types`` says otherwise."""
    window = integer(raw, "sliding_window", None)
    if raw.get("layer_types") is None:
        windows = tuple(window if (layer + 1) % every else None for layer in range(shape.layers))
    else:
        windows = typed_windows(raw, shape, window)
    return {
        "windows": windows,
        "attention_scale": number(raw, "query_pre_attn_scalar") ** -0.5,
        "logit_cap": number(raw, "final_logit_softcapping", 0.0),
    }


def _gemma2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    softcap = number(raw, "attn_logit_softcapping", None)
    return _sandwiched(raw, shape, 2) | {"local_rope": read_rope(raw), "qk_norm": False, "softcap": softcap}


def _gemma3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    """Layers with a window have a theta of their own; they are stretched only where ``rope_parameters`` says so."""
    local = {
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": number(raw, "rope_local_base_freq", 10_000.0),
        "rope_parameters": raw.get("local_rope_parameters"),
    }
    every = integer(raw, "sliding_window_pattern", integer(raw, "_sliding_window_pattern", 6))
    return _sandwiched(raw, shape, every) | {"local_rope": read_rope(local), "qk_norm": True, "softcap": None}


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
    GemmaConfig,
    "hidden_activation",
    defaults=_GEMMA2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
GEMMA3 = Family(
    _gemma3,
    _SANDWICHED
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern", "local_rope_parameters"},
    GemmaConfig,
    "hidden_activation",
    defaults=_GEMMA2_DEFAULTS | {"rope_theta": 1_000_000.0},
    local_rope=True,
)
