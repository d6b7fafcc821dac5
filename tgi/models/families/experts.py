"""Decoders whose feed-forward blocks are mixtures of experts."""

from tgi.core.errors import StartupError
from tgi.core.model_config import (
    Experts,
    ModelShape,
    QkNorm,
    Qkv,
    Raw,
    Routing,
    Stack,
    architecture,
    flag,
    integer,
    number,
)
from tgi.models.config import Family, GptConfig, Names, keys_of
from tgi.models.families.deepseek import EXPERTS_KEYS, V3_ALIASES, v3_experts
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
    return granite(raw, shape) | {"experts": experts}


def _phimoe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    if (per_token := integer(raw, "num_experts_per_tok", 2)) != 2:
        raise StartupError(f"config.json: num_experts_per_tok: {per_token} is not implemented for {architecture(raw)}")
    bias = flag(raw, "attention_bias", False)
    jitter = number(raw, "router_jitter_noise", 0.01, positive=False)
    experts = Experts(
        block="block_sparse_moe",
        names=("w1", "w3", "w2"),
        count=integer(raw, "num_local_experts", 16),
        intermediate=shape.intermediate,
        routing=Routing(per_token=2, score="sparse_mixer", jitter=jitter),
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


def _dbrx(raw: Raw, shape: ModelShape) -> dict[str, object]:
    experts = Experts(
        block="ffn",
        router="router.layer",
        stacks=(
            Stack("experts.mlp.w1", ("gate_proj",)),
            Stack("experts.mlp.v1", ("up_proj",)),
            Stack("experts.mlp.w2", ("down_proj",), transposed=True),
        ),
        count=integer(raw, "num_experts", 4),
        intermediate=shape.intermediate,
        routing=Routing(
            per_token=integer(raw, "num_experts_per_tok", 1),
            norm=number(raw, "moe_normalize_expert_weights", 0.0),
        ),
        layers=(True,) * shape.layers,
    )
    return {
        "names": Names(
            embed="transformer.wte",
            layer="transformer.blocks.{}",
            norm="norm_attn_norm.norm_1",
            attention="norm_attn_norm.attn",
            o="out_proj",
            mlp_norm="norm_attn_norm.norm_2",
            final_norm="transformer.norm_f",
        ),
        "qkv": Qkv(("Wqkv",)),
        "norm_bias": False,
        "clip_qkv": number(raw, "clip_qkv", None),
        "experts": experts,
    }


_DBRX_NAMES = {
    "kv_n_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "moe_num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
}


def _dbrx_sizes(raw: dict[str, object]) -> None:
    """Attention and experts have objects of their own; of what these repeat, the model's own counts."""
    inner = {"kv_n_heads": 1, "ffn_hidden_size": 3584, "moe_normalize_expert_weights": 1.0}
    for part in ("attn_config", "ffn_config"):
        if not isinstance(value := raw.pop(part, None) or {}, dict):
            raise StartupError(f"config.json: {part}: expected an object, got {value!r}")
        inner |= value
    act = inner.pop("ffn_act_fn", None) or {"name": "silu"}
    if not isinstance(act, dict) or act.keys() != {"name"}:
        raise StartupError(f"config.json: ffn_config: ffn_act_fn: {act!r} is not implemented")
    raw["hidden_act"] = act["name"]
    for key, value in inner.items():
        raw.setdefault(_DBRX_NAMES.get(key, key), value)


def _olmoe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    experts = Experts(
        block="mlp",
        count=integer(raw, "num_experts", 64),
        intermediate=shape.intermediate,
        routing=Routing(
            per_token=integer(raw, "num_experts_per_tok", 8), norm=1.0 if flag(raw, "norm_topk_prob", False) else 0.0
        ),
        layers=(True,) * shape.layers,
    )
    return {"qk_norm": QkNorm(weights="whole"), "qkv_bias": bias, "o_bias": bias, "experts": experts}


def _glm4_moe(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "qkv_bias": flag(raw, "attention_bias", False),
        "qk_norm": QkNorm() if flag(raw, "use_qk_norm", False) else None,
        "experts": v3_experts(raw, shape),
        "spare_layers": integer(raw, "num_nextn_predict_layers", 0, least=0),
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
DBRX = Family(
    _dbrx,
    keys_of(
        """num_experts num_experts_per_tok moe_normalize_expert_weights moe_jitter_eps moe_loss_weight clip_qkv
        emb_pdrop output_router_logits router_aux_loss_coef"""
    ),
    GptConfig,
    eps="layer_norm_epsilon",
    defaults={"layer_norm_epsilon": 1e-5},
    aliases={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
    },
    sizes=_dbrx_sizes,
)
OLMOE = Family(_olmoe, _EXPERTS | keys_of("num_experts norm_topk_prob attention_bias"), aliases=_EXPERTS_ALIAS)
GLM4_MOE = Family(
    _glm4_moe,
    EXPERTS_KEYS | keys_of("norm_topk_prob attention_bias use_qk_norm partial_rotary_factor"),
    defaults={"partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0},
    aliases=V3_ALIASES,
)
