"""DeepSeek 2 and 3, and others of their layout: latent attention, experts in groups."""

import math
from dataclasses import replace

from tgi.core.errors import StartupError
from tgi.core.model_config import Experts, Latent, ModelShape, Raw, Rope, Routing, flag, integer, number, read_rope
from tgi.models.config import Family, keys_of


def _deepseek(raw: Raw, shape: ModelShape, interleaved: bool) -> dict[str, object]:
    rank = integer(raw, "kv_lora_rank")
    latent = Latent(
        rank=rank,
        q_rank=integer(raw, "q_lora_rank", None),
        still=integer(raw, "qk_nope_head_dim"),
        turning=integer(raw, "qk_rope_head_dim"),
        value=integer(raw, "v_head_dim"),
        interleaved=interleaved,
        bias=flag(raw, "attention_bias", False),
    )
    scale = (latent.still + latent.turning) ** -0.5
    return {
        "shape": replace(shape, latent=rank),
        "latent": latent,
        "attention_scale": scale * _stretch(read_rope(raw)) ** 2,
        "spare_layers": integer(raw, "num_nextn_predict_layers", 0, least=0),
    }


def _stretch(rope: Rope) -> float:
    """What yarn makes of attention's scores, beside what it makes of cos and sin."""
    if rope.type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0


def _experts(raw: Raw, shape: ModelShape, routing: Routing) -> Experts | None:
    """Behind the first dense layers, if there are any experts."""
    count = integer(raw, "n_routed_experts", None)
    if count is None:
        return None
    dense = integer(raw, "first_k_dense_replace", 0, least=0)
    step = integer(raw, "moe_layer_freq", 1)
    wide = integer(raw, "moe_intermediate_size")
    return Experts(
        block="mlp",
        count=count,
        intermediate=wide,
        routing=routing,
        shared_intermediate=integer(raw, "n_shared_experts", 0, least=0) * wide,
        layers=tuple(layer >= dense and layer % step == 0 for layer in range(shape.layers)),
    )


def _v2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise StartupError(f"config.json: topk_method: {method!r} is not implemented")
    if raw.get("scoring_func", "softmax") != "softmax":
        raise StartupError(f"config.json: scoring_func: {raw['scoring_func']!r} is not implemented")
    grouped = method == "group_limited_greedy"
    routing = Routing(
        per_token=integer(raw, "num_experts_per_tok", 1),
        groups=integer(raw, "n_group", 1) if grouped else 1,
        groups_per_token=integer(raw, "topk_group", 1) if grouped else 1,
        factor=number(raw, "routed_scaling_factor", 1.0),
    )
    return _deepseek(raw, shape, True) | {
        "experts": _experts(raw, shape, routing),
        "mlp_bias": flag(raw, "mlp_bias", False),
    }


def v3_experts(raw: Raw, shape: ModelShape) -> Experts | None:
    """Chosen by their sigmoids and a bias, the groups first."""
    for key, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if raw.get(key, value) != value:
            raise StartupError(f"config.json: {key}: {raw[key]!r} is not implemented")
    routing = Routing(
        per_token=integer(raw, "num_experts_per_tok", 8),
        score="sigmoid",
        bias="gate.e_score_correction_bias",
        groups=integer(raw, "n_group", 1),
        groups_per_token=integer(raw, "topk_group", 1),
        group_best=2,
        norm=1.0 if flag(raw, "norm_topk_prob", True) else 0.0,
        factor=number(raw, "routed_scaling_factor", 2.5),
    )
    return _experts(raw, shape, routing)


def _v3(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _deepseek(raw, shape, flag(raw, "rope_interleave", True)) | {"experts": v3_experts(raw, shape)}


def _sizes(raw: dict[str, object]) -> None:
    """A token's one cached head is what turns and the latent vector."""
    raw["num_key_value_heads"] = 1
    raw["head_dim"] = integer(raw, "kv_lora_rank") + integer(raw, "qk_rope_head_dim")


EXPERTS_KEYS = keys_of(
    """num_nextn_predict_layers n_routed_experts n_shared_experts moe_intermediate_size moe_layer_freq
    first_k_dense_replace num_experts_per_tok n_group topk_group topk_method scoring_func
    routed_scaling_factor aux_loss_alpha seq_aux ep_size router_aux_loss_coef output_router_logits"""
)
_KEYS = EXPERTS_KEYS | keys_of(
    "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim attention_bias"
)
V3_ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}

DEEPSEEK_V2 = Family(
    _v2,
    _KEYS | {"mlp_bias"},
    defaults=_DEFAULTS,
    aliases={"num_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    sizes=_sizes,
)
DEEPSEEK_V3 = Family(
    _v3,
    _KEYS | {"rope_interleave", "norm_topk_prob"},
    defaults=_DEFAULTS | {"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
    aliases=V3_ALIASES,
    sizes=_sizes,
)
