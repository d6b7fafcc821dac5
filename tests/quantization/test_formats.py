"""Quantized checkpoints of all formats: what their weights mean, whole and cut, and the models that they make."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import load, logits, reference, reference_logits, tokens, write_reference
from tests.parity.ranks import rank_logits
from tests.quantization.writers import FORMATS, Format, requantize, write
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.headers import read_headers
from tgi.core.model_config import read_config
from tgi.kernels.library import library
from tgi.launcher.fit import elements
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.quantization.formats.floats import Fp4
from tgi.quantization.mx import unpack
from tgi.quantization.quantized import Entry
from tgi.quantization.rounding import ROUNDING
from tgi.quantization.scheme import read_scheme

native = pytest.mark.skipif(library() is None, reason="there is no native library here")


@contextmanager
def entries(folder: Path) -> Iterator[dict[str, Entry]]:
    """What the model finds."""
    files = ModelFiles(
        model_id="tiny", folder=str(folder), weights=[str(path) for path in folder.glob("*.safetensors")]
    )
    with open_weights(files, check(read_config(str(folder))), lambda done, total: None) as weights:  # type: ignore[arg-type]
        yield dict(weights._left)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_was_written(tmp_path: Path, name: str) -> None:
    _, meant = write(tmp_path, FORMATS[name])
    close = any(part in name for part in ("asymmetric", "int8", "nvfp4"))  # a rounding more or less
    with entries(tmp_path) as found:
        assert set(found) == set(load_file(tmp_path / "plain" / "model.safetensors"))
        for key, values in meant.items():
            entry = found[key]
            assert entry.shape == values.shape
            for rows in (slice(None), slice(5, 12), slice(1, 20, 2)):
                torch.testing.assert_close(
                    entry.values[rows], values[rows], rtol=0, atol=1e-6 * float(values.abs().max()) if close else 0.0
                )
                assert entry.stored is not None
                stored = entry.stored[rows]
                assert not isinstance(stored, torch.Tensor)
                for columns in (slice(None), slice(0, 32), slice(32, 64), slice(8, 24)):
                    part = stored.columns(columns)
                    plain = part if isinstance(part, torch.Tensor) else part.dequantize()
                    torch.testing.assert_close(plain, entry.values[rows][:, columns], rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_billed_for_what_tensors_hold(tmp_path: Path, name: str) -> None:
    _, meant = write(tmp_path, FORMATS[name])
    files = ModelFiles(model_id="tiny", folder=str(tmp_path), weights=[str(tmp_path / "model.safetensors")])
    headers = read_headers(files)
    scheme = check(read_config(str(tmp_path))).scheme
    assert scheme is not None
    held = scheme.held(headers)
    assert sum(each.numbers for each in held.values()) == sum(values.numel() for values in meant.values())
    per_number = {each.width for each in held.values() if each.numbers}
    assert all(width is not None and 0.5 < width <= 1.5 for width in per_number)
    plain = sum(tensor.numel() for tensor in load_file(tmp_path / "plain" / "model.safetensors").values())
    assert plain <= elements(files, scheme) < 1.01 * plain


def same_logits(folder: Path, plain: Path, *, rounded: bool = False) -> None:
    """By torch and by our kernels, in one rank and in two. ``rounded``: these round activations to 8 bits; a token may
    go to other experts."""
    ids = tokens(20)
    theirs = reference_logits(reference(plain), ids)
    assert theirs.std() > 0.3, "logits this flat would hide a mistake"
    assert (logits(load(folder), ids) - theirs).abs().max() < 1e-4
    if library() is not None:
        for ours in logits(load(folder, quantize="stored"), ids), rank_logits(folder, 2, ids, quantize="stored"):
            errors = (ours - theirs).std(-1) / theirs.std()
            assert errors.median() < 0.04 if rounded else errors.max() < 1e-4


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        ("fp8 tensor", False),
        ("fp8 blocks that don't divide", False),
        ("modelopt nvfp4", False),
        ("w4a16", True),
        ("w4a16 asymmetric, ordered", True),
        ("w2a16", True),
        ("w8a8", True),
        ("compressed mxfp4", False),
        ("nf4 nested", False),
        ("int8", True),
    ],
)
def test_models_are_what_their_weights_mean(tmp_path: Path, name: str, rounded: bool) -> None:
    """Of q, k and v that are one product here, each has scales of its own."""
    plain, _ = write(tmp_path, FORMATS[name])
    same_logits(tmp_path, plain, rounded=rounded)


def test_a_tied_head_and_a_quantized_one(tmp_path: Path) -> None:
    for folder, tied in ((tmp_path / "tied", True), (tmp_path / "own", False)):
        write_model(folder, "llama", tie_word_embeddings=tied)
        form = replace(FORMATS["fp8 blocks"], config=dict(FORMATS["fp8 blocks"].config))
        plain, _ = requantize(folder, form, lambda name: name.endswith(("_proj.weight", "lm_head.weight")))
        same_logits(folder, plain)


MIXTRAL: dict[str, Any] = {
    "vocab_size": 431,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "pad_token_id": 0,
}
DEEPSEEK: dict[str, Any] = MIXTRAL | {
    "num_local_experts": None,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 24,
}
_PLAIN = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "norm.weight")


@pytest.mark.parametrize("name", ["fp8 blocks", "compressed nvfp4", "nf4", "w4a16"])
def test_experts(tmp_path: Path, name: str) -> None:
    write_reference(tmp_path, "mixtral", **MIXTRAL)
    plain, meant = requantize(tmp_path, FORMATS[name], lambda key: key.endswith(".weight") and not key.endswith(_PLAIN))
    assert sum("experts.3" in key for key in meant) == 2 * 3
    same_logits(tmp_path, plain, rounded=name == "w4a16")


def test_stacks_of_experts(tmp_path: Path) -> None:
    """All experts' matrices are one tensor, whose scales are another."""
    config = {key: value for key, value in MIXTRAL.items() if key != "sliding_window"}
    write_reference(tmp_path, "granitemoe", **config)
    one = FORMATS["fp8 blocks"].writer

    def writer(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if weight.dim() == 2:
            return one(weight)
        parts = [one(matrix) for matrix in weight]
        stacked = {key: torch.stack([tensors[key] for tensors, _ in parts]) for key in parts[0][0]}
        return stacked, torch.stack([values for _, values in parts])

    form = Format(writer, FORMATS["fp8 blocks"].config)
    plain, meant = requantize(tmp_path, form, lambda key: key.endswith("_linear.weight"))
    assert len(meant) == 2 * 2
    same_logits(tmp_path, plain)


@pytest.mark.parametrize("name", ["fp8 blocks", "w8a8"])
def test_latent_keys(tmp_path: Path, name: str) -> None:
    """DeepSeek's own format: what makes keys and values of the latent vector is cut by head, across blocks."""
    write_reference(tmp_path, "deepseek_v3", **{key: value for key, value in DEEPSEEK.items() if value is not None})
    plain, meant = requantize(tmp_path, FORMATS[name], lambda key: key.endswith(".weight") and not key.endswith(_PLAIN))
    assert any("kv_b_proj" in key for key in meant) and not any("norm" in key for key in meant)
    same_logits(tmp_path, plain, rounded=name == "w8a8")


def test_blocks_of_gpt_oss() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 40, 2), dtype=torch.uint8)
    stored = {
        f"mlp.experts.down_proj_{name}": Entry(Path("file"), tuple(tensor.shape), tensor.numel(), "U8", tensor)
        for name, tensor in (("blocks", blocks), ("scales", scales))
    }
    ((name, entry),) = unpack(stored, Fp4(method="mxfp4", group=32)).items()
    assert name == "mlp.experts.down_proj" and entry.shape == (3, 40, 64)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(entry.values[:], theirs.flatten(0, 1))
    assert torch.equal(entry.values[45:50], theirs[1, 5:10])


