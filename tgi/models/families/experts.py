"""Decoders like Llama's whose feed-forward blocks are mixtures of experts."""

from tgi.core.errors import StartupError
from tgi.core.model_config import Experts, ModelShape, Raw, Routing, flag, integer
from tgi.models.config import Family, keys_of
from tgi.models.families.llama import WINDOWS, qwen2, qwen3, stated_window


def _mixtral(raw: Raw, shape: ModelShape) -> dict[str, object]:
    experts = Experts(
        block="block_sparse_moe",
        names=("w1", "w3", "w2"),
        count=integer(raw, "num_local_experts", 8),
        intermediate=shape.intermediate,
        routing=Routing(per_token=integer(raw, "num_experts_per_tok", 2), norm=1.0),
        layers=(True,) * shape.layers,
    )
    return {"windows": (integer(raw, "sliding_window", None),) * shape.layers, "experts": experts}


def _qwen_experts(raw: Raw, shape: ModelShape) -> Experts:
    only = raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise StartupError(f"config.json: mlp_only_layers: expected a list of numbers, got {only!r}")
    step = integer(raw, "decoder_sparse_step", 1)
    return Experts(
        block="mlp",
        count=integer(raw, "num_experts"),
        intermediate=integer(raw, "moe_intermediate_size"),
        routing=Routing(
            per_token=integer(raw, "num_experts_per_tok"), norm=1.0 if flag(raw, "norm_topk_prob", False) else 0.0
        ),
        shared_intermediate=integer(raw, "shared_expert_intermediate_size", 0),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        layers=tuple(layer not in only and (layer + 1) % step == 0 for layer in range(shape.layers)),
    )


def _qwen2_moe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return qwen2(raw, shape) | {"qkv_bias": flag(raw, "qkv_bias", True), "experts": _qwen_experts(raw, shape)}


def _qwen3_moe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    # Here a window is every layer's.
    window = stated_window(raw) if flag(raw, "use_sliding_window", False) else None
    return qwen3(raw, shape) | {"windows": (window,) * shape.layers, "experts": _qwen_experts(raw, shape)}


_EXPERTS = keys_of("num_experts_per_tok output_router_logits router_aux_loss_coef router_jitter_noise")
_QWEN_EXPERTS = _EXPERTS | keys_of(
    """num_experts moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
    shared_expert_intermediate_size"""
)

_EXPERTS_ALIAS = {"num_local_experts": "num_experts"}

MIXTRAL = Family(_mixtral, _EXPERTS | {"sliding_window", "num_local_experts"})
QWEN2_MOE = Family(_qwen2_moe, WINDOWS | _QWEN_EXPERTS | {"qkv_bias"}, aliases=_EXPERTS_ALIAS)
QWEN3_MOE = Family(_qwen3_moe, WINDOWS | _QWEN_EXPERTS | {"attention_bias"}, aliases=_EXPERTS_ALIAS)
