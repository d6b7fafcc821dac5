"""Models without a row of ours: transformers' own modules behind our scheduler, with our attention or their cache."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.parity.conftest import DEVICES, Engine, load, logits, reference, reference_logits, tokens, write_reference
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.messages import Sampling, Submit
from tgi.core.model_config import read_config
from tgi.engine.scheduler import Plan
from tgi.kernels.library import library
from tgi.models import hf, registry
from tgi.models.registry import check

_SIZES: dict[str, Any] = {
    "vocab_size": 431,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

PAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {}),
    "arcee": ("arcee", {"head_dim": 24}),
    "nemotron": ("nemotron", {}),
    "glm4": ("glm4", {"head_dim": 16}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "persimmon": ("persimmon", {"num_key_value_heads": 4}),
    "cohere2": ("cohere2", {"sliding_window": 9, "logit_scale": 1.0}),
    "gemma2": ("gemma2", {"head_dim": 24, "sliding_window": 9, "attn_logit_softcapping": 2.0}),
    "phi3-packed": ("phi3", {}),
    "latent": ("deepseek_v3", _LATENT | _ROUTED),
    "experts": ("qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    "sinks": ("gpt_oss", {**_EXPERTS, "head_dim": 16, "sliding_window": 9}),
}
"""Take our attention."""

OWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "convolutions": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        "change by",
    ),
    "chunks": ("llama4_text", {**_EXPERTS, "head_dim": 16, "attention_chunk_size": 8}, "neither causal nor a window"),
    "linear-attention": ("qwen3_next", {**_EXPERTS, "head_dim": 16}, "change by"),
    "no-registry": ("xglm", {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96}, "registry"),
    "no-cache": ("openai-gpt", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}, "registry"),
}
"""Don't, for a reason."""


@pytest.fixture(autouse=True)
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets a row of its own one day is still a model that the tail must be able to serve."""
    monkeypatch.setattr(registry, "ARCHITECTURES", {})


def write(folder: Path, family: str, config: dict[str, Any]) -> Path:
    own = {key: value for key, value in _SIZES.items() if not {"n_embd", "d_model"} & set(config) or "size" not in key}
    return write_reference(folder, family, **own | {"vocab_size": 431} | config)


@pytest.fixture(params=[*PAGED.values(), *(row[:2] for row in OWN.values())], ids=[*PAGED, *OWN])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, *request.param)


def ask(number: int, ids: list[int], new: int = 12) -> Submit:
    return Submit(number, ids, len(ids), new, [], Sampling(), 0.0, prompt_logprobs=True)


def worst(engine: Engine, theirs: torch.nn.Module, submit: Submit) -> float:
    """The largest difference between a request's log-probabilities and the reference's."""
    deltas = engine.deltas[submit.id]
    drawn = [token for delta in deltas for token in delta.tokens]
    assert len(drawn) == submit.max_new_tokens
    ids = submit.token_ids + [token.id for token in drawn]
    scores = [*(token.logprob for delta in deltas for token in delta.prompt), *(token.logprob for token in drawn)]
    rows = reference_logits(theirs, torch.tensor(ids))[:-1].log_softmax(-1)
    assert rows.std() > 0.3, "logits this flat would hide a mistake"
    expected = rows.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float((torch.tensor(scores) - expected).abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_in_chunks_in_a_batch_and_preempted(made: Path, device: str) -> None:
    engine, theirs = Engine(made, device, blocks=8, step_tokens=24), reference(made)
    submits = [ask(number, tokens(length, seed=number).tolist()) for number, length in enumerate((70, 33))]
    engine.run(*submits)
    assert engine.preempted and not engine.faults
    assert max(worst(engine, theirs, submit) for submit in submits) < 1e-4


def test_a_known_prefix(made: Path) -> None:
    """Its pages are there; where they hold nothing, what they stand for is computed again."""
    engine, theirs = Engine(made), reference(made)
    ids = tokens(50).tolist()
    for number, prompt in enumerate((ids, ids[:40] + tokens(7, seed=1).tolist())):
        engine.run(Submit(number, prompt, len(prompt), 12, [], Sampling(), 0.0))
    assert engine.deltas[1][0].cached == 32
    for number, prompt in enumerate((ids, ids[:40] + tokens(7, seed=1).tolist())):
        text = engine.text(number)
        rows = reference_logits(theirs, torch.tensor(prompt + text))[len(prompt) - 1 : -1]
        assert rows.argmax(-1).tolist() == text


@pytest.mark.parametrize("name", PAGED)
def test_our_attention_is_taken(tmp_path: Path, name: str) -> None:
    model = load(write(tmp_path, *PAGED[name]))
    assert isinstance(model, hf.Paged) and len(model.specs) == 4
    assert model.description.endswith("paged attention")
    if name == "gemma2":
        assert [(spec.window, spec.softcap) for spec in model.specs] == [(9, 2.0), (None, 2.0)] * 2


@pytest.mark.parametrize("name", OWN)
def test_our_attention_is_declined_for_a_reason(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    family, config, reason = OWN[name]
    caplog.set_level("INFO", "tgi.models.registry")
    model = load(write(tmp_path, family, config))
    assert isinstance(model, hf.Caching) and not model.specs
    (line,) = (record.getMessage() for record in caplog.records)
    assert "a cache of its own" in line and reason in line


def test_who_waits_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted request would hold memory that the pool doesn't know of."""
    engine = Engine(write(tmp_path, *OWN["chunks"][:2]), blocks=8, step_tokens=24)
    schedule = engine.scheduler.schedule

    def checked() -> Plan:
        plan = schedule()
        assert not any(request.scratch for request in engine.scheduler.waiting)
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", checked)
    engine.run(*(ask(number, tokens(length, seed=number).tolist()) for number, length in enumerate((70, 33))))
    assert engine.preempted


