"""OLMo 1 to 3."""

from tgi.core.model_config import ModelShape, QkNorm, Qkv, Raw, flag, integer, number, read_rope
from tgi.models.config import Family, GptConfig, keys_of
from tgi.models.families.gpt import LLAMA_NAMES
from tgi.models.families.llama import NORMS_BEHIND, local_rope, patterned_windows


def _olmo(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {
        "names": LLAMA_NAMES,
        "qkv": Qkv(),
        "norm_weight": False,
        "norm_bias": False,
        "gated": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "clip_qkv": number(raw, "clip_qkv", None),
    }


def _olmo2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {"norms": NORMS_BEHIND, "qk_norm": QkNorm(weights="whole"), "qkv_bias": bias, "o_bias": bias}


def _olmo3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    integer(raw, "sliding_window")  # layers are told apart by it
    local = local_rope(raw, shape, read_rope(raw).theta)
    return _olmo2(raw, shape) | {"windows": patterned_windows(raw, shape, 4), "local_rope": local}


OLMO = Family(
    _olmo, keys_of("attention_bias clip_qkv"), GptConfig, eps="layer_norm_eps", defaults={"layer_norm_eps": 1e-5}
)
OLMO2 = Family(_olmo2, keys_of("attention_bias"))
OLMO3 = Family(
    _olmo3,
    keys_of("attention_bias sliding_window layer_types local_rope_parameters"),
    defaults={"sliding_window": 4096, "rope_theta": 500_000.0},
    local_rope=True,
)
