"""Each dataflow of tgi/models as data, and how a config.json is read into it. No torch.

Reading is strict. Every key is in one of three places: a family's rule reads it; NEUTRAL lists it, since it does not
change what inference computes; or PLAIN gives the values at which it changes nothing, and any other value is refused by
name. A key in none of them is unknown to us: it gets one warning.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tgi.core.errors import StartupError
from tgi.core.model_config import (
    Activation,
    Experts,
    Latent,
    ModelShape,
    QkNorm,
    Qkv,
    Raw,
    Rope,
    architecture,
    number,
    read_rope,
)
from tgi.quantization.formats.base import Scheme
from tgi.quantization.scheme import read_scheme

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What all have."""

    shape: ModelShape
    rope: Rope
    eps: float
    activation: Activation
    windows: tuple[int | None, ...]
    """Sliding window per layer."""
    local_rope: Rope | None = None
    """Of layers with a window, if it is another."""
    rotated: tuple[bool, ...]
    """Which layers rotate q and k, if there is no ALiBi."""
    slopes: tuple[float, ...] | None = None
    """ALiBi instead of rotary embedding."""
    attention_scale: float
    softcap: float | None = None
    """Of attention's scores."""
    clip_qkv: float | None = None
    """The most that q, k and v may be."""
    qk_norm: QkNorm | None = None
    unit_head: bool = False
    """Each row of the head is brought to length 1."""
    experts: Experts | None = None
    scheme: Scheme | None = None
    """How the weights are quantized, if they are."""
    spare_layers: int = 0
    """Behind the last, for other purposes than the next token: multi-token prediction."""

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Of each layer."""
        if self.slopes is not None:
            return (None,) * self.shape.layers
        local = self.local_rope or self.rope
        return tuple(
            (self.rope if window is None else local) if rotated else None
            for window, rotated in zip(self.windows, self.rotated, strict=True)
        )

    @property
    def spare(self) -> tuple[str, ...]:
        """How the names of tensors begin that aren't used."""
        return tuple(f"{self.prefix}layers.{self.shape.layers + layer}." for layer in range(self.spare_layers))

    @property
    def prefix(self) -> str:
        """Of all tensors but the head's. Some checkpoints leave it away."""
        return "model."

    def used(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Those of a checkpoint's tensors that are used, by names with the prefix."""
        if not any(name.startswith(self.prefix) for name in tensors):
            head = f"{self.head_name}.weight"
            tensors = {name if name == head else self.prefix + name: tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.spare)}

    @property
    def embed_name(self) -> str:
        return "model.embed_tokens"

    @property
    def head_name(self) -> str:
        return "lm_head"

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint holds the matrices of layers as [in, out]."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Names of a layer's norms; empty: there is none."""

    before_attention: str = "input_layernorm"
    behind_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig(DecoderConfig):
    """models/dense.py: RMSNorms, attention and MLP one behind the other."""

    norms: NormNames = NormNames()
    qkv: Qkv = Qkv()  # noqa: RUF009  # frozen
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    packed: bool = False
    """The checkpoint holds gate_up_proj instead of two matrices."""
    gated: bool = True
    latent: Latent | None = None
    norm_offset: float = 0.0
    """What the checkpoint leaves away from the weights of norms."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Of what attention and MLP add, unless a norm is behind them."""
    logits_scaling: float = 1.0
    """Divides the logits."""
    logit_cap: float = 0.0
    """Of the logits; 0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """A checkpoint's modules; those of a layer are named from the layer on."""

    embed: str
    positions: str = ""
    """Of learned embeddings of positions, if there are any."""
    embed_norm: str = ""
    layer: str
    """With {} for the layer's number, or {1} where the first is 1."""
    norm: str
    attention: str
    o: str
    """Within the module of attention."""
    mlp_norm: str = ""
    up: str = ""
    down: str = ""
    final_norm: str = ""
    head: str = "lm_head"
    project_in: str = ""
    project_out: str = ""
    """Between embedding, head and layers, where these are of another width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptConfig(DecoderConfig):
    """models/gpt.py: LayerNorms, attention and MLP one behind the other or side by side."""

    names: Names
    qkv: Qkv
    parallel: bool = False
    """Attention and MLP are side by side."""
    two_norms: bool = True
    """Attention and MLP have one each."""
    norms_behind: bool = False
    """They are taken of the residual stream behind attention and MLP, not before."""
    norm_weight: bool = True
    norm_bias: bool = True
    norm_offset: float = 0.0
    """What the checkpoint leaves away from the weights of norms."""
    gated: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    embedding: int | None = None
    """Width of the vocabulary's matrices, if it is another than that of the layers."""
    first_position: int = 0
    """Row of the learned embedding that position 0 has."""
    logit_factor: float = 1.0

    @property
    def prefix(self) -> str:
        return self.names.layer.partition(".")[0] + "."

    @property
    def embed_name(self) -> str:
        return self.names.embed

    @property
    def head_name(self) -> str:
        return self.names.head

    @property
    def transposed(self) -> bool:
        return self.qkv.transposed


@dataclass(frozen=True, slots=True)
class TailConfig:
    """models/hf.py: what can be said of a model that only transformers knows."""

    shape: ModelShape
    """``tied`` and ``intermediate`` as the config states them, or a guess."""
    model_type: str
    remote: bool
    """The config names code in the model's repository."""

    experts = None
    """None that a step is planned for: how they are computed is transformers' affair."""
    scheme = None
    qk_norm = None

    @property
    def windows(self) -> tuple[None, ...]:
        """Whatever windows its layers turn out to have, pages are planned as if they had none."""
        return (None,) * self.shape.layers


