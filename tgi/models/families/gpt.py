"""GPT-2 and the decoders of its lineage."""

from dataclasses import replace

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape, QkNorm, Qkv, Raw, architecture, flag, integer, number
from tgi.models.config import Family, GptConfig, Names, keys_of

LLAMA_NAMES = Names(
    embed="model.embed_tokens",
    layer="model.layers.{}",
    norm="input_layernorm",
    attention="self_attn",
    o="o_proj",
    mlp_norm="post_attention_layernorm",
    final_norm="model.norm",
)
_GPT2_NAMES = Names(
    embed="transformer.wte",
    layer="transformer.h.{}",
    norm="ln_1",
    attention="attn",
    o="c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)
_BLOOM_NAMES = Names(
    embed="transformer.word_embeddings",
    layer="transformer.h.{}",
    norm="input_layernorm",
    attention="self_attention",
    o="dense",
    mlp_norm="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
)


def _neox(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", True)
    return {
        "names": replace(
            _BLOOM_NAMES,
            embed="gpt_neox.embed_in",
            layer="gpt_neox.layers.{}",
            attention="attention",
            final_norm="gpt_neox.final_layer_norm",
            head="embed_out",
        ),
        "qkv": Qkv(("query_key_value",), "groups"),
        "parallel": flag(raw, "use_parallel_residual", True),
        "two_norms": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
    }


def _gptj(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "names": replace(_GPT2_NAMES, o="out_proj", up="mlp.fc_in", down="mlp.fc_out"),
        "qkv": Qkv(pairs=integer(raw, "rotary_dim")),
        "parallel": True,
        "two_norms": False,
        "mlp_bias": True,
        "head_bias": True,
    }


def _phi(raw: Raw, shape: ModelShape) -> dict[str, object]:
    names = replace(LLAMA_NAMES, o="dense", up="mlp.fc1", down="mlp.fc2", final_norm="model.final_layernorm")
    sequential = architecture(raw) == "MixFormerSequentialForCausalLM"
    if sequential or raw.get("model_type") == "phi-msft":
        last = f"layers.{shape.layers + 1}" if sequential else "lm_head"
        names = replace(
            names,
            embed="layers.0.wte" if sequential else "transformer.embd.wte",
            layer="layers.{1}" if sequential else "transformer.h.{}",
            norm="ln",
            attention="mixer",
            o="out_proj",
            final_norm=f"{last}.ln",
            head=f"{last}.linear",
        )
    return {
        "names": names,
        "qkv": Qkv(("Wqkv",)) if names.attention == "mixer" else Qkv(),
        "qk_norm": QkNorm(center=True, bias=True, name="layernorm") if flag(raw, "qk_layernorm", False) else None,
        "parallel": True,
        "two_norms": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    }


def _falcon(raw: Raw, shape: ModelShape) -> dict[str, object]:
    new = flag(raw, "new_decoder_architecture", False)
    parallel = new or flag(raw, "parallel_attn", True)
    norms = integer(raw, "num_ln_in_parallel_attn", 2 if new else 1)
    two = not parallel or norms == 2
    bias = flag(raw, "bias", False)
    stacked = not new and flag(raw, "multi_query", True)
    slopes = None
    if flag(raw, "alibi", False):
        # Its scores are scaled with the slopes.
        slopes = tuple(slope * shape.head_dim**-0.5 for slope in alibi_slopes(shape.heads))
    return {
        "names": replace(
            _BLOOM_NAMES,
            norm="ln_attn" if parallel and two else "input_layernorm",
            mlp_norm="ln_mlp" if parallel else "post_attention_layernorm",
        ),
        "qkv": Qkv(("query_key_value",), "stacked" if stacked else "groups"),
        "parallel": parallel,
        "two_norms": two,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "slopes": slopes,
    }


def _stablelm(raw: Raw, shape: ModelShape) -> dict[str, object]:
    parallel = flag(raw, "use_parallel_residual", False)
    norm = QkNorm(center=True, weights="modules", name="layernorm")
    return {
        "names": LLAMA_NAMES,
        "qkv": Qkv(),
        "qk_norm": norm if flag(raw, "qk_layernorm", False) else None,
        "parallel": parallel,
        "two_norms": not parallel,
        "gated": True,
        "qkv_bias": flag(raw, "use_qkv_bias", False),
    }


def _nemotron(raw: Raw, shape: ModelShape) -> dict[str, object]:
    bias = flag(raw, "attention_bias", False)
    return {
        "names": replace(LLAMA_NAMES, up="mlp.up_proj", down="mlp.down_proj"),
        "qkv": Qkv(),
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": flag(raw, "mlp_bias", False),
    }


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of each head: 2^-8/n, 2^-16/n, … for n heads if that is a power of two, else those of the largest one below, and
    of every second head of twice as many (Press et al., arXiv 2108.12409)."""
    whole = 1 << heads.bit_length() - 1
    slopes = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
    return (*slopes, *(2 ** (-4 * (2 * head + 1) / whole) for head in range(heads - whole)))


_GPT_SIZES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}


def _fourfold(raw: dict[str, object]) -> None:
    if raw.get("intermediate_size") is None:
        raw["intermediate_size"] = 4 * integer(raw, "hidden_size")


def _rotary_dim(raw: dict[str, object]) -> None:
    _fourfold(raw)
    if raw.get("rotary_dim") is None:
        return
    dim = integer(raw, "hidden_size") / integer(raw, "num_attention_heads")
    raw["partial_rotary_factor"] = integer(raw, "rotary_dim") / dim


def _falcon_sizes(raw: dict[str, object]) -> None:
    _fourfold(raw)
    if not flag(raw, "new_decoder_architecture", False):
        _one_kv_head(raw, flag(raw, "multi_query", True))


_SUMMARY = keys_of("summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout")
NEOX = Family(
    _neox,
    keys_of("use_parallel_residual attention_bias partial_rotary_factor classifier_dropout"),
    GptConfig,
    eps="layer_norm_eps",
    defaults={"hidden_act": "gelu", "partial_rotary_factor": 0.25},
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
)
GPTJ = Family(
    _gptj,
    _SUMMARY | keys_of("rotary_dim partial_rotary_factor"),
    GptConfig,
    activation="activation_function",
    eps="layer_norm_epsilon",
    defaults={"activation_function": "gelu_new", "rotary_dim": 64, "layer_norm_epsilon": 1e-5},
    aliases=_GPT_SIZES,
    sizes=_rotary_dim,
)
PHI = Family(
    _phi,
    keys_of(
        """partial_rotary_factor qk_layernorm rotary_dim flash_attn flash_rotary fused_dense img_processor
        pad_vocab_size_multiple"""
    ),
    GptConfig,
    eps="layer_norm_eps",
    defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    aliases=_GPT_SIZES
    | {
        "n_head_kv": "num_key_value_heads",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    sizes=_rotary_dim,
)
FALCON = Family(
    _falcon,
    keys_of("new_decoder_architecture parallel_attn num_ln_in_parallel_attn bias multi_query alibi"),
    GptConfig,
    activation="activation",
    eps="layer_norm_epsilon",
    defaults={
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    aliases={
        "n_embed": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "num_kv_heads": "num_key_value_heads",
        "n_head_kv": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
    },
    sizes=_falcon_sizes,
)
STABLELM = Family(
    _stablelm,
    keys_of("partial_rotary_factor use_parallel_residual use_qkv_bias qk_layernorm"),
    GptConfig,
    eps="layer_norm_eps",
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
)
NEMOTRON = Family(
    _nemotron,
    keys_of("partial_rotary_factor attention_bias mlp_bias"),
    GptConfig,
    eps="norm_eps",
    defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
)


_ALL_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _gpt2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _ALL_BIASES | {
        "names": replace(_GPT2_NAMES, positions="transformer.wpe"),
        "qkv": Qkv(("c_attn",), transposed=True),
    }


def _santacoder(raw: Raw, shape: ModelShape) -> dict[str, object]:
    if (kind := raw.get("attention_head_type")) != "multiquery":
        raise StartupError(f"config.json: attention_head_type: {kind!r} is not implemented")
    return _gpt2(raw, shape) | {"qkv": Qkv(("q_attn", "kv_attn"), transposed=True)}


def _bigcode(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _ALL_BIASES | {
        "names": replace(_GPT2_NAMES, positions="transformer.wpe"),
        "qkv": Qkv(("c_attn",), "stacked" if flag(raw, "multi_query", True) else "groups"),
    }


def _opt(raw: Raw, shape: ModelShape) -> dict[str, object]:
    before = flag(raw, "do_layer_norm_before", True)
    affine = flag(raw, "layer_norm_elementwise_affine", True)
    width = integer(raw, "word_embed_proj_dim", shape.hidden)
    final = before and not flag(raw, "_remove_final_layer_norm", False)
    return {
        "names": Names(
            embed="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            layer="model.decoder.layers.{}",
            norm="self_attn_layer_norm",
            attention="self_attn",
            o="out_proj",
            mlp_norm="final_layer_norm",
            up="fc1",
            down="fc2",
            final_norm="model.decoder.final_layer_norm" if final else "",
            project_in="model.decoder.project_in",
            project_out="model.decoder.project_out",
        ),
        "qkv": Qkv(),
        "norms_behind": not before,
        "norm_weight": affine,
        "norm_bias": affine,
        "embedding": None if width == shape.hidden else width,
        "first_position": 2,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), flag(raw, "enable_bias", True)),
    }


def _bloom(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return _ALL_BIASES | {
        "names": replace(_BLOOM_NAMES, embed_norm="transformer.word_embeddings_layernorm"),
        "qkv": Qkv(("query_key_value",), "groups"),
        "slopes": alibi_slopes(shape.heads),
    }


def _mpt(raw: Raw, shape: ModelShape) -> dict[str, object]:
    attention = raw.get("attn_config") or {}
    plain = {
        "attn_type": ("multihead_attention",),
        "prefix_lm": (False,),
        "qk_ln": (False,),
        "alibi": (True,),
        "alibi_bias_max": (8,),
    }
    for key, values in plain.items():
        if (value := attention.get(key)) is not None and value not in values:
            raise StartupError(f"config.json: attn_config: {key}: {value!r} is not implemented")
    return {
        "names": replace(
            _GPT2_NAMES,
            layer="transformer.blocks.{}",
            norm="norm_1",
            o="out_proj",
            mlp_norm="norm_2",
            up="ffn.up_proj",
            down="ffn.down_proj",
            final_norm="transformer.norm_f",
        ),
        "qkv": Qkv(("Wqkv",)),
        "norm_bias": False,
        "slopes": alibi_slopes(shape.heads),
        "clip_qkv": number(attention, "clip_qkv", None),
        "attention_scale": number(attention, "softmax_scale", shape.head_dim**-0.5),
    }


def _starcoder2(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "names": replace(LLAMA_NAMES, up="mlp.c_fc", down="mlp.c_proj"),
        "qkv": Qkv(),
        "windows": (integer(raw, "sliding_window", None),) * shape.layers,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), flag(raw, "use_bias", True)),
    }


def _mpt_sizes(raw: dict[str, object]) -> None:
    raw["intermediate_size"] = integer(raw, "hidden_size") * integer(raw, "expansion_ratio", 4)


_GPT_DEFAULTS = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

GPT2 = Family(
    _gpt2,
    _SUMMARY | keys_of("reorder_and_upcast_attn n_ctx"),
    GptConfig,
    activation="activation_function",
    eps="layer_norm_epsilon",
    defaults=_GPT_DEFAULTS | {"activation_function": "gelu_new"},
    aliases=_GPT_SIZES,
    sizes=_fourfold,
)
SANTACODER = replace(
    GPT2,
    rule=_santacoder,
    keys=GPT2.keys | {"attention_head_type"},
    sizes=lambda raw: _one_kv_head(raw, True),
)
BIGCODE = Family(
    _bigcode,
    _SUMMARY
    | keys_of(
        """multi_query attention_softmax_in_fp32 scale_attention_softmax_in_fp32 n_ctx
        inference_runner max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache
        validate_runner_input"""
    ),
    GptConfig,
    activation="activation_function",
    eps="layer_norm_epsilon",
    defaults=_GPT_DEFAULTS | {"activation_function": "gelu_pytorch_tanh"},
    aliases=_GPT_SIZES,
    sizes=lambda raw: _one_kv_head(raw, flag(raw, "multi_query", True)),
)
OPT = Family(
    _opt,
    keys_of(
        """word_embed_proj_dim enable_bias dropout activation_dropout layerdrop init_std do_layer_norm_before
        layer_norm_elementwise_affine _remove_final_layer_norm"""
    ),
    GptConfig,
    activation="activation_function",
    eps="layer_norm_eps",
    defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "activation_function": "relu"},
    aliases={"ffn_dim": "intermediate_size"},
)
BLOOM = Family(
    _bloom,
    keys_of(
        """slow_but_exact skip_bias_add skip_bias_add_qkv offset_alibi masked_softmax_fusion
        bias_dropout_fusion attention_softmax_in_fp32"""
    ),
    GptConfig,
    activation="activation",
    eps="layer_norm_epsilon",
    defaults=_GPT_DEFAULTS | {"activation": "gelu_pytorch_tanh", "max_position_embeddings": 2048},
    aliases=_GPT_SIZES | {"n_embed": "hidden_size", "seq_length": "max_position_embeddings"},
    sizes=_fourfold,
)
MPT = Family(
    _mpt,
    keys_of(
        """attn_config expansion_ratio init_config init_device learned_pos_emb embedding_fraction
        emb_pdrop tokenizer_name verbose fc_type ffn_config"""
    ),
    GptConfig,
    activation="activation",
    eps="layer_norm_epsilon",
    defaults=_GPT_DEFAULTS | {"activation": "gelu"},
    aliases={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
    },
    sizes=_mpt_sizes,
)
STARCODER2 = Family(
    _starcoder2,
    keys_of("use_bias sliding_window embedding_dropout residual_dropout"),
    GptConfig,
    eps="norm_epsilon",
    defaults={"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "norm_epsilon": 1e-5},
)


def _one_kv_head(raw: dict[str, object], one: bool) -> None:
    _fourfold(raw)
    raw["num_key_value_heads"] = 1 if one else integer(raw, "num_attention_heads")
