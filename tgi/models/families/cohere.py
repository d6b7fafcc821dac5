"""Cohere's Command models."""

from tgi.core.model_config import ModelShape, QkNorm, Qkv, Raw, flag, integer, number
from tgi.models.config import Family, GptConfig, keys_of
from tgi.models.families.gpt import LLAMA_NAMES
from tgi.models.families.llama import patterned_windows


def _cohere(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {
        "names": LLAMA_NAMES,
        "qkv": Qkv(pairs=shape.head_dim),
        "qk_norm": QkNorm(center=True, weights="heads") if flag(raw, "use_qk_norm", False) else None,
        "parallel": True,
        "two_norms": False,
        "norm_bias": False,
        "gated": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "logit_factor": number(raw, "logit_scale", 0.0625),
    }


def _cohere2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    windows = patterned_windows(raw, shape, integer(raw, "sliding_window_pattern", 4))
    return _cohere(raw, shape) | {"windows": windows, "rotated": tuple(window is not None for window in windows)}


COHERE = Family(
    _cohere,
    keys_of("attention_bias logit_scale use_qk_norm"),
    GptConfig,
    eps="layer_norm_eps",
    defaults={"tie_word_embeddings": True, "layer_norm_eps": 1e-5},
)
COHERE2 = Family(
    _cohere2,
    keys_of("attention_bias logit_scale sliding_window sliding_window_pattern layer_types"),
    GptConfig,
    eps="layer_norm_eps",
    defaults={"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "sliding_window": 4096},
)
