"""GPTQ's checkpoints, written by the published layout: bits stream along the inputs, zeros less one in version 1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import Engine, load, logits, reference, reference_logits, tokens, write_reference
from tests.quantization.packed_models import Pack, edit, quantize, rounded, same, stream, write
from tgi.core.errors import StartupError
from tgi.core.messages import Sampling, Submit
from tgi.models.registry import check


def packer(
    bits: int, group: int, *, symmetric: bool = False, version: int = 1, shuffled: bool = False, apart: bool = False
) -> Pack:
    """``shuffled``: the groups' inputs are all over the matrix, alike in all modules of an input, or ``apart``."""

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inner = weight.shape[1]
        groups = torch.arange(inner) // (inner if group == -1 else group)
        if shuffled:
            seed = hash_of(module) if apart or "expert" in module else inner
            groups = groups[torch.randperm(inner, generator=torch.Generator().manual_seed(seed))]
        # Of version 1 no zero is 0 unless words are made of it as below.
        stored, zero, scale, values = rounded(weight, bits, groups, symmetric=symmetric, least_zero=version == 1)
        told = zero - 1 if version == 1 else zero
        return {
            "qweight": stream(stored.T, bits),
            "qzeros": stream(told, bits).T,
            "scales": scale.T,
            "g_idx": groups.int(),
        }, values

    return pack


