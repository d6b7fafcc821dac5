"""Tiny GGUF files, written with ggml's own package from the folders of tests/tiny.py."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file


def write_gguf(folder: Path, quantized: str = "F32", pre: str = "gpt-2", **metadata: Any) -> Path:
    """The model of ``folder`` as one file beside it: matrices in the type ``quantized``, the rest in float32.

    ``metadata`` adds or replaces keys, with dots written as two underscores. The folder's own safetensors are rewritten
    to hold what the file holds after quantization.
    """
    config = json.loads((folder / "config.json").read_bytes())
    path = folder.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, config["model_type"].replace("mistral", "llama").removesuffix("_text"))
    _write_sizes(writer, config)
    write_tokenizer(writer, folder, pre)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_bytes())
    writer.add_chat_template(tokenizer_config["chat_template"])
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        writer.kv_data[0].pop(name := key.replace("__", "."), None)
        add[type(value)](name, value)
    _write_tensors(writer, folder, config, gguf.GGMLQuantizationType[quantized])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    writer.add_vocab_size(config["vocab_size"])
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] in ("phi3", "gemma2", "gemma3_text"):
        writer.add_sliding_window(config.get("sliding_window", 0))
    if "attn_logit_softcapping" in config:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if "final_logit_softcapping" in config:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    scaling = config.get("rope_scaling", {})
    if scaling.get("type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if scaling.get("type") == "llama3":
        divisors = _llama3_divisors(scaling, config["rope_theta"], head_dim)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if scaling.get("type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], np.float32))


def _llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """Llama 3's rule as ggml's converter stores it: worked out, one divisor per frequency."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for dimension in range(0, head_dim, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (dimension / head_dim))
        kept = min(max((turns - low) / (high - low), 0), 1)
        divisors.append(1 / (kept + (1 - kept) / scaling["factor"]))
    return divisors


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    bytes_apart = tokenizer["model"].get("byte_fallback", False)

    def kind(token: str) -> gguf.TokenType:
        if token == "<unk>":
            return gguf.TokenType.UNKNOWN if bytes_apart else gguf.TokenType.CONTROL
        if token in added:
            return gguf.TokenType.CONTROL if added[token]["special"] else gguf.TokenType.USER_DEFINED
        is_byte = bytes_apart and token.startswith("<0x") and len(token) == 6
        return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama" if bytes_apart else "gpt2")
    writer.add_tokenizer_pre("default" if bytes_apart else pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kind(token) for token in tokens])
    if bytes_apart:
        writer.add_token_scores([float(-index) for index in range(len(tokens))])
        writer.add_unk_token_id(ids["<unk>"])
    else:
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])


def _write_tensors(
    writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], quantized: gguf.GGMLQuantizationType
) -> None:
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = quantized if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        part = name.split(".")[-2].removesuffix("_proj")
        permute = part in heads and config["model_type"] in ("llama", "mistral", "granite")
        data = _permute(tensor, heads[part]) if permute else tensor
        shift = config["model_type"].startswith("gemma") and "norm" in part
        data = data + np.float32(1) if shift else data
        packed = _pack(data, kind)
        values = gguf.dequantize(packed, kind)
        values = values - np.float32(1) if shift else values
        stored[name] = _restore(values, heads[part]) if permute else values
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, packed, raw_dtype=kind)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, folder / "model.safetensors")


def _pack(tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor in blocks of this type; random blocks of moderate values where ggml's package can't quantize to it."""
    if not kind.name.endswith("_K"):
        return gguf.quantize(tensor, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4096, size), np.uint8)
    with np.errstate(all="ignore"):
        blocks = blocks[np.abs(gguf.dequantize(blocks, kind)).max(1) < 0.2]
    rows, columns = tensor.shape
    return random.choice(blocks, rows * columns // elements).reshape(rows, -1)


def _permute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What ggml's converter does to q and k of llama models."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _restore(tensor: np.ndarray, heads: int) -> np.ndarray:
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
