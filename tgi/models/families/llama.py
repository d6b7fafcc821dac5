"""Llama and its kin."""

from dataclasses import replace

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, QkNorm, Qkv, Raw, Rope, flag, integer, number, read_rope
from tgi.models.config import Family, NormNames, keys_of


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
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": QkNorm(), "windows": layer_windows(raw, shape)}


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


def patterned_windows(raw: Raw, shape: ModelShape, every: int) -> tuple[int | None, ...]:
    """Of ``every`` layers the last sees all, unless ``layer_types`` says otherwise."""
    window = integer(raw, "sliding_window", None)
    if raw.get("layer_types") is not None:
        return typed_windows(raw, shape, window)
    return tuple(window if (layer + 1) % every else None for layer in range(shape.layers))


def local_rope(raw: Raw, shape: ModelShape, theta: float) -> Rope:
    """Of layers with a window, for families that stretch these only where ``rope_parameters`` says so."""
    positions = shape.max_position_embeddings
    own = {"rope_parameters": raw.get("local_rope_parameters"), "rope_theta": theta}
    return read_rope(own | {"max_position_embeddings": positions})


def _phi3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    qkv = Qkv(("qkv_proj",))
    return {"qkv": qkv, "packed": True, "windows": (integer(raw, "sliding_window", None),) * shape.layers}


def granite(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _llama(raw, shape) | {
        "attention_scale": number(raw, "attention_multiplier", 1.0),
        "embedding_multiplier": number(raw, "embedding_multiplier", 1.0),
        "residual_multiplier": number(raw, "residual_multiplier", 1.0),
        "logits_scaling": number(raw, "logits_scaling", 1.0),
    }


def _smollm3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    every = integer(raw, "no_rope_layer_interval", 4)
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(shape.layers)]
    if not isinstance(rotated, list) or len(rotated) < shape.layers or not all(one in (0, 1) for one in rotated):
        raise StartupError(f"config.json: no_rope_layers: expected {shape.layers} numbers 0 or 1, got {rotated!r}")
    rotated = tuple(map(bool, rotated[: shape.layers]))
    window = integer(raw, "sliding_window", None) if flag(raw, "use_sliding_window", False) else None
    windows = tuple(None if turns else window for turns in rotated)
    if raw.get("layer_types") is not None:
        windows = typed_windows(raw, shape, window)
    return _llama(raw, shape) | {"rotated": rotated, "windows": windows}


def _arcee(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _llama(raw, shape) | {"gated": False}


def _seed_oss(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "qkv_bias": flag(raw, "attention_bias", True),
        "o_bias": flag(raw, "attention_out_bias", False),
        "mlp_bias": flag(raw, "mlp_bias", False),
    }


def _ernie(raw: Raw, shape: ModelShape) -> dict[str, object]:
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), flag(raw, "use_bias", False))
    return biases | {"qkv": Qkv(pairs=shape.head_dim)}


def _helium(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "qkv": Qkv(pairs=shape.head_dim),
        "qkv_bias": flag(raw, "attention_bias", False),
        "mlp_bias": flag(raw, "mlp_bias", False),
    }


def _glm(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "qkv": Qkv(pairs=int(shape.head_dim * read_rope(raw).partial)),
        "qkv_bias": flag(raw, "attention_bias", True),
        "packed": True,
    }


def _glm4(raw: Raw, shape: ModelShape) -> dict[str, object]:
    norms = NormNames(behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm")
    return _glm(raw, shape) | {"norms": norms}


NORMS_BEHIND = NormNames(
    before_attention="",
    behind_attention="post_attention_layernorm",
    before_mlp="",
    behind_mlp="post_feedforward_layernorm",
)


def _exaone4(raw: Raw, shape: ModelShape) -> dict[str, object]:
    """Where some layers have a window, the others don't rotate."""
    windows: tuple[int | None, ...] = (None,) * shape.layers
    rotated = (True,) * shape.layers
    if integer(raw, "sliding_window", None) is not None:
        # The pattern may be letters, which we don't read, beside layer_types.
        every = integer(raw, "sliding_window_pattern", 4) if raw.get("layer_types") is None else 1
        windows = patterned_windows(raw, shape, every)
        rotated = tuple(window is not None for window in windows)
    return {"norms": NORMS_BEHIND, "qk_norm": QkNorm(), "windows": windows, "rotated": rotated}


_BIASES = frozenset({"attention_bias", "mlp_bias"})
WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
MULTIPLIERS = keys_of("attention_multiplier embedding_multiplier residual_multiplier logits_scaling")

LLAMA = Family(_llama, _BIASES)
MISTRAL = Family(_mistral, frozenset({"sliding_window"}))
QWEN2 = Family(qwen2, WINDOWS)
QWEN3 = Family(qwen3, WINDOWS | {"attention_bias"})
PHI3 = Family(_phi3, frozenset({"sliding_window", "partial_rotary_factor"}))
GRANITE = Family(granite, _BIASES | MULTIPLIERS)
SMOLLM3 = Family(
    _smollm3,
    _BIASES | keys_of("no_rope_layers no_rope_layer_interval use_sliding_window sliding_window layer_types"),
    defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
)
ARCEE = Family(_arcee, _BIASES, defaults={"hidden_act": "relu2"})
SEED_OSS = Family(_seed_oss, _BIASES | keys_of("attention_out_bias residual_dropout"))
ERNIE = Family(_ernie, keys_of("use_bias"), defaults={"rope_theta": 500_000.0, "tie_word_embeddings": True})
HELIUM = Family(_helium, _BIASES, defaults={"rope_theta": 100_000.0})
GLM = Family(_glm, keys_of("attention_bias partial_rotary_factor"), defaults={"partial_rotary_factor": 0.5})
GLM4 = replace(GLM, rule=_glm4)
EXAONE4 = Family(_exaone4, keys_of("sliding_window sliding_window_pattern layer_types"))