@pytest.mark.skipif(library() is None, reason="needs the native kernels")
@pytest.mark.parametrize(("quantize", "close"), [(None, 0.03), ("int8", 0.06), ("int4", 0.4)])
def test_linear_layers_are_ours(tmp_path: Path, quantize: str | None, close: float) -> None:
    """All that the plan names; activations are float32 then."""
    folder = write(tmp_path, *PAGED["arcee"])
    model = load(folder, dtype=torch.bfloat16, quantize=quantize)
    assert "24 of 24 linear layers" in model.description
    found, expected = logits(model, tokens(40)), reference_logits(reference(folder), tokens(40))
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < close


def test_what_no_plan_names_is_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--quantize int8.*no tensor-parallel plan"):
        load(write(tmp_path, *PAGED["persimmon"]), quantize="int8")


@pytest.mark.parametrize("name", ["experts", "latent", "gemma2"])
def test_low_precision_changes_no_verdict(tmp_path: Path, name: str) -> None:
    """Which experts are chosen may depend on rounding; what is compared at load may not."""
    model = load(write(tmp_path, *PAGED[name]), dtype=torch.bfloat16)
    assert isinstance(model, hf.Paged)
    assert logits(model, tokens(20)).isfinite().all()


@pytest.mark.parametrize("type_", ["dynamic", "longrope"])
def test_rotary_embeddings_choose_once(tmp_path: Path, type_: str) -> None:
    """By the longest request that is served, whoever else is in the batch."""
    rope: dict[str, Any] = {"rope_type": type_, "rope_theta": 10_000.0, "factor": 3.0}
    if type_ == "longrope":
        rope |= {"original_max_position_embeddings": 64}
        rope |= {"short_factor": [1.1] * 8, "long_factor": [1.5 + 0.7 * at for at in range(8)]}
    folder = write(tmp_path, "llama", {"max_position_embeddings": 64, "rope_parameters": rope})
    model, (long, short) = load(folder, max_total_tokens=80), (tokens(80), tokens(20, seed=1))
    together = logits(model, short, long)
    assert (together[20:] - reference_logits(reference(folder), long)).abs().max() < 1e-4
    assert (together[:20] - logits(model, short)).abs().max() < 1e-4


_RAW = _SIZES | {"architectures": ["OddForCausalLM"], "model_type": "odd"}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM.*state-space"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "OddForCausalLM.*granitemoehybrid.*state-space",
        ),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5For.*encoder-decoder"),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "LlavaFor.*vision_config"),
        ({"architectures": ["OddModel"]}, "OddModel.*no causal language model"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*OddForCausalLM"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"parts": {"auto_map": {"AutoConfig": "a.B"}}}, "parts.auto_map.*--trust-remote-code"),
    ],
)
def test_refused_before_transformers_is_asked(values: dict[str, Any], text: str) -> None:
    check(_RAW)
    with pytest.raises(StartupError, match=text):
        check(_RAW | values)


