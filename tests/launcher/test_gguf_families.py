"""GGUF files of every architecture, laid out as llama.cpp's converter does, give the logits of transformers."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig

from tests import small_tokenizers
from tests.launcher.test_gguf import load_gguf
from tests.parity.conftest import logits, reference_logits, tokens, write_reference
from tests.parity.test_more import VARIANTS, theirs_of
from tests.tiny_gguf import write_tokenizer
from tgi.core.errors import StartupError

Tensors = dict[str, np.ndarray]

NAMES = {
    "gpt_neox": "gptneox",
    "gpt_bigcode": "starcoder",
    "mixtral": "llama",
    "phi": "phi2",
    "cohere": "command-r",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""transformers' names of models that llama.cpp names otherwise."""

LAYOUTS = (
    "neox neox-in-turn neox-tied phi phi-grouped falcon-7b falcon-40b falcon-11b gpt2 bigcode bloom bloom-6 mpt mpt-6 "
    "mpt-clipped starcoder2 mixtral qwen2-moe stablelm stablelm-parallel cohere cohere-qk-norm nemotron olmo olmo2"
).split()
OTHERS = {
    "qwen3-moe": ("qwen3_moe", {**VARIANTS["qwen3-moe"][1], "mlp_only_layers": []}),
    "cohere2": ("cohere2", {**VARIANTS["cohere2"][1], "sliding_window_pattern": 4}),
    "starcoder2-biasless": ("starcoder2", {**VARIANTS["starcoder2"][1], "use_bias": False}),
    "olmo-clipped": ("olmo", {**VARIANTS["olmo"][1], "clip_qkv": 0.5}),
}


def write(folder: Path, quantized: bool = False, **numbers: float) -> Path:
    """The model of ``folder`` in llama.cpp's layout, in float32, or its matrices in Q8_0. ``numbers`` adds or replaces
    metadata."""
    config = AutoConfig.from_pretrained(folder)
    small_tokenizers.write(folder, config=config.to_dict(), generation_config={}, tokenizer_config={})
    path = folder.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, name := NAMES.get(config.model_type, config.model_type))
    _write_sizes(writer, config, name)
    for key, value in numbers.items():
        writer.kv_data[0].pop(key, None)
        writer.add_float32(key, value)
    write_tokenizer(writer, folder)
    names = gguf.get_tensor_name_map(_architecture(name), config.num_hidden_layers)
    tensors = {n: _laid_out(n, t, config) for n, t in load_file(folder / "model.safetensors").items()}
    for original, tensor in _stacked(tensors).items():
        stem = original.removeprefix("transformer.") if name == "bloom" else original
        target = names.get_name(stem, try_suffixes=(".weight", ".bias"))
        assert target is not None, original
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    if config.model_type == "gpt_bigcode":
        return 1
    for key in ("num_key_value_heads", "num_kv_heads"):
        if (found := getattr(config, key, None)) is not None:
            return int(found)
    return int(config.num_attention_heads)


def _write_sizes(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    def of(*keys: str) -> Any:
        return next((getattr(config, key) for key in keys if getattr(config, key, None) is not None), None)

    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = of("head_dim") or hidden // heads
    writer.add_context_length(of("max_position_embeddings", "seq_length", "max_seq_len") or 512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(of("intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(_kv_heads(config))
    if head_dim != hidden // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (eps := of("rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(of("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps") or 1e-5)
    rope = of("rope_parameters") or {}
    if name not in ("gpt2", "starcoder", "bloom", "mpt"):
        writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if (parallel := of("use_parallel_residual")) is not None:
        writer.add_parallel_residual(parallel)
    if name == "falcon":
        writer.add_tensor_data_layout("jploski")
    if name == "mpt":
        writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    if name.startswith("co"):
        writer.add_logit_scale(config.logit_scale)
    if name == "cohere2":
        writer.add_sliding_window(config.sliding_window)
    if (clip := of("clip_qkv") or getattr(of("attn_config"), "clip_qkv", None)) is not None:
        writer.add_clamp_kqv(clip)
    if (count := of("num_local_experts", "num_experts")) is not None:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if (inner := of("moe_intermediate_size")) is not None:
        writer.add_expert_feed_forward_length(inner)
    if (inner := of("shared_expert_intermediate_size")) is not None:
        writer.add_expert_shared_feed_forward_length(inner)


def _laid_out(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """As llama.cpp has it."""
    family, heads, kv_heads = config.model_type, config.num_attention_heads, _kv_heads(config)
    if family == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        return tensor.T
    if family in ("gpt_neox", "bloom", "falcon") and "query_key_value" in name:
        shared = heads // kv_heads
        groups = tensor.reshape(kv_heads, shared + 2, -1, *tensor.shape[1:])
        parts = groups[:, :shared], groups[:, shared], groups[:, shared + 1]
        return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    if family in ("mixtral", "olmo") and (match := re.search(r"\.([qk])_proj\.", name)):
        pairs = tensor.reshape(heads if match[1] == "q" else kv_heads, 2, -1, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)
    if family == "nemotron" and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    return tensor.squeeze() if "shared_expert_gate" in name else tensor


def _stacked(tensors: Tensors) -> Tensors:
    """The experts' matrices as one."""
    stacks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    plain = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", name):
            stacks[f"{match[1]}.{match[3]}"][int(match[2])] = tensor
        else:
            plain[name] = tensor
    return plain | {name: np.stack([stack[n] for n in range(len(stack))]) for name, stack in stacks.items()}


@pytest.mark.parametrize(
    ("family", "config"),
    [*(VARIANTS[name] for name in LAYOUTS), *OTHERS.values()],
    ids=[*LAYOUTS, *OTHERS],
)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder = write_reference(tmp_path / "model", family, **config)
    expected = reference_logits(theirs_of(folder), tokens(40))
    ours = logits(load_gguf(write(folder), tmp_path / "cache"), tokens(40))
    assert (ours - expected).abs().max() < 1e-4 * max(expected.std().item(), 1)


@pytest.mark.parametrize("name", ["qwen3-moe", "falcon-40b", "gpt2"])
def test_quantized_matrices_stay_so(tmp_path: Path, name: str) -> None:
    """Those of experts and those whose rows are put in another order, too."""
    family, config = (OTHERS | VARIANTS)[name]
    sizes = {"moe_intermediate_size": 64, "mlp_only_layers": []} if "moe" in name else {}
    path = write(write_reference(tmp_path / "model", family, **config | sizes), quantized=True)
    exact, kept = (logits(load_gguf(path, tmp_path / "cache", quantize), tokens(40)) for quantize in (None, "stored"))
    assert 0 < (kept - exact).abs().mean() < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("name", "key", "value", "text"),
    [
        ("mpt", "mpt.attention.max_alibi_bias", 4.0, "alibi_bias_max: 4.0"),
        ("qwen2-moe", "qwen2moe.expert_weights_scale", 2.0, "qwen2moe.expert_weights_scale: 2.0"),
        ("starcoder2", "starcoder2.attention.sliding_window", 4.0, "starcoder2.attention.sliding_window: 4.0"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, name: str, key: str, value: float, text: str) -> None:
    folder = write_reference(tmp_path / "model", VARIANTS[name][0], **VARIANTS[name][1])
    with pytest.raises(StartupError, match=text):
        load_gguf(write(folder, **{key: value}), tmp_path / "cache")
