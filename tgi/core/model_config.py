"""What a Hugging Face config.json says about a decoder's sizes and its rotary embedding, read strictly. No torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tgi.core.errors import StartupError

Raw = Mapping[str, Any]
"""A parsed config.json."""

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
"""Of a feed-forward block."""


@dataclass(frozen=True, slots=True)
class Qkv:
    """How a checkpoint holds the projections of attention."""

    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Of the modules: three, one for q and one for both others, or one for all."""
    order: Literal["stacked", "groups"] = "stacked"
    """Of a module's rows. ``stacked``: q above k above v; ``groups``: the query heads of a kv head, then its key and
    its value."""
    pairs: int = 0
    """Dimensions of a head that turn against their neighbour. They are taken so that they lie half as many apart."""
    transposed: bool = False
    """Weights are stored as [in, out]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QkNorm:
    """A norm of q and one of k, before they are rotated."""

    center: bool = False
    """LayerNorm instead of RMSNorm."""
    weights: Literal["shared", "heads", "modules", "whole"] = "shared"
    """``shared``: each head is normed, all with one weight; ``heads``: with its own, in one tensor; ``modules``: with
    its own, in a module for each; ``whole``: all heads are normed as one, with RMSNorm."""
    bias: bool = False
    name: str = "norm"
    """The modules are q_ and k_ with this behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which experts a token goes to and what weight each has, given the router's product for every expert."""

    per_token: int
    score: Literal["softmax", "sigmoid", "sparse_mixer"] = "softmax"
    """What scores are made of products. ``sparse_mixer`` chooses one expert after the other: its score is its share
    among those left whose products are close to it (Liu et al., arXiv 2409.12136)."""
    jitter: float = 0.0
    """Of the sparse mixer: half the relative distance within which products are close."""
    bias: str = ""
    """Tensor of the block that is added to scores where experts are chosen, not where they are weighted."""
    groups: int = 1
    """Runs of experts: a token's are all in the best ``groups_per_token`` of them."""
    groups_per_token: int = 1
    group_best: int = 1
    """A group is as good as the sum of so many of its best scores."""
    norm: float = 0.0
    """Weights are divided by their p-norm, for this p; 0: they are the scores."""
    norm_least: float = 1e-20
    """What they are divided by at least."""
    factor: float = 1.0
    """On all weights."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor that holds matrices of all experts, one expert's behind the other's."""

    name: str
    """In the block."""
    matrices: tuple[str, ...]
    """Those of an expert, one below the other, as they are in ``Experts.names``."""
    transposed: bool = False
    """Each is stored as [in, out]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Attention whose keys and values are made of one short vector a token (DeepSeek-AI, arXiv 2405.04434)."""

    rank: int
    """Of this vector."""
    q_rank: int | None
    """Of what queries are made of; None: of the hidden state itself."""
    still: int
    """Dimensions of a query that don't turn."""
    turning: int
    """Dimensions that do; those of the key are the same for all heads."""
    value: int
    """Of a head's value."""
    interleaved: bool
    """Whether a dimension turns against its neighbour."""
    bias: bool
    """Of the projections from and to the hidden state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts."""

    block: str
    """Module of a layer that has router and experts."""
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Of an expert's matrices."""
    stacks: tuple[Stack, ...] = ()
    """Where they are, unless each expert is a module."""
    count: int
    intermediate: int
    routing: Routing
    shared_intermediate: int = 0
    """Width of an expert for all tokens; 0: there is none."""
    shared: str = "shared_experts"
    """Its module."""
    shared_gate: str = ""
    """Module whose product's sigmoid is its weight; empty: 1."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have one feed-forward block."""


_REQUIRED = object()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. How its weights are quantized may be in a file of its own instead."""
    raw = _read_object(Path(folder) / "config.json")
    for name in ("quantize_config.json", "quant_config.json"):
        path = Path(folder) / name
        if not (raw.get("quantization_config") or raw.get("compression_config")) and path.exists():
            raw["quantization_config"] = _read_object(path)
    return raw


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise StartupError(f"{path}: expected a JSON object")
    return raw


def integer(raw: Raw, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
    """An integer of at least 0 or 1; a missing or null key takes ``default``."""
    value = raw.get(key)
    if value is None:
        return _default(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise StartupError(f"config.json: {key}: expected {kind}, got {value!r}")
    return value


def number(raw: Raw, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
    """A finite number as a float; a missing or null key takes ``default``."""
    value = raw.get(key)
    if value is None:
        return _default(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise StartupError(f"config.json: {key}: expected a number, got {value!r}")
    if positive and value <= 0:
        raise StartupError(f"config.json: {key}: expected a number above 0, got {value!r}")
    return float(value)


def flag(raw: Raw, key: str, default: bool) -> bool:
    """A boolean; a missing or null key takes ``default``."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise StartupError(f"config.json: {key}: expected true or false, got {value!r}")
    return value


def _default(key: str, default: Any) -> Any:
    if default is _REQUIRED:
        raise StartupError(f"config.json: {key} is missing")
    return default


