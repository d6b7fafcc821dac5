"""Configs are read strictly: what would change the maths and is not implemented stops the start by name."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import FAMILIES, write_model
from tgi.core.errors import StartupError
from tgi.core.model_config import Experts, ModelShape, Raw, Routing, read_config, read_rope
from tgi.models.config import Family
from tgi.models.registry import ARCHITECTURES, check, document

MADE = {
    "ArceeForCausalLM",
    "BloomForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "DbrxForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GlmForCausalLM",
    "GraniteMoeForCausalLM",
    "HeliumForCausalLM",
    "MixtralForCausalLM",
    "MptForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "OlmoeForCausalLM",
    "PhiForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
}
"""Those of tests/parity/test_more.py."""
RENAMED = {"BaichuanForCausalLM", "GPT2LMHeadCustomModel", "MixFormerSequentialForCausalLM"}
"""Those of tests/parity/test_renamed.py."""
OLD_NAMES = {"RWForCausalLM", "MPTForCausalLM", "BaiChuanForCausalLM"}


@pytest.fixture(scope="module")
def raws(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Raw]:
    folder = tmp_path_factory.mktemp("configs")
    return {family: read_config(write_model(folder / family, family)) for family in FAMILIES}


def test_every_row_is_tested(raws: dict[str, Raw]):
    """Here, or against models of transformers' own making."""
    here = {raw["architectures"][0] for raw in raws.values()}
    assert here | MADE | RENAMED | OLD_NAMES == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "architectures", []),
        ("llama", "architectures", ["LlamaForCausalLM", "Other"]),
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "hidden_size", "64"),
        ("llama", "hidden_size", True),
        ("llama", "num_hidden_layers", 0),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_attention_heads", 6),
        ("llama", "rms_norm_eps", "small"),
        ("llama", "attention_bias", "yes"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "sliding_window", 128),
        ("llama", "quantization_config", {"quant_method": "quip"}),
        ("llama", "rope_interleaved", True),
        ("llama", "rope_scaling", {"type": "mrope", "mrope_section": [2, 3, 3]}),
        ("llama", "rope_scaling", {"type": "linear"}),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": 1000}),
        ("llama", "rope_scaling", {"type": "linear", "factor": "2"}),
        ("llama", "rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("llama", "embedding_multiplier", 2.0),
        ("llama", "num_local_experts", 8),
        ("mistral", "sliding_window", -1),
        ("mistral", "attention_bias", True),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["full_attention", "linear_attention", "full_attention"]),
        ("qwen3", "attention_bias", 1),
        ("phi3", "attention_bias", True),
        ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1], "long_factor": "x"}),
        ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 8}),
        ("llama", "head_dim", 15),
        ("llama", "rms_norm_eps", None),
        ("qwen2", "max_window_layers", "2"),
        ("granite", "logits_scaling", 0),
        ("granite", "residual_multiplier", "often"),
    ],
)
def test_refused_by_name(raws: dict[str, Raw], family: str, key: str, value: Any):
    raw = {**raws[family], "use_sliding_window": True} if family == "qwen2" else raws[family]
    with pytest.raises(StartupError, match=key.replace("rope_scaling", "(rope_scaling|factor)")):
        check({**raw, key: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("GPT2LMHeadModel", {"scale_attn_weights": False}),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
        ("GPTJForCausalLM", {"rotary": False}),
        ("GPT2LMHeadCustomModel", {"attention_head_type": "multihead"}),
        ("OPTForCausalLM", {"do_layer_norm_before": "no"}),
        ("OPTForCausalLM", {"word_embed_proj_dim": 0}),
        ("MptForCausalLM", {"norm_type": "rmsnorm"}),
        ("MptForCausalLM", {"no_bias": False}),
        ("MptForCausalLM", {"attn_config": {"qk_ln": True}}),
        ("CohereForCausalLM", {"sliding_window": 9}),
        ("Cohere2ForCausalLM", {"use_qk_norm": True}),
        ("PhiForCausalLM", {"qk_layernorm": 1}),
        ("OlmoForCausalLM", {"clip_qkv": -1.0}),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}),
        ("Olmo2ForCausalLM", {"sliding_window": 9}),
        ("Olmo3ForCausalLM", {"sliding_window": None}),
        ("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG"}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}),
        ("ArceeForCausalLM", {"mlp_bias": "yes"}),
        ("SeedOssForCausalLM", {"sliding_window": 9}),
        ("Ernie4_5ForCausalLM", {"partial_rotary_factor": 0.5}),
        ("HeliumForCausalLM", {"use_qk_norm": True}),
        ("GlmForCausalLM", {"mlp_bias": True}),
        ("NemotronForCausalLM", {"qk_layernorm": True}),
        ("BaichuanForCausalLM", {"attention_bias": True}),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": "none"}),
        ("Qwen2MoeForCausalLM", {"num_experts_per_tok": 5}),
        ("PhimoeForCausalLM", {"num_experts_per_tok": 3}),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}),
        ("Glm4MoeForCausalLM", {"topk_method": "greedy"}),
        ("DbrxForCausalLM", {"attn_config": 3}),
        ("DbrxForCausalLM", {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}}),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}),
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}),
        ("DeepseekV3ForCausalLM", {"n_group": 3}),
        ("DeepseekV3ForCausalLM", {"first_k_dense_replace": -1}),
    ],
)
def test_more_refused_by_name(name: str, values: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    if name.startswith("GPT"):
        sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 8}
    if name.startswith("Mpt"):
        sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
    raw = {"architectures": [name], "vocab_size": 100, "max_position_embeddings": 128, "sliding_window": None, **sizes}
    raw |= {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-5}
    if name.startswith("Qwen2Moe"):
        raw |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if name.startswith(("Deepseek", "Glm4Moe")):
        raw |= {"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if name.startswith(("Olmo3", "Exaone")):
        raw["sliding_window"] = 9
    if name == "GPT2LMHeadCustomModel":
        raw["attention_head_type"] = "multiquery"
    check(raw)
    (key,) = values
    with pytest.raises(StartupError, match=key):
        check({**raw, **values})


@pytest.mark.parametrize(
    ("key", "routing"),
    [
        ("num_experts_per_tok", {"per_token": 13}),
        ("num_experts_per_tok", {"groups": 4, "groups_per_token": 2, "per_token": 7}),
        ("topk_group", {"groups": 4, "groups_per_token": 5}),
        ("n_group", {"groups": 5}),
        ("n_group", {"groups": 12, "group_best": 2}),
    ],
)
def test_fewer_experts_than_are_asked_for(key: str, routing: dict[str, Any]) -> None:
    def family(**routing: Any) -> Family:
        way = Routing(**{"per_token": 2} | routing)
        experts = Experts(block="mlp", count=12, intermediate=32, routing=way, layers=(True, True))
        return Family(lambda raw, shape: {"experts": experts}, frozenset())

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    raw = sizes | {"architectures": ["Some"], "vocab_size": 9, "max_position_embeddings": 8, "rms_norm_eps": 1e-5}
    family(groups=4, groups_per_token=2, per_token=6).read(raw)
    with pytest.raises(StartupError, match=key):
        family(**routing).read(raw)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_a_missing_size(raws: dict[str, Raw], key: str):
    with pytest.raises(StartupError, match=f"{key} is missing"):
        check({k: v for k, v in raws["llama"].items() if k != key})


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_keys_change_nothing_and_say_nothing(
    raws: dict[str, Raw], family: str, caplog: pytest.LogCaptureFixture
):
    extra = {"attention_dropout": 0.1, "transformers_version": "5.0", "temperature": 0.3, "mlp_bias": None}
    extra |= {"quantization_config": None, "auto_map": {"AutoConfig": "x"}, "rope_interleaved": False}
    assert check({**raws[family], **extra}) == check(raws[family])
    assert not caplog.records


def test_an_unknown_key_is_named_once(raws: dict[str, Raw], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        check({**raws["llama"], "hyper_connections": 4})
    (record,) = caplog.records
    assert "hyper_connections" in record.getMessage()


def test_both_spellings_of_rope_are_one(raws: dict[str, Raw]):
    raw = {key: value for key, value in raws["llama"].items() if key != "rope_theta"}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    old = {**raw, "rope_theta": 5e5, "rope_scaling": {"type": "yarn"} | {k: scaling[k] for k in list(scaling)[1:]}}
    new = {**raw, "rope_parameters": scaling | {"rope_theta": 5e5}}
    assert read_rope(old) == read_rope(new)
    assert read_rope(new).theta == 5e5


def test_the_operators_override(raws: dict[str, Raw]):
    raw = raws["llama"]
    assert replace(read_rope(raw, factor=2.0), type="default", factor=1.0) == read_rope(raw)
    assert read_rope(raw, factor=2.0).type == "linear"
    assert read_rope(raw, scaling="dynamic").factor == 1.0
    with pytest.raises(StartupError, match="--rope-scaling"):
        read_rope(raw, scaling="yarn")


@pytest.mark.parametrize(
    ("rope", "override", "reach"),
    [
        (None, {}, 512),
        ({"type": "linear", "factor": 4.0}, {}, 512),
        ({"type": "dynamic", "factor": 4.0}, {}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, {}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, {}, 512),
        (None, {"rope_factor": 2.0}, 1024),
        (None, {"rope_scaling": "dynamic", "rope_factor": 1.5}, 768),
        (None, {"rope_scaling": "linear"}, 512),
    ],
)
def test_what_a_request_may_total(raws: dict[str, Raw], rope: Any, override: dict[str, Any], reach: int):
    raw = {**raws["llama"], "rope_scaling": rope}
    assert ModelShape.read(raw, **override).max_position_embeddings == reach


def test_windows_that_are_left_out_and_windows_of_null(raws: dict[str, Raw]):
    raw = {key: value for key, value in raws["mistral"].items() if key != "sliding_window"}
    assert check(raw).windows == (4096,) * 3
    assert check({**raw, "sliding_window": None}).windows == (None,) * 3


def test_windows_by_layer(raws: dict[str, Raw]):
    raw = {**raws["qwen2"], "sliding_window": 9, "max_window_layers": 2}
    assert check(raw).windows == (None, None, None)
    assert check({**raw, "use_sliding_window": True}).windows == (None, None, 9)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert check({**raw, "use_sliding_window": True, "layer_types": types}).windows == (9, None, 9)
    assert check({**raw, "layer_types": types}).windows == (None, None, None)


def test_layers_that_rotate_otherwise_or_not_at_all() -> None:
    """As the hub's files say it; transformers writes another spelling, which tests/parity reads."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96}
    raw = sizes | {"vocab_size": 100, "max_position_embeddings": 512, "sliding_window": 9, "rope_theta": 5e5}
    raw |= {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    olmo = check(raw | {"architectures": ["Olmo3ForCausalLM"], "rope_scaling": yarn})
    assert [(rope.type, rope.theta) for rope in olmo.ropes if rope] == [("default", 5e5)] * 3 + [("yarn", 5e5)]
    cohere = check(raw | {"architectures": ["Cohere2ForCausalLM"]})
    assert cohere.ropes == (cohere.rope,) * 3 + (None,)
    exaone = check(raw | {"architectures": ["Exaone4ForCausalLM"], "sliding_window": None})
    assert exaone.ropes == (exaone.rope,) * 4
    smol = check(raw | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1, 1]})
    assert (smol.ropes, smol.windows) == ((smol.rope, None, smol.rope, smol.rope), (None,) * 4)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_config_that_is_none(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(StartupError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path):
    with pytest.raises(StartupError, match=r"config\.json"):
        read_config(tmp_path)


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == document(), "run: python -m tgi.models.registry > docs/models.md"


def test_checking_imports_no_torch(tmp_path: Path):
    folder = write_model(tmp_path, "llama")
    code = "import sys, tgi.models.registry as r, tgi.core.model_config as m; r.check(m.read_config(sys.argv[1])); "
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert json.loads((folder / "config.json").read_bytes())["architectures"] == ["LlamaForCausalLM"]
