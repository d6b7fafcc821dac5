"""Llama and its kin."""

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, Raw, flag, integer, number
from tgi.models.config import Family


def _llama(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": flag(raw, "mlp_bias", False)}


def stated_window(raw: Raw) -> int | None:
    """Mistral's and Qwen's configs mean 4096 where they leave the key out, and none where it is null."""
    window: int | None = integer(raw, "sliding_window", None)
    return window if "sliding_window" in raw else 4096


def _mistral(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {"windows": (stated_window(raw),) * shape.layers}


def qwen2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {"qkv_bias": True, "windows": layer_windows(raw, shape)}


def qwen3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": layer_windows(raw, shape)}


def layer_windows(raw: Raw, shape: ModelShape) -> tuple[int | None, ...]:
    """Qwen's rule: ``layer_types`` if given, else a window from layer ``max_window_layers`` on; none at all unless
    ``use_sliding_window``."""
    window = stated_window(raw) if flag(raw, "use_sliding_window", False) else None
    if raw.get("layer_types") is None:
        first = raw.get("max_window_layers", 28)
        if type(first) is not int:
            raise StartupError(f"config.json: max_window_layers: expected an integer, got {first!r}")
        return tuple(window if layer >= first else None for layer in range(shape.layers))
    return typed_windows(raw, shape, window)


def typed_windows(raw: Raw, shape: ModelShape, window: int | None) -> tuple[int | None, ...]:
    """By ``layer_types``."""
    types = raw["layer_types"]
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
WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

LLAMA = Family(_llama, _BIASES)
MISTRAL = Family(_mistral, frozenset({"sliding_window"}))
QWEN2 = Family(qwen2, WINDOWS)
QWEN3 = Family(qwen3, WINDOWS | {"attention_bias"})
PHI3 = Family(_phi3, frozenset({"sliding_window", "partial_rotary_factor"}))
GRANITE = Family(
    _granite, _BIASES | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"}
)
