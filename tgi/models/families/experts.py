"""Decoders whose feed-forward blocks are mixtures of experts."""

from tgi.core.errors import StartupError
from tgi.core.model_config import Experts, ModelShape, Qkv, Raw, Routing, Stack, architecture, flag, integer, number
from tgi.models.config import Family, GptConfig, keys_of
from tgi.models.families.gpt import LLAMA_NAMES
from tgi.models.families.llama import MULTIPLIERS, WINDOWS, granite, qwen2, qwen3, stated_window


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


def _granite_moe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    experts = Experts(
        block="block_sparse_moe",
        router="router.layer",
        stacks=(Stack("input_linear.weight", ("gate_proj", "up_proj")), Stack("output_linear.weight", ("down_proj",))),
        count=integer(raw, "num_local_experts", 8),
        intermediate=shape.intermediate,
        # The softmax of the chosen experts' products is theirs of all, made to sum up to 1.
        routing=Routing(per_token=integer(raw, "num_experts_per_tok", 2), norm=1.0),
        layers=(True,) * shape.layers,
    )
    return granite(raw, shape) | {"mlp_bias": False, "experts": experts}


def _phimoe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    if (per_token := integer(raw, "num_experts_per_tok", 2)) != 2:
        raise StartupError(f"config.json: num_experts_per_tok: {per_token} is not implemented for {architecture(raw)}")
    bias = flag(raw, "attention_bias", False)
    experts = Experts(
        block="block_sparse_moe",
        names=("w1", "w3", "w2"),
        count=integer(raw, "num_local_experts", 16),
        intermediate=shape.intermediate,
        routing=Routing(per_token=2, score="sparse_mixer", jitter=number(raw, "router_jitter_noise", 0.01)),
        layers=(True,) * shape.layers,
    )
    return {
        "names": LLAMA_NAMES,
        "qkv": Qkv(),
        "qkv_bias": bias,
        "o_bias": bias,
        "head_bias": flag(raw, "lm_head_bias", False),
        "windows": (integer(raw, "sliding_window", None),) * shape.layers,
        "experts": experts,
    }


_EXPERTS = keys_of("num_experts_per_tok output_router_logits router_aux_loss_coef router_jitter_noise")
_QWEN_EXPERTS = _EXPERTS | keys_of(
    """num_experts moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
    shared_expert_intermediate_size"""
)

_EXPERTS_ALIAS = {"num_local_experts": "num_experts"}

MIXTRAL = Family(_mixtral, _EXPERTS | {"sliding_window", "num_local_experts"})
QWEN2_MOE = Family(_qwen2_moe, WINDOWS | _QWEN_EXPERTS | {"qkv_bias"}, aliases=_EXPERTS_ALIAS)
QWEN3_MOE = Family(_qwen3_moe, WINDOWS | _QWEN_EXPERTS | {"attention_bias"}, aliases=_EXPERTS_ALIAS)
GRANITE_MOE = Family(
    _granite_moe, _EXPERTS | MULTIPLIERS | {"attention_bias", "num_local_experts"}, defaults={"rms_norm_eps": 1e-6}
)
PHIMOE = Family(
    _phimoe,
    _EXPERTS | keys_of("num_local_experts attention_bias lm_head_bias sliding_window input_jitter_noise"),
    GptConfig,
)