@native
@pytest.mark.parametrize(
    ("name", "most"),
    [("fp8", 0.03), ("bitsandbytes", 0.01), ("bitsandbytes-nf4", 0.1), ("bitsandbytes-fp4", 0.13)],
)
def test_rounding_at_load(tmp_path: Path, name: str, most: float) -> None:
    """The vocabulary's matrices stay as they are."""
    folder = write_model(tmp_path, "llama", intermediate_size=96)

    def writer(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = ROUNDING[name](weight)
        assert rounded is not None
        values = rounded.dequantize()
        assert most / 2 < (values - weight).norm() / weight.norm() < most
        return {"weight": weight}, values

    plain, _ = requantize(folder, Format(writer, {}), lambda key: key.endswith("_proj.weight"))
    (folder / "config.json").write_text((plain / "config.json").read_text())
    ids = tokens(20)
    theirs = reference_logits(reference(plain), ids)
    error = (logits(load(folder, quantize=name), ids) - theirs).std() / theirs.std()
    assert error < (0.05 if name == "bitsandbytes" else 1e-4)


def changed(name: str, key: str, value: Any) -> dict[str, Any]:
    """A format's config with another value at the place ``key``."""
    config: dict[str, Any] = json.loads(json.dumps(FORMATS[name].config))
    place = config
    *path, last = key.split("/")
    for part in path:
        place = place[part]
    place[last] = value
    return config


_WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    ("name", "key", "value", "text"),
    [
        ("fp8 blocks", "activation_scheme", "lazy", "activation_scheme: 'lazy'"),
        ("fp8 blocks", "weight_block_size", [128], "weight_block_size"),
        ("fp8 blocks", "expert_dtype", "fp4", "expert_dtype: 'fp4'"),
        ("modelopt fp8", "quant_algo", "W4A8_AWQ", "quant_algo: 'W4A8_AWQ'"),
        ("quark fp8", "global_quant_config/weight/dtype", "int4", "global_quant_config: weights of dtype 'int4'"),
        ("quark mxfp4", "global_quant_config/weight/scale_format", "float", "scale_format: 'float'"),
        ("quark fp8", "layer_quant_config", {"*up": {"weight": {"dtype": "fp4"}}}, "layer_quant_config.*'\\*up'"),
        ("quark fp8", "export/weight_format", "fake_quantized", "weight_format: 'fake_quantized'"),
        ("nf4", "load_in_8bit", True, "load_in_8bit"),
        ("nf4", "bnb_4bit_quant_type", "int4", "bnb_4bit_quant_type: 'int4'"),
        ("w4a16", "quantization_status", "calibration", "quantization_status: 'calibration'"),
        ("w4a16", "format", "mxfp6-pack-quantized", "format: 'mxfp6-pack-quantized'"),
        ("w4a16", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
        ("w4a16", "transform_config", {"config_groups": {"R1": {}}}, "transform_config"),
        ("w4a16", f"{_WEIGHTS}/num_bits", 3, "num_bits: 3"),
        ("w4a16", f"{_WEIGHTS}/type", "float", "type: 'float'"),
        ("w4a16", f"{_WEIGHTS}/strategy", "block", "strategy: 'block'"),
        ("w4a16", f"{_WEIGHTS}/group_size", None, "group_size: None"),
        ("w4a16", "config_groups/group_0/targets", ["LlamaAttention"], "'LlamaAttention'"),
        ("w4a16", "config_groups/group_0/targets", ["re:("], r"targets: '\('"),
        ("compressed fp8 blocks", f"{_WEIGHTS}/block_structure", [32], "block_structure"),
        ("compressed nvfp4", f"{_WEIGHTS}/group_size", 32, "group_size: 32"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, name: str, key: str, value: Any, text: str) -> None:
    raw = read_config(str(write_model(tmp_path, "llama")))
    with pytest.raises(StartupError, match=text):
        check({**raw, "quantization_config": changed(name, key, value)})


def test_who_wants_activations_in_float8() -> None:
    wants = {
        name
        for name, form in FORMATS.items()
        if (scheme := read_scheme({"quantization_config": form.config})) and scheme.rounds
    }
    assert {"fp8 tensor", "fbgemm_fp8", "modelopt fp8"} <= wants
    assert not {"w4a16", "compressed fp8 blocks", "nf4", "quark mxfp4"} & wants
    with_activations = changed("compressed fp8 blocks", "config_groups/group_0/input_activations", {"num_bits": 8})
    scheme = read_scheme({"quantization_config": with_activations})
    assert scheme is not None and scheme.rounds


_MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "part", "tensor", "text"),
    [
        ("fp8 tensor", "weight_scale", None, "up_proj.weight_scale is missing"),
        (
            "fp8 blocks",
            "weight_scale_inv",
            torch.ones(3, 3),
            r"has shape \(3, 3\), fp8 with blocks of 32 by 32 implies \(3, 2\)",
        ),
        ("fbgemm_fp8", "weight_scale", torch.ones(95, 1), r"has shape \(95, 1\)"),
        ("fp8 blocks", "weight_scale_inv", torch.ones(3, 2, dtype=torch.int32), "type I32"),
        ("modelopt nvfp4", "weight_scale_2", None, "weight_scale_2 is missing"),
        ("w4a16", "weight_scale", torch.ones(96, 1, dtype=torch.bfloat16), r"has shape \(96, 1\)"),
        ("w4a16", "weight_packed", torch.zeros(96, 7, dtype=torch.int32), r"has shape \(96, 2\).* implies \(96, 1\)"),
        ("w4a16", "weight_shape", torch.tensor([96, 40]), r"weight_shape is \(96, 40\)"),
        ("w4a16 asymmetric", "weight_zero_point", None, "weight_zero_point is missing"),
        ("w8a8", "weight", torch.zeros(96, 64), "up_proj.weight has type F32, int-quantized implies I8"),
        ("nf4", "weight.absmax", torch.ones(95), r"has shape \(95,\)"),
        ("nf4", "weight", torch.zeros(96, 1, dtype=torch.uint8), r"absmax has shape \(96,\)"),
        (
            "nf4",
            "weight.quant_state.bitsandbytes__nf4",
            torch.zeros(3, dtype=torch.uint8),
            "is no description of a matrix",
        ),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", None, "quant_state.bitsandbytes__nf4 is missing"),
        ("int8", "SCB", None, "up_proj.SCB is missing"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, part: str, tensor: torch.Tensor | None, text: str) -> None:
    write(tmp_path, FORMATS[name])
    (path,) = tmp_path.glob("*.safetensors")
    stored = load_file(path)
    key = f"{_MODULE}.{part}"
    assert key in stored
    if tensor is None:
        del stored[key]
    else:
        stored[key] = tensor
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(StartupError, match=text), entries(tmp_path):
        pass


def test_modules_by_name_and_by_pattern(tmp_path: Path) -> None:
    """The most specific target decides; what is left out and yet quantized is a contradiction. In older files the
    config has another name."""
    config = changed("w8a8", "config_groups/group_0/targets", ["re:.*self_attn.*"])
    other = dict(config["config_groups"]["group_0"]) | {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "strategy": "channel"},
    }
    config["config_groups"] = {"group_1": other | {"format": "pack-quantized"}, **config["config_groups"]}
    del config["quant_method"]
    raw = read_config(str(write_model(tmp_path, "llama")))
    scheme = check({**raw, "compression_config": config}).scheme
    assert scheme is not None
    found = [scheme.group(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.up_proj")]  # type: ignore[attr-defined]  # it is CompressedTensors
    assert [group.format for group in found] == ["int-quantized", "pack-quantized"]
    assert scheme.group("lm_head") is None  # type: ignore[attr-defined]
    write(tmp_path / "other", Format(FORMATS["w8a8"].writer, FORMATS["w8a8"].config | {"ignore": [_MODULE]}))
    with pytest.raises(StartupError, match=f"{_MODULE}.weight_scale quantizes a module"), entries(tmp_path / "other"):
        pass


def test_scales_of_the_cache_are_left_to_attention(tmp_path: Path) -> None:
    form = FORMATS["compressed fp8"]
    write(tmp_path, replace(form, beside={"k_scale": torch.tensor([0.5])}))
    with entries(tmp_path) as found:
        assert {name.rpartition(".")[2] for name in found if "scale" in name} == {"k_scale"}
