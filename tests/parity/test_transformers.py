"""Every family and every rope variant: our logits are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import FullAttention, load, logits, reference, reference_logits, tokens
from tests.tiny import FAMILIES, write_model

HALF = 8
"""Rotary frequencies of the tiny models' heads."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "yarn-mscale": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
            "beta_fast": 16,
            "beta_slow": 2,
        }
    },
    "yarn-attention-factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 8.0,
            "attention_factor": 1.3,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
        "rope_theta": None,
    },
    "longrope": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
            "long_factor": [1.5 + 0.7 * i for i in range(HALF)],
        },
        "original_max_position_embeddings": 64,
    },
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rope_theta": None},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family}-tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    **{f"llama-{name}": ("llama", rope) for name, rope in ROPES.items()},
    **{f"phi3-{name}": ("phi3", ROPES[name]) for name in ("longrope", "theta")},
    **{f"{family}-yarn": (family, ROPES["yarn"]) for family in ("mistral", "qwen2", "granite")},
    "qwen3-yarn": ("qwen3", ROPES["yarn-attention-factor"]),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 40}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "phi3-window": ("phi3", {"sliding_window": 7}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "gemma2-types": ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3-capped": ("gemma3", {"final_logit_softcapping": 2.0}),
    "gemma3-linear": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "gemma3-ropes": (
        "gemma3",
        {
            "rope_theta": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
            },
        },
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("folder", VARIANTS.values(), ids=VARIANTS.keys(), indirect=True)
def test_two_sequences_in_one_batch(folder: Path):
    """Short of the trained length, where every rope type is defined alike on both sides."""
    long, short = tokens(50), tokens(23, seed=1)
    ours = logits(load(folder, max_total_tokens=64), long, short)
    theirs = reference_logits(reference(folder), long, short)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert theirs.std() > 0.5, "logits this flat would hide a mistake"
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_a_prompt_beyond_the_trained_length(tmp_path: Path, name: str):
    """Dynamic and longrope choose by the sequence's length: ours by the longest that is served, here the prompt's."""
    length = 80
    folder = write_model(tmp_path, "llama", **{"max_position_embeddings": 64, **ROPES[name]})
    prompt = tokens(length)
    ours = logits(load(folder, max_total_tokens=length), prompt)
    theirs = reference_logits(reference(folder), prompt)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["linear", "dynamic"])
def test_the_operators_scaling_overrides_the_config(tmp_path: Path, name: str):
    plain = write_model(tmp_path / "plain", "llama", max_position_embeddings=64)
    scaled = write_model(
        tmp_path / "scaled", "llama", max_position_embeddings=64, rope_scaling={"type": name, "factor": 2.0}
    )
    prompt = tokens(100)
    ours = logits(load(plain, rope_scaling=name, rope_factor=2.0, max_total_tokens=100), prompt)
    theirs = reference_logits(reference(scaled), prompt)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - logits(load(plain), prompt)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_whatever_the_weights_are(tmp_path: Path, dtype: torch.dtype):
    """Penalties, warpers and log-probabilities are made of them."""
    model = load(write_model(tmp_path, "llama"), dtype=dtype)
    assert model.forward(tokens(9), torch.arange(9), FullAttention(model.specs, [9])).dtype == model.compute
    assert logits(model, tokens(9)).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_does_not_depend_on_its_batch(tmp_path: Path, family: str):
    """Bit for bit: alone, among others, at any place of the batch, and however the work is split over threads."""
    torch.set_num_threads(2)
    model = load(write_model(tmp_path, family))
    sequences = [tokens(length, seed=length) for length in (1, 3, 17, 300, 2, 1, 133)]
    together = logits(model, *sequences).split([len(s) for s in sequences])
    for sequence, batched in zip(sequences, together, strict=True):
        assert torch.equal(logits(model, sequence), batched)
