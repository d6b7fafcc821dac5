"""The sizes of a model that has no row of its own, by the names that configs use; what the tail refuses by name."""

from collections.abc import Iterator
from typing import Any

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, Raw, architecture, flag, integer
from tgi.models.config import TailConfig, keys_of

_ALIASES = {
    "hidden_size": "d_model n_embd model_dim embed_dim dim",
    "num_hidden_layers": "n_layer n_layers num_layers decoder_layers",
    "num_attention_heads": "n_head n_heads num_heads attention_heads decoder_attention_heads",
    "num_key_value_heads": "num_kv_heads n_kv_heads n_head_kv num_query_groups",
    "intermediate_size": "ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim inner_dim",
    "max_position_embeddings": "n_positions n_ctx max_seq_len seq_length max_sequence_length model_max_length",
    "vocab_size": "padded_vocab_size n_vocab",
}
"""The usual name → others."""

_STATE_SPACE = keys_of(
    """mamba mamba2 falcon_mamba jamba bamba zamba zamba2 falcon_h1 nemotron_h granitemoehybrid recurrent_gemma rwkv
    xlstm"""
)
_PARTS = ("text_config", "vision_config", "audio_config", "llm_config", "language_config", "thinker_config")
"""Keys of configs that are made of several."""


def read(raw: Raw, *, scaled: bool = False, trust_remote_code: bool = False) -> TailConfig:
    """Sizes, and whether any of it is refused before transformers looks at it. ``scaled``: the operator's override of
    the rotary embedding. StartupError names what is at fault."""
    name = architecture(raw)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise StartupError(f"config.json: model_type: expected a name, got {kind!r}")
    who = f"config.json: architectures: {name!r} (model_type {kind!r})"
    if kind in _STATE_SPACE and not _attends(raw.get("layer_types")):
        raise StartupError(f"{who} is a state-space model, which is not implemented")
    if flag(raw, "is_encoder_decoder", False):
        raise StartupError(f"{who} is an encoder-decoder, which is not implemented")
    if part := next((key for key in _PARTS if key in raw), None):
        raise StartupError(f"{who} is made of several models ({part}): images and sound are not implemented")
    code = raw.get("auto_map")
    remote = isinstance(code, dict) and "AutoModelForCausalLM" in code
    if not remote and not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise StartupError(f"{who} is not implemented, and is no causal language model")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            raise StartupError(f"config.json: {key} is not implemented for {name!r}")
    if scaled:
        raise StartupError(f"`--rope-scaling` and `--rope-factor` are not implemented for {name!r}")
    if not trust_remote_code and (place := next(_code(raw), None)):
        raise StartupError(f"config.json: {place}: code of a repository runs with `--trust-remote-code` alone")
    return TailConfig(_shape(raw, name), kind, remote)


def _attends(layer_types: Any) -> bool:
    """Whether all layers are attention: of one architecture there are models with and without state spaces."""
    return isinstance(layer_types, list) and set(layer_types) <= {"attention", "full_attention"}


def _shape(raw: Raw, name: str) -> ModelShape:
    sizes: dict[str, Any] = {}
    for key, others in _ALIASES.items():
        sizes[key] = next((raw[key] for key in (key, *others.split()) if raw.get(key) is not None), None)
    hidden, heads = integer(sizes, "hidden_size"), integer(sizes, "num_attention_heads")
    kv_heads = integer(sizes, "num_key_value_heads", heads)
    # Latent attention (DeepSeek) keeps keys whose parts the config states one by one, for every head.
    latent = integer(raw, "qk_nope_head_dim", 0) + integer(raw, "qk_rope_head_dim", 0)
    dims = (integer(raw, key, 0) for key in ("head_dim", "global_head_dim", "kv_channels"))
    return ModelShape(
        architecture=name,
        layers=integer(sizes, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads if latent else kv_heads,
        head_dim=latent or max(dims) or -(-hidden // heads),
        intermediate=integer(sizes, "intermediate_size", 4 * hidden),
        vocab=integer(sizes, "vocab_size"),
        max_position_embeddings=integer(sizes, "max_position_embeddings"),
        tied=flag(raw, "tie_word_embeddings", False),
    )


def _code(raw: Raw, path: str = "") -> Iterator[str]:
    """Where a part of the config names code. At the top it is only run if transformers has no such model itself."""
    for key, value in raw.items():
        if isinstance(value, dict):
            if path and key == "auto_map":
                yield f"{path}{key}"
            yield from _code(value, f"{path}{key}.")
