"""What is wrong with a quantized checkpoint is told by the launcher, which reads no weights: of each method, with the
tensor or the key of its config, and the rule."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.quantizers import auto

from tests.parity.conftest import load, logits, tokens
from tests.quantization import test_affine as affine
from tests.quantization import test_awq as awq
from tests.quantization import test_bitnet as bitnet
from tests.quantization import test_eetq as eetq
from tests.quantization import test_exl2 as exl2
from tests.quantization import test_gptq as gptq
from tests.quantization import test_hqq as hqq
from tests.quantization import test_marlin as marlin
from tests.quantization import test_marlin_24 as marlin_24
from tests.quantization.packed_models import Pack, Tensors, edit, write
from tests.quantization.writers import FORMATS
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.launcher.fit import fit
from tgi.launcher.flags import Options
from tgi.launcher.machine import Machine
from tgi.quantization.scheme import METHODS, REFUSED, read_scheme

GB = 10**9
MODULE = "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Case:
    """A checkpoint of one method."""

    pack: Pack
    config: dict[str, Any]
    scales: str
    """A tensor of scales."""
    group: dict[str, Any] | None
    """What a config with another group says; None: there is no choice."""
    bits: dict[str, Any] | None
    """What a config with bits that nobody has says."""
    sizes: dict[str, int] = field(default_factory=dict)


def written(name: str, scales: str, group: dict[str, Any] | None, bits: dict[str, Any] | None) -> Case:
    form = FORMATS[name]
    return Case(lambda module, weight: form.writer(weight), dict(form.config), scales, group, bits)


def weights(name: str, **changed: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(FORMATS[name].config))
    config["config_groups"]["group_0"]["weights"] |= changed
    return config


def quark(**changed: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(FORMATS["quark mxfp4"].config))
    config["global_quant_config"]["weight"] |= changed
    return config


AUTO = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
WIDE = marlin.SIZES
CASES = {
    "gptq": Case(gptq.packer(4, 32), gptq.config(4, 32), "scales", {"group_size": 64}, {"bits": 5}),
    "awq": Case(awq.gemm(64), awq.config(), "scales", {"group_size": 32}, {"bits": 8}),
    "auto-round": Case(gptq.packer(4, 32), AUTO, "scales", {"group_size": -1}, {"bits": 6}),
    "marlin": Case(
        marlin.packer(128), marlin.config(128, quant_method="marlin"), "s", {"group_size": -1}, {"bits": 8}, WIDE
    ),
    "marlin_24": Case(marlin_24.packer(4, 128), marlin_24.config(4, 128), "s", {"group_size": -1}, {"bits": 3}, WIDE),
    "eetq": Case(eetq.pack, eetq.CONFIG, "weight_scales", None, {"weights": "int4"}, WIDE),
    "exl2": Case(exl2.packer(6, 4), exl2.CONFIG, "q_scale", None, None),
    "hqq": Case(
        hqq.packer(4, 64),
        hqq.config(4, 64),
        "scale",
        {"quant_config": hqq.params(4, 32)},
        {"quant_config": hqq.params(6, 64)},
    ),
    "bitnet": Case(bitnet.packer(), bitnet.CONFIG, "weight_scale", None, None),
    "metal": Case(affine.packer(4, 64), affine.config(4, 64), "scales", {"group_size": 32}, {"bits": 5}),
    "fp8": written("fp8 blocks", "weight_scale_inv", {"weight_block_size": [64, 64]}, {"fmt": "e3m4"}),
    "mxfp8": written("mxfp8", "weight_scale_inv", {"weight_block_size": [1, 16]}, {"fmt": "e3m4"}),
    "fbgemm_fp8": written("fbgemm_fp8", "weight_scale", None, None),
    "compressed-tensors": written(
        "w4a16", "weight_scale", weights("w4a16", group_size=64), weights("w4a16", num_bits=3)
    ),
    "bitsandbytes": written("nf4", "weight.absmax", None, {"bnb_4bit_quant_type": "nf3"}),
    "mxfp4": written("mxfp4", "weight_scale", None, None),
    "modelopt": written("modelopt nvfp4", "weight_scale", None, {"quant_algo": "W4A8_AWQ"}),
    "quark": written("quark mxfp4", "weight_scale", quark(group_size=16), quark(dtype="fp6_e3m2")),
}


def test_every_method_is_tried() -> None:
    assert CASES.keys() == METHODS.keys()


def model(folder: Path, case: Case, config: dict[str, Any] | None = None) -> Path:
    return write(folder, case.pack, case.config | (config or {}), **case.sizes)


def launch(folder: Path) -> None:
    """As far as the launcher goes before it starts an engine."""
    files = ModelFiles(model_id="m", folder=str(folder), weights=[str(folder / "model.safetensors")])
    fit(Options(max_total_tokens=64), files, Machine("cpu", "cpu", 16 * GB, 8 * GB, native=True))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        launch(folder)


@pytest.mark.parametrize("method", CASES)
def test_what_is_right_starts(tmp_path: Path, method: str) -> None:
    launch(model(tmp_path, CASES[method]))


@pytest.mark.parametrize("method", [method for method, case in CASES.items() if case.group is not None])
def test_a_wrong_group_size(tmp_path: Path, method: str) -> None:
    refused(
        model(tmp_path, CASES[method], CASES[method].group),
        r"tensor model\.layers\.\d\.\w+\.\w+_proj\.\S+ has .*(implies|group)|group_size|per_group of 32",
    )


@pytest.mark.parametrize("method", CASES)
def test_truncated_scales(tmp_path: Path, method: str) -> None:
    case = CASES[method]
    name = f"{MODULE}.{case.scales}"
    folder = model(tmp_path, case)
    edit(folder, lambda t: t.update({name: t[name][:-1]}))
    refused(folder, rf"tensor {MODULE}\.\S+ has (shape|\d+ bytes)")
    edit(folder, lambda t: t.pop(name))
    refused(folder, rf"tensor {MODULE}\.\S+ (is missing, which .* implies|has type .*, which .* forbids)")


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = model(tmp_path, CASES["gptq"])
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"model\.safetensors: not a readable safetensors file: it is truncated: tensor .* ends at byte")


@pytest.mark.parametrize("method", CASES)
def test_a_module_of_another_format(tmp_path: Path, method: str) -> None:
    """Among others, or beside one of its own."""
    case = CASES[method]
    other = CASES["gptq" if method not in ("gptq", "auto-round") else "eetq"]
    folder = model(tmp_path, case)

    def exchange(stored: Tensors) -> None:
        for name in [name for name in stored if name.startswith(f"{MODULE}.")]:
            del stored[name]
        parts, _ = other.pack(MODULE, torch.randn(256, 128))
        stored.update({f"{MODULE}.{part}": tensor for part, tensor in parts.items()})

    edit(folder, exchange)
    refused(folder, rf"tensor {MODULE}\.\S+ (has (type|shape) .*(forbids|implies)|is missing)")


@pytest.mark.parametrize("method", CASES)
def test_packed_tensors_that_no_config_explains(tmp_path: Path, method: str) -> None:
    folder = model(tmp_path, CASES[method])
    (folder / "config.json").write_text((folder / "plain" / "config.json").read_text())
    refused(folder, r"tensor \S+ has type \w+, which no quantization_config explains")


@pytest.mark.parametrize(
    "method", [method for method, case in CASES.items() if "weight" not in case.pack("", torch.randn(256, 256))[0]]
)
def test_a_matrix_that_is_there_twice(tmp_path: Path, method: str) -> None:
    folder = model(tmp_path, CASES[method])
    edit(folder, lambda t: t.update({f"{MODULE}.weight": torch.zeros(192, 128)}))
    refused(
        folder, rf"tensor {MODULE}\.\S+ stands for {MODULE}\.weight, which is also there|{MODULE}\.weight is not used"
    )


@pytest.mark.parametrize("method", [method for method, case in CASES.items() if case.bits is not None])
def test_bits_that_nobody_has(tmp_path: Path, method: str) -> None:
    refused(model(tmp_path, CASES[method], CASES[method].bits), "quantization_config: .* not implemented")


@pytest.mark.parametrize("method", auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
def test_every_method_of_transformers_is_read_or_refused_by_name(method: str) -> None:
    """Those that are read ask for what is missing, or take defaults."""
    try:
        scheme = read_scheme({"quantization_config": {"quant_method": method}})
    except StartupError as error:
        if method in REFUSED:
            assert method in str(error) and REFUSED[method] in str(error)
        else:
            assert method.partition("_4bit")[0].partition("_8bit")[0] in METHODS
            assert str(error).startswith("config.json: ")
    else:
        assert scheme is not None and method in METHODS


JUNK = [None, True, False, 0, 1, 3, 16, -1, 10**30, 0.5, "", "x", [], [1], ["("], {}, {"a": 1}, ["re:("], ["Linear"]]


def places(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(config, dict):
        for key, value in config.items():
            yield from places(value, (*path, key))


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any, *, gone: bool) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    place = config
    for key in path[:-1]:
        place = place[key]
    if gone:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return config


@pytest.mark.parametrize("method", CASES)
def test_any_change_of_a_config_is_refused_by_name_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    case = CASES[method]
    folder = model(tmp_path_factory.mktemp(method), case)
    raw = json.loads((folder / "config.json").read_text())
    right = logits(load(folder), tokens(20))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(path=st.sampled_from(list(places(case.config))), value=st.sampled_from(JUNK), gone=st.booleans())
    def change(path: tuple[str, ...], value: Any, gone: bool) -> None:
        config = changed(case.config, path, value, gone=gone)
        (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
        try:
            launch(folder)
            got = logits(load(folder), tokens(20))
        except StartupError as error:
            assert re.search(r"config\.json: \S+|tensor \S+ (has|is|quantizes)", str(error))
        else:
            assert (got - right).abs().max() < 1e-4

    change()