def _check_rope(rope: Rope, shape: ModelShape) -> None:
    """That the embedding fits the heads."""
    size = int(shape.head_dim * rope.partial)
    if size % 2 or size < 4:
        raise StartupError(f"config.json: head_dim: {size} of {shape.head_dim} dimensions can't rotate in pairs")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.type == "longrope" and len(factors) != size // 2:
            raise StartupError(f"config.json: {name}: expected {size // 2} numbers, got {len(factors)}")


def _check_experts(experts: Experts) -> None:
    """That there are as many as are asked for."""
    routing = experts.routing
    size, rest = divmod(experts.count, routing.groups)
    if rest or routing.group_best > size:
        raise StartupError(f"config.json: n_group: {experts.count} experts are not {routing.groups} groups")
    if routing.groups_per_token > routing.groups:
        raise StartupError(f"config.json: topk_group: {routing.groups_per_token} of {routing.groups} groups")
    if routing.per_token > (left := size * routing.groups_per_token):
        raise StartupError(f"config.json: num_experts_per_tok: {routing.per_token} of {left} experts")


def keys_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BASE = keys_of(
    """architectures model_type hidden_size num_attention_heads num_key_value_heads head_dim num_hidden_layers
    intermediate_size vocab_size max_position_embeddings tie_word_embeddings rope_scaling
    rope_parameters rope_theta original_max_position_embeddings quantization_config compression_config"""
)

NEUTRAL = keys_of(
    """torch_dtype dtype transformers_version _name_or_path name_or_path auto_map use_cache initializer_range
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id tokenizer_class prefix task_specific_params problem_type id2label label2id num_labels
    finetuning_task return_dict output_hidden_states output_attentions output_scores return_dict_in_generate
    torchscript use_bfloat16 pruned_heads tf_legacy_loss keys_to_ignore_at_inference tie_encoder_decoder
    gradient_checkpointing tie_last_hidden_states cache_implementation
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attn_implementation use_flash_attn
    full_attn_mod interpolate_factor sliding_window_size model_max_length
    unsloth_version unsloth_fixed is_llama_config transformers.js_config chunk_size_feed_forward"""
)

PLAIN: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "max_window_layers": (),
    "layer_types": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "apply_residual_connection_post_layernorm": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "layer_norm_elementwise_affine": (True,),
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False,),
    "scale_attn_weights": (True,),
    "rotary": (True,),
    "no_bias": (True,),
    "norm_type": ("layer_norm", "layernorm", "low_precision_layernorm"),
    "mlp_type": ("default",),
    "no_rope_layers": (),
    "learned_embeddings": (True,),
    "scale_embeddings": (False,),
    "lm_head_bias": (False,),
    "norm_topk_prob": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "per_layer_config": (),
    "medusa_num_heads": (),
}
"""Values beside null at which a key that a family does not read changes nothing."""


Rule = Callable[[Raw, ModelShape], dict[str, object]]
"""What a family adds to or changes in the plain decoder."""


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture's config.json is read."""

    rule: Rule
    keys: frozenset[str]
    """Keys that ``rule`` reads."""
    config: type[DecoderConfig] = DenseConfig
    activation: str = "hidden_act"
    """The key that has it."""
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    defaults: Raw = field(default_factory=dict)
    """Of keys that the file leaves away, where they aren't the usual ones."""
    local_rope: bool = False
    """``rope_parameters`` may hold an object for each type of layer."""
    eps: str = "rms_norm_eps"
    """The key that has it."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Its own names of keys → the usual ones."""
    sizes: Callable[[dict[str, object]], None] = lambda raw: None
    """Adds keys that follow from others."""

    def read(self, raw: Raw, *, rope_scaling: str | None = None, rope_factor: float | None = None) -> DecoderConfig:
        """StartupError names the key at fault."""
        raw = {**self.defaults, **{self.aliases.get(key, key): value for key, value in raw.items()}}
        self.sizes(raw)
        if self.local_rope and isinstance(each := raw.get("rope_parameters"), dict) and "full_attention" in each:
            raw |= {"rope_parameters": each["full_attention"], "local_rope_parameters": each.get("sliding_attention")}
        activation = raw.get(self.activation, "silu")
        if activation not in self.activations:
            known = ", ".join(self.activations)
            raise StartupError(f"config.json: {self.activation}: {activation!r} is not implemented; known: {known}")
        for key in sorted(set(raw) - _BASE - NEUTRAL - self.keys - {self.activation, self.eps}):
            value = raw[key]
            if key not in PLAIN:
                log.warning("config.json: %s is unknown for %s and has no effect", key, architecture(raw))
            elif value is not None and value not in PLAIN[key]:
                raise StartupError(f"config.json: {key}: {value!r} is not implemented for {architecture(raw)}")
        shape = ModelShape.read(raw, rope_scaling=rope_scaling, rope_factor=rope_factor)
        rope = read_rope(raw, scaling=rope_scaling, factor=rope_factor)
        _check_rope(rope, shape)
        values: dict[str, object] = {
            "shape": shape,
            "rope": rope,
            "eps": number(raw, self.eps),
            "activation": self.activations[activation],
            "windows": (None,) * shape.layers,
            "rotated": (True,) * shape.layers,
            "attention_scale": shape.head_dim**-0.5,
            "scheme": read_scheme(raw),
        }
        config = self.config(**(values | self.rule(raw, shape)))  # type: ignore[arg-type]  # each rule names fields
        if config.experts is not None:
            _check_experts(config.experts)
        return config
