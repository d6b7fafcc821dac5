"""PEFT adapters served as models: our logits are those of peft, which also makes the adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.parity.conftest import logits, reference_logits, tokens, write_reference
from tests.parity.test_more import _GPT, _SIZES
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.launcher.download import Store, resolve_description, resolve_model
from tgi.launcher.fit import elements
from tgi.models.registry import load_model
from tgi.quantization import packed

LLAMA = _SIZES | {"num_key_value_heads": 2}
TIED = LLAMA | {"tie_word_embeddings": True}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:fan_in_fan_out is set to",
)

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("llama", LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "all": ("llama", LLAMA, {"target_modules": "all-linear", "lora_alpha": 3}),
    "rslora": ("llama", LLAMA, {"target_modules": ["o_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        LLAMA,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "k_proj": 2},
            "rank_pattern": {"up_proj": 2, r"model\.layers\.\d\.self_attn\.k_proj": 6},
        },
    ),
    "embedding": ("llama", LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole": ("llama", LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "biases": ("llama", LLAMA | {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "own-biases": ("llama", LLAMA | {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tied": ("llama", TIED, {"target_modules": ["q_proj"]}),
    "untied": ("llama", TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "untied-head": ("llama", TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "conv1d": ("gpt2", _GPT, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-untold": ("gpt2", _GPT, {"target_modules": ["c_proj", "lm_head"]}),
}


def write_adapter(folder: Path, base: Path, *, safetensors: bool = True, **lora: Any) -> Path:
    """An adapter of peft's own making, with random numbers where training would begin with zeros."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = get_peft_model(model, LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | lora)))
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    adapter.save_pretrained(folder, safe_serialization=safetensors)
    return folder


def write_base(folder: Path, family: str, config: dict[str, Any]) -> Path:
    write_reference(folder, family, **config)
    (folder / "tokenizer.json").write_text("base")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", "llama", LLAMA)


def resolve(folder: Path) -> ModelFiles:
    return resolve_model(str(folder), None, Store(folder.parent / "cache"))


def ours(files: ModelFiles, **options: Any) -> torch.Tensor:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "progress": lambda done, total: None} | options
    return logits(load_model(files, **options), tokens(30))


def theirs(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return reference_logits(PeftModel.from_pretrained(model, adapter).eval(), tokens(30))


@pytest.mark.parametrize(("family", "config", "lora"), VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_peft(tmp_path: Path, family: str, config: dict[str, Any], lora: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", family, config)
    adapter = write_adapter(tmp_path / "adapter", base, **lora)
    expected = theirs(base, adapter)
    files = resolve(adapter)
    assert (ours(files) - expected).abs().max() < 1e-3 * expected.std()
    unchanged = resolve_model(str(base), None, Store(tmp_path))
    assert (ours(unchanged) - expected).abs().max() > 0.1 * expected.std(), "an adapter of no effect hides mistakes"


def test_pickled_adapters(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    expected = ours(resolve(adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(ours(resolve(adapter)), expected)


def test_what_is_counted(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", TIED)
    plain = elements(resolve_model(str(base), None, Store(tmp_path)))
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert elements(resolve(adapter)) == plain + 431 * 64, "the head that was tied"


def test_a_pack_is_of_base_and_adapter(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_WORTH", 0)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    options = {"dtype": torch.bfloat16, "quantize": "int8", "packed": tmp_path / "packed"}
    plain = ours(resolve_model(str(base), None, Store(tmp_path)), **options)
    first = ours(resolve(adapter), **options)
    assert torch.equal(ours(resolve(adapter), **options), first), "from the pack"
    assert not torch.equal(first, plain)
    stronger = json.loads((adapter / "adapter_config.json").read_bytes()) | {"lora_alpha": 64}
    (adapter / "adapter_config.json").write_text(json.dumps(stronger))
    assert not torch.equal(ours(resolve(adapter), **options), first)


def test_the_folder_joins_what_both_say(tmp_path: Path, base: Path) -> None:
    (base / "chat_template.jinja").write_text("base")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    files = resolve(adapter)
    assert files.model_id == str(adapter) and files.weights == [str(base / "model.safetensors")]
    assert files.adapter == [str(adapter / "adapter_config.json"), str(adapter / "adapter_model.safetensors")]
    folder = Path(files.folder)
    assert json.loads((folder / "config.json").read_bytes()) == json.loads((base / "config.json").read_bytes())
    assert (folder / "tokenizer.json").read_text() == (folder / "chat_template.jinja").read_text() == "base"
    assert resolve_description(str(adapter), None, Store(tmp_path / "cache")) == folder
    (adapter / "tokenizer.json").write_text("own")
    folder = Path(resolve(adapter).folder)
    assert (folder / "tokenizer.json").read_text() == "own"
    assert not (folder / "chat_template.jinja").exists(), "the base's belongs to the base's tokenizer"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts"]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("some_variant_to_come", {"a": 1}),
        ("lora_alpha", "strong"),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"q_proj": None}),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", "./nowhere"),
        ("revision", 3),
    ],
)
def test_refused_by_name(tmp_path: Path, base: Path, key: str, value: object) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))
    with pytest.raises(StartupError) as caught:
        resolve(adapter)
    assert str(path) in str(caught.value) and key in str(caught.value)


def test_an_adapter_of_an_adapter(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    shutil.copytree(adapter, tmp_path / "second")
    path = tmp_path / "second" / "adapter_config.json"
    raw = json.loads(path.read_bytes())
    path.write_text(json.dumps(raw | {"base_model_name_or_path": str(adapter)}))
    with pytest.raises(StartupError, match=f"base_model_name_or_path: {adapter}: an adapter itself"):
        resolve(tmp_path / "second")


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({f"{_Q}.lora_A.weight": torch.ones(4, 65)}, r"layers.0.self_attn.q_proj.weight: \(64, 4\) · \(4, 65\)"),
        ({f"{_Q}.lora_A.weight": torch.ones(())}, r"q_proj.weight: \(64, 4\) · \(\)"),
        ({f"{_Q}.lora_A.weight": None}, "expected one A and one B of LoRA, got B"),
        ({f"{_Q}.lora_embedding_A": torch.ones(4, 64)}, "got A, B, embedding_A|got embedding_A, A, B"),
        ({f"{_Q}.lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector is not implemented"),
        ({f"{_Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias is not implemented"),
        ({"model.norm.weight": torch.ones(64)}, "model.norm.weight does not begin with base_model.model"),
        ({"base_model.model.model.norms.weight": torch.ones(64)}, "model.norms.weight is not used"),
        ({"base_model.model.model.norm.weight": torch.ones(65)}, r"model.norm.weight has shape \(65,\)"),
        (
            {f"{_Q}s.lora_{part}.weight": torch.ones(64, 64) for part in "AB"},
            "q_projs.weight, which the base model does not have",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, base: Path, change: dict[str, torch.Tensor | None], text: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in (load_file(path) | change).items() if t is not None}, path)
    with pytest.raises(StartupError, match=rf"adapter_model\.safetensors: .*({text})"):
        ours(resolve(adapter))


@pytest.mark.parametrize("lora", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_half_of_what_is_tied(tmp_path: Path, lora: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", "llama", TIED)
    adapter = write_adapter(tmp_path / "adapter", base, **({"target_modules": ["q_proj"]} | lora))
    with pytest.raises(StartupError, match=r"adapter_model\.safetensors: changes tensor model\.embed_tokens\.weight"):
        ours(resolve(adapter))


def test_an_adapter_without_weights(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"adapter_config\.json without adapter_model\.safetensors"):
        resolve(adapter)