@pytest.mark.parametrize("option", [{"rope_scaling": "linear"}, {"rope_factor": 2.0}])
def test_rope_flags_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="--rope-factor"):
        check(_RAW, **option)


def test_sizes_have_many_names() -> None:
    old = {"d_model": 48, "n_layers": 3, "n_heads": 6, "n_positions": 99, "vocab_size": 7}
    shape = check({"architectures": ["OddForCausalLM"], "model_type": "odd", **old}).shape
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (48, 3, 6, 6, 8)
    assert (shape.intermediate, shape.max_position_embeddings, shape.vocab) == (192, 99, 7)
    latent = check(_RAW | _LATENT).shape
    assert (latent.kv_heads, latent.head_dim) == (4, 24)


def test_more_keys_than_were_planned_for(tmp_path: Path) -> None:
    folder = write(tmp_path, *PAGED["olmo2"])
    config = check(read_config(folder))
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    config = replace(config, shape=replace(config.shape, head_dim=8))
    with pytest.raises(StartupError, match=r"keys of 128 numbers per token, its config\.json implies 64"):
        hf.load(
            files,
            config,
            torch.float32,
            torch.device("cpu"),
            64,
            library=None,
            quantize=None,
            trust_remote_code=False,
            progress=lambda done, total: None,
        )


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, *PAGED["olmo2"])
    weights = [str(folder / "model.safetensors")]
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=weights, adapter=["adapter_config.json", "a.bin"])
    with pytest.raises(StartupError, match=r"Olmo2ForCausalLM.*no adapter"):
        registry.load_model(files, torch.float32, torch.device("cpu"), progress=lambda done, total: None)


def test_files_of_torch_are_read_too(tmp_path: Path) -> None:
    folder = write(tmp_path, *PAGED["olmo2"])
    expected = logits(load(folder), tokens(20))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load(folder), tokens(20)), expected)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="BertLMHeadModel can't be computed part by part"):
        load(write(tmp_path, "bert", {}))


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_every_tensor_must_find_its_place(tmp_path: Path, wrong: str) -> None:
    folder = write(tmp_path, *PAGED["olmo2"])
    path = folder / "model.safetensors"
    stored = load_file(path)
    if wrong == "missing":
        del stored["model.layers.1.mlp.up_proj.weight"]
    else:
        stored["model.layers.1.mlp.side_proj.weight"] = torch.zeros(3)
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"model\.layers\.1\.mlp\.(up|side)_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("kind", ["odd", "olmo2"])
def test_a_model_that_nobody_knows(tmp_path: Path, kind: str) -> None:
    """By both of its names: what claims to be of a known kind may still be another model."""
    folder = write(tmp_path, *PAGED["olmo2"])
    configure(folder, architectures=["OddForCausalLM"], model_type=kind)
    with pytest.raises(StartupError, match=rf"OddForCausalLM.*'{kind}'.*no causal language model of transformers \d"):
        load(folder)


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


CODE = """
from pathlib import Path
from transformers import Olmo2Config, Olmo2ForCausalLM
Path({marker!r}).touch()

class OddConfig(Olmo2Config):
    model_type = "odd"

class OddForCausalLM(Olmo2ForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out
"""
"""Makes its logits otherwise than by its head alone."""


def test_code_of_a_repository_runs_with_the_flag_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, marker = write(tmp_path / "odd", *PAGED["olmo2"]), tmp_path / "ran"
    expected = reference_logits(reference(folder), tokens(20)).tanh()
    names = {"AutoConfig": "code.OddConfig", "AutoModelForCausalLM": "code.OddForCausalLM"}
    configure(folder, architectures=["OddForCausalLM"], model_type="odd", auto_map=names)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(StartupError, match=r"OddForCausalLM.*--trust-remote-code"):
        load(folder)
    assert not marker.exists()
    model = load(folder, trust_remote_code=True)
    assert marker.exists() and isinstance(model, hf.Paged)
    assert (logits(model, tokens(20)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_that_transformers_has_is_not_run(tmp_path: Path, trusted: bool) -> None:
    folder, marker = write(tmp_path / "odd", *PAGED["olmo2"]), tmp_path / "ran"
    configure(folder, auto_map={"AutoConfig": "code.OddConfig", "AutoModelForCausalLM": "code.OddForCausalLM"})
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    assert "Olmo2ForCausalLM of transformers" in load(folder, trust_remote_code=trusted).description
    assert not marker.exists()