def architecture(raw: Raw) -> str:
    """The one name in ``architectures``."""
    match raw.get("architectures"):
        case [str(name)]:
            return name
        case other:
            raise StartupError(f"config.json: architectures: expected a list of one name, got {other!r}")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, either spelling: ``rope_scaling`` + ``rope_theta``, or ``rope_parameters``."""

    type: str
    theta: float
    partial: float = 1.0
    """Share of a head's dimensions that rotate."""
    factor: float = 1.0
    original: int = 0
    """Positions that the model was first trained on."""
    attention_factor: float | None = None
    """Multiplies cos and sin; None: the type's own rule."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None
    """Where there are such, they take the place of ``attention_factor``."""
    long_mscale: float | None = None


_ROPE_KEYS: dict[str, set[str]] = {
    "default": {"factor"},
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"},
}
"""Keys of each type beside the common ones; any other key is refused, since it would change the angles."""

_ROPE_COMMON = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",  # says how the model was made
}
_ROPE_ALIASES = {"su": "longrope"}


def read_rope(raw: Raw, *, scaling: str | None = None, factor: float | None = None) -> Rope:
    """The config's rotary embedding; ``scaling`` (linear or dynamic) and ``factor`` are the operator's override.

    As in TGI a lone factor means linear scaling, a lone scaling means a factor of 1.
    """
    spelling = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(spelling) or {}
    if not isinstance(rope, dict):
        raise StartupError(f"config.json: {spelling}: expected an object, got {rope!r}")
    positions = integer(raw, "max_position_embeddings")
    theta = number(rope, "rope_theta", number(raw, "rope_theta", 10_000.0))
    partial = number(rope, "partial_rotary_factor", number(raw, "partial_rotary_factor", 1.0))
    if partial > 1:
        raise StartupError(f"config.json: partial_rotary_factor: expected at most 1, got {partial}")
    if scaling is not None or factor is not None:
        scaling = scaling or "linear"
        if scaling not in ("linear", "dynamic"):
            raise StartupError(f"--rope-scaling: expected linear or dynamic, got {scaling!r}")
        return Rope(scaling, theta, partial, factor=1.0 if factor is None else factor, original=positions)

    name = rope.get("rope_type") or rope.get("type") or "default"
    name = _ROPE_ALIASES.get(str(name), str(name))
    if name not in _ROPE_KEYS:
        raise StartupError(f"config.json: {spelling}: type {name!r} is not implemented; known: {', '.join(_ROPE_KEYS)}")
    if unknown := sorted(set(rope) - _ROPE_COMMON - _ROPE_KEYS[name]):
        raise StartupError(f"config.json: {spelling}: {unknown[0]} is not implemented for type {name!r}")
    common: dict[str, Any] = {"type": name, "theta": theta, "partial": partial}
    if name == "default":
        return Rope(**common, original=positions)
    if name in ("linear", "dynamic"):
        return Rope(**common, factor=number(rope, "factor"), original=positions)
    inner = integer(rope, "original_max_position_embeddings", positions)
    original = integer(raw, "original_max_position_embeddings", inner)
    common["original"] = original
    if name == "llama3":
        return Rope(
            **common,
            factor=number(rope, "factor"),
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
        )
    common["factor"] = number(rope, "factor", positions / original)
    common["attention_factor"] = number(rope, "attention_factor", None)
    if name == "longrope":
        return Rope(
            **common,
            short_factor=_numbers(rope, "short_factor"),
            long_factor=_numbers(rope, "long_factor"),
            short_mscale=number(rope, "short_mscale", None),
            long_mscale=number(rope, "long_mscale", None),
        )
    return Rope(
        **common,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        mscale=number(rope, "mscale", None, positive=False),
        mscale_all_dim=number(rope, "mscale_all_dim", None, positive=False),
        truncate=flag(rope, "truncate", True),
    )


def _numbers(raw: Raw, key: str) -> tuple[float, ...]:
    values = raw.get(key)
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise StartupError(f"config.json: {key}: expected a list of numbers, got {values!r}")
    return tuple(float(v) for v in values)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder: enough to know its memory before anything is loaded."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position_embeddings: int
    """Tokens that a request may total: what the config states, stretched where rope scaling is meant to stretch it."""
    tied: bool
    latent: int = 0
    """If not 0, so many dimensions at the end of a key are its value."""

    @classmethod
    def read(cls, raw: Raw, *, rope_scaling: str | None = None, rope_factor: float | None = None) -> "ModelShape":
        """From a config.json; ``rope_scaling`` and ``rope_factor`` are the operator's override of the config."""
        hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
        kv_heads = integer(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise StartupError(f"config.json: num_key_value_heads: {kv_heads} does not divide {heads} attention heads")
        head_dim = integer(raw, "head_dim", None)
        if head_dim is None:
            if hidden % heads:
                raise StartupError(f"config.json: num_attention_heads: {heads} does not divide hidden_size {hidden}")
            head_dim = hidden // heads
        positions = integer(raw, "max_position_embeddings")
        return cls(
            architecture(raw),
            integer(raw, "num_hidden_layers"),
            hidden,
            heads,
            kv_heads,
            head_dim,
            integer(raw, "intermediate_size"),
            integer(raw, "vocab_size"),
            _reach(read_rope(raw, scaling=rope_scaling, factor=rope_factor), positions, rope_scaling, rope_factor),
            flag(raw, "tie_word_embeddings", False),
        )


def _reach(rope: Rope, positions: int, scaling: str | None, factor: float | None) -> int:
    """Dynamic scaling and an operator's factor stretch what the config states. Yarn configs state the length either
    before or after stretching. All others state what the model reaches."""
    if rope.type == "dynamic" or scaling is not None or factor is not None:
        return int(positions * max(rope.factor, 1.0))
    if rope.type == "yarn":
        return max(positions, int(rope.original * rope.factor))
    return positions
