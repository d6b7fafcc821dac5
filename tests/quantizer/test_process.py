"""The command from end to end: what it writes is served, a run that was killed goes on, and what it refuses."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.parity.conftest import load, logits, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.job import Job
from tgi.launcher import flags
from tgi.launcher import quantize as launcher
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.launch import store
from tgi.quantizer.process import quantize

COMMAND = [sys.executable, "-c", "import sys; from tgi.cli import server as main; sys.exit(main())", "quantize"]


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def job(folder: Path, output: Path, method: str = "gptq", **settings: object) -> Job:
    weights = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=weights)
    bits = 4 if method in ("gptq", "awq") else 8
    values = {"bits": bits, "sequence_length": 64, "samples": 30} | settings
    return Job(model=files, output=str(output), method=method, **values)  # type: ignore[arg-type]  # fields of Job


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance(folder: Path, other: Path) -> float:
    """Of logits, as a share of their size."""
    ids = tokens(60)
    before, after = logits(load(folder, max_total_tokens=64), ids), logits(load(other, max_total_tokens=64), ids)
    return float((after - before).norm() / before.norm())


def test_a_model_by_the_command(tmp_path: Path) -> None:
    folder, output = write_model(tmp_path / "model", "llama", intermediate_size=96), tmp_path / "deep" / "out"
    asked = ["--bits", 8, "--group-size", 32, "--no-sym", "--no-act-order", "--percdamp", 0.02, "--sequence-length", 64]
    done = command(folder, output, *asked, "--samples", 20)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"The quantized model is in {output}" in done.stdout
    config = json.loads((output / "config.json").read_text())
    told = config.pop("quantization_config")
    assert config == json.loads((folder / "config.json").read_text())
    assert {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
    }.items() <= told.items()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors(output).keys()
    assert distance(folder, output) < 0.05


METHODS = ["gptq", "awq", "int8", "fp8"]
BOUND = {"gptq": 0.5, "awq": 0.45, "int8": 0.12, "fp8": 0.25}
FAMILIES = ["llama", "gpt2", "mixtral", "deepseek-v3", "granite-moe"]
SIZES = {"intermediate_size": 96, "num_hidden_layers": 2, "q_lora_rank": 48}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_served_as_they_were_written(tmp_path: Path, name: str, method: str) -> None:
    """Dense, [in, out], experts by name and in one tensor, latent attention."""
    folder, output = tmp_path / "model", tmp_path / "out"
    if name == "llama":
        write_model(folder, name, **SIZES)
    else:
        family, config = VARIANTS[name]
        write_reference(folder, family, **config | ({"n_layer": 2} if name == "gpt2" else SIZES))
        write_model(tmp_path / "other", "llama")
        (tmp_path / "other" / "tokenizer.json").rename(folder / "tokenizer.json")
    if name == "gpt2" and method in ("int8", "fp8"):
        with pytest.raises(StartupError, match=r"GPT2LMHeadModel can't be quantized by `--method \w+`"):
            quantize(job(folder, output, method))
        return
    quantize(job(folder, output, method))
    assert distance(folder, output) < BOUND[method]
    # All matrices of layers but routers, and what latent attention absorbs.
    left = {name for name, tensor in tensors(output).items() if name.endswith(".weight") and tensor.dim() == 2}
    kept = ("embed_tokens", "lm_head", "wte", "wpe", "gate.weight", "router.layer", "kv_b_proj")
    if method in ("gptq", "awq"):
        assert all(any(part in name for part in kept) for name in left), left


def test_experts_that_no_token_goes_to_are_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config = VARIANTS["qwen3-moe"]
    folder = write_reference(
        tmp_path / "model", family, **config | {"moe_intermediate_size": 64, "intermediate_size": 64}
    )
    monkeypatch.setattr("tgi.quantizer.calibration.sequences", lambda *_: torch.tensor([[7]]))
    quantize(job(folder, tmp_path / "out", sequence_length=1))
    assert "no token of the text came to it" in caplog.text
    assert distance(folder, tmp_path / "out") < 0.8


def test_a_run_that_was_killed_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model", "llama", intermediate_size=96, num_hidden_layers=8)
    output, whole = tmp_path / "out", tmp_path / "whole"
    asked = [str(folder), str(output), "--sequence-length", "64", "--samples", "300"]
    process = subprocess.Popen([*COMMAND, *asked], start_new_session=True, stdout=subprocess.DEVNULL)
    third = output / "model-00003-of-00009.safetensors"
    until = time.monotonic() + 60
    while not third.exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert third.exists() and not (output / "config.json").exists()
    written = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    with pytest.raises(StartupError, match=r"was begun with percdamp: 0.01, not 0.1; name another folder"):
        quantize(job(folder, output, samples=300, percdamp=0.1))
    with caplog.at_level(logging.INFO):
        quantize(job(folder, output, samples=300))
    assert f"Going on behind layer {len(written)} of 8" in caplog.text
    after = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert written.items() <= {path.name: time for path, time in after.items()}.items()
    quantize(job(folder, whole, samples=300))
    assert_close(tensors(output), tensors(whole), rtol=0, atol=0)
    with caplog.at_level(logging.INFO):
        quantize(job(folder, output, samples=300))
    assert f"{output} holds the quantized model already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == after


def test_awq_goes_on_with_the_scales_that_were_written(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", intermediate_size=96)
    quantize(job(folder, tmp_path / "whole", "awq"))
    quantize(job(folder, tmp_path / "out", "awq"))
    for name in ("config.json", "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"):
        (tmp_path / "out" / name).unlink()
    quantize(job(folder, tmp_path / "out", "awq"))
    assert distance(tmp_path / "whole", tmp_path / "out") < 0.02


def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", intermediate_size=96)
    output = tmp_path / "out"
    short = tmp_path / "short.txt"
    short.write_text("Call me Ishmael.")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    for settings, text in (
        ({"dataset": str(short)}, r"the calibration text has \d+ tokens, too few for 30 sequences of 64"),
        ({"dataset": str(tmp_path / "latin.txt")}, "latin.txt is not UTF-8"),
        ({"dataset": str(tmp_path / "absent")}, "absent: No such file"),
        ({"sequence_length": 1024}, "the model reads 512 tokens"),
    ):
        with pytest.raises(StartupError, match=text):
            quantize(job(folder, output, **settings))
        assert not output.exists()
    with pytest.raises(
        StartupError, match=r"`--groupsize 128` does not divide the 64 inputs of .*; these divide all: 32, 16"
    ):
        quantize(job(folder, output, group_size=128))
    with pytest.raises(StartupError, match="holds other files"):
        quantize(job(folder, folder))
    raw = json.loads((folder / "config.json").read_text()) | {"architectures": ["MadeUpForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(StartupError, match="MadeUpForCausalLM can't be quantized"):
        quantize(job(folder, tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["m"], "OUTPUT_DIR is missing"),
        (["m", "out", "--bits", "3"], "`--bits` 3: `--method gptq` has 4 or 8"),
        (["m", "out", "--method", "awq", "--bits", "8"], "`--bits` 8: `--method awq` has 4"),
        (["m", "out", "--method", "awq", "--groupsize", "-1"], "`--groupsize` -1: `--method awq` has groups"),
        (["m", "out", "--method", "fp8", "--dataset", "x"], "`--dataset` has no meaning for `--method fp8`"),
        (["m", "out", "--method", "int8", "--group-size", "32"], "`--groupsize` has no meaning for `--method int8`"),
        (["m", "out", "--method", "awq", "--no-sym"], "`--sym` has no meaning for `--method awq`"),
    ],
)
def test_what_the_command_line_refuses(arguments: list[str], text: str) -> None:
    options, _ = flags.parse(arguments, {}, "quantize")
    with pytest.raises(ArgumentValidation, match=re.escape(text)):
        launcher.quantize(options, store(options))


def test_the_command_tells_what_its_process_refuses(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", intermediate_size=96)
    done = command(folder, tmp_path / "out", "--groupsize", 128, "--sequence-length", 64)
    assert done.returncode == 1 and done.stderr.startswith("Error: `--groupsize 128` does not divide the 64 inputs of")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_on_a_gpu(tmp_path: Path, method: str) -> None:
    folder = write_model(tmp_path / "model", "llama", intermediate_size=96)
    quantize(job(folder, tmp_path / "out", method, device="cuda"))
    assert distance(folder, tmp_path / "out") < BOUND[method]