def hash_of(name: str) -> int:
    return sum(number * ord(letter) for number, letter in enumerate(name))


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group} | more


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_the_tensors_mean(tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    same(write(tmp_path, packer(bits, group, symmetric=symmetric), config(bits, group, sym=symmetric)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_2_stores_zeros_as_they_are(tmp_path: Path, bits: int) -> None:
    settings = config(bits, 64, checkpoint_format="gptq_v2", desc_act=True)
    same(write(tmp_path, packer(bits, 64, version=2, shuffled=True), settings))


def test_a_zero_of_zero_borrows_from_its_neighbour(tmp_path: Path) -> None:
    """As GPTQModel converts version 2 to 1: it takes one off every zero, with whole words."""

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        weight[::3] = weight[::3].abs()
        parts, values = packer(4, 64, version=2)(module, weight)
        return parts | {"qzeros": parts["qzeros"] - 0x11111111}, values

    same(write(tmp_path, pack, config(4, 64)))


@pytest.mark.parametrize("symmetric", [False, True])
def test_act_order(tmp_path: Path, symmetric: bool) -> None:
    same(write(tmp_path, packer(4, 32, shuffled=True, symmetric=symmetric), config(4, 32, desc_act=True)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_has_another_order_is_multiplied_by_itself(tmp_path: Path, family: str) -> None:
    folder = write(tmp_path, packer(4, 32, shuffled=True, apart=True), config(4, 32, desc_act=True), family)
    theirs = reference_logits(reference(folder / "plain"), tokens(20))
    assert (logits(load(folder, quantize="stored"), tokens(20)) - theirs).std() < 0.04 * theirs.std()


@pytest.mark.parametrize(
    ("group", "sizes"),
    [(128, {"hidden_size": 192, "intermediate_size": 320}), (48, {}), (24, {"intermediate_size": 96})],
    ids=["a shorter one behind", "a shorter one behind, smaller", "no multiple of 16"],
)
def test_odd_groups(tmp_path: Path, group: int, sizes: dict[str, int]) -> None:
    folder = write(tmp_path, packer(4, group), config(4, group), num_attention_heads=4, **sizes)
    theirs = reference_logits(reference(folder / "plain"), tokens(20))
    assert (logits(load(folder), tokens(20)) - theirs).abs().max() < 1e-4
    assert (logits(load(folder, quantize="stored"), tokens(20)) - theirs).std() < 0.04 * theirs.std()


def test_experts_each_have_an_order_of_their_own(tmp_path: Path) -> None:
    from tests.parity.test_more import VARIANTS

    family, sizes = VARIANTS["qwen3-moe"]
    folder = write_reference(tmp_path, family, **sizes | {"moe_intermediate_size": 96, "intermediate_size": 96})
    same(quantize(folder, packer(4, 32, shuffled=True, symmetric=True), config(4, 32, desc_act=True)))


@pytest.mark.parametrize("apart", [False, True])
def test_the_second_start_maps_what_the_first_has_packed(
    tmp_path: Path, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi.quantization.packed._WORTH", 0)
    folder = write(tmp_path / "model", packer(4, 32, shuffled=True, apart=apart), config(4, 32, desc_act=True))
    first, second = (logits(load(folder, quantize="stored", packed=tmp_path / "packs"), tokens(20)) for _ in range(2))
    assert torch.equal(first, second)
    assert len([path for path in (tmp_path / "packs").iterdir() if path.is_dir()]) == 1


def test_a_row_alone_is_as_in_a_batch(tmp_path: Path) -> None:
    folder = write(tmp_path, packer(4, 32, shuffled=True), config(4, 32, desc_act=True))
    submits = [
        Submit(number, tokens(length, seed=number).tolist(), length, 8, [], Sampling(), 0.0, prompt_logprobs=True)
        for number, length in enumerate((70, 33, 5))
    ]
    together = Engine(folder, quantize="stored", step_tokens=24)
    together.run(*submits)
    for submit in submits:
        alone = Engine(folder, quantize="stored", step_tokens=512)
        alone.run(submit)
        assert told(alone, submit.id) == told(together, submit.id)


def told(engine: Engine, number: int) -> list[float]:
    return [token.logprob for delta in engine.deltas[number] for token in (*delta.prompt, *delta.tokens)]


def test_fused_projections_biases_and_a_packed_head(tmp_path: Path) -> None:
    from tests.tiny import write_model

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return packer(4, 64, symmetric=True, shuffled=True)(module, weight)

    fused = write_model(tmp_path / "phi3", "phi3", hidden_size=128, intermediate_size=192, vocab_size=448)
    biased = write_model(tmp_path / "qwen2", "qwen2", hidden_size=128, intermediate_size=192, vocab_size=448)
    for folder in (fused, biased):
        suffix = ("_proj.weight", "lm_head.weight")
        same(quantize(folder, pack, config(4, 64, lm_head=True, desc_act=True), suffix))


def test_a_tied_head_and_modules_that_stayed_plain(tmp_path: Path) -> None:
    from tests.tiny import write_model

    folder = write_model(tmp_path, "llama", hidden_size=128, intermediate_size=192, tie_word_embeddings=True)
    suffix = ("q_proj.weight", "o_proj.weight", "mlp.down_proj.weight")
    same(quantize(folder, packer(4, 64), config(4, 64, modules_to_not_convert=["k_proj", "gate_proj"]), suffix))


def test_matrices_that_a_family_stores_the_other_way(tmp_path: Path) -> None:
    """GPT-2's weights are [in, out], packed ones are alike for all."""

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts, values = packer(4, 32, symmetric=True)(module, weight.T)
        return parts, values.T

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 431, "n_positions": 128}
    folder = write_reference(tmp_path, "gpt2", **sizes)
    suffix = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    same(quantize(folder, pack, config(4, 32), suffix))


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        own = packer(8, 32) if "layers.1" in module and "down" in module else packer(4, 64)
        return own(module, weight)

    rules = {"-:.*lm_head": {}, r"+:.*\.1\..*down": {"bits": 8, "group_size": 32}, ".*down": {}}
    same(write(tmp_path, pack, config(4, 64, dynamic=rules)))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_config_may_be_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, packer(4, 64), config(4, 64))
    raw = json.loads((folder / "config.json").read_text())
    settings = raw.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / name).write_text(json.dumps(settings))
    same(folder)


@pytest.mark.parametrize("settings", [config(8, 128), None])
def test_tgi_s_own_tensors_overrule_the_config_or_are_one(tmp_path: Path, settings: dict[str, Any] | None) -> None:
    folder = write(tmp_path, packer(4, 32), settings or {})
    told = {"gptq_bits": torch.tensor([4]), "gptq_groupsize": torch.tensor(32, dtype=torch.int32)}
    edit(folder, lambda t: t.update(told | {"gptq_sym": torch.tensor([False])}))
    same(folder)
    edit(folder, lambda t: t.update(gptq_bits=torch.tensor([4, 4])))
    with pytest.raises(StartupError, match="gptq_bits: expected one integer"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, "bits: 5"),
        ({"group_size": 0}, "group_size"),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format: 'bitblas'.*llm-compressor"),
        ({"rotation": "hadamard"}, "rotation: 'hadamard'"),
        ({"adapter": {"rank": 32}}, "adapter"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": {"(": {}}}, "dynamic"),
        ({"dynamic": {".*": {"bits": 7}}}, "bits: 7"),
        ({"quant_method": "quip"}, "'quip'"),
    ],
)
def test_configs_refused_by_name(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    from tests.tiny import write_model

    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    with pytest.raises(StartupError, match=words):
        check(raw | {"quantization_config": config(4, 32) | settings})


def test_a_key_that_nobody_knows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.tiny import write_model

    raw = json.loads((write_model(tmp_path, "llama") / "config.json").read_text())
    check(raw | {"quantization_config": config(4, 32, damp_percent=0.1, oddity=3)})
    assert "oddity" in caplog.text and "damp_percent" not in caplog.text


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:-1]}), "scales has shape.*group_size 32 implies"),
        (lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:, 1:]}), "qzeros has shape.*bits 4 and"),
        (lambda t: t.pop(f"{NAME}.qzeros"), "qzeros is missing, which gptq implies"),
        (
            lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].half()}),
            "qweight has type F16, gptq implies I32",
        ),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][0]}), "qweight has shape.*multiples"),
        (lambda t: t[f"{NAME}.g_idx"].fill_(9), "g_idx has groups 9 to 9, of which there are 4"),
        (lambda t: t.update({f"{NAME}.weight": torch.zeros(192, 128)}), f"qweight stands for {NAME}.weight"),
        (lambda t: t.pop(f"{NAME}.qweight"), "type I32, which gptq forbids"),
        (lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(192)}), "act.scales is not used"),
        (lambda t: t.update({"model.norm.weight": torch.ones(128).int()}), "norm.weight has type I32"),
    ],
)
def test_tensors_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    folder = write(tmp_path, packer(4, 32), config(4, 32))
    edit(folder, change)
    with pytest.raises(StartupError, match=words):
        load(folder)


def test_a_wrong_group_size_is_told_by_the_scales(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"scales has shape .* group_size 64 implies"):
        load(write(tmp_path, packer(4, 32), config(4, 64)))
