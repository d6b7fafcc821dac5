"""The GPU's benchmark on a CPU: every part at tiny sizes, what becomes of errors, what its report says."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpu
from device import Trace
from gpu import PARTS, part_of
from gpu_report import TARGETS, markdown
from gpu_run import SMALL, Run
from gpu_tiles import Trial, tuned
from records import Data, Journal
from tests.kernels.conftest import native

CPU = torch.device("cpu")
COMMAND = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "gpu.py"), "--small", "--device", "cpu"]


@native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.usual])
def test_a_part_runs_without_errors(name: str, tmp_path: Path) -> None:
    run = Run(name, tmp_path, Journal(tmp_path / "gpu.jsonl"), CPU, SMALL, tmp_path / "scratch", time.monotonic() + 100)
    run.scratch.mkdir()
    part_of(name)(run)
    data = run.journal.data
    assert data.of("error") == []
    run.journal.write("run", small=True)
    told = markdown(Data.read([tmp_path / "gpu.jsonl"]))
    kinds = {
        "ceilings": {"ceiling"},
        "attention": {"attention"},
        "linear": {"linear"},
        "sampling": {"sampling"},
        "step": {"prompts", "step"},
        "correctness": {"greedy", "distribution", "invariance"},
        "server": {"start", "load"},
        "transformers": {"load"},
    }
    assert {json.loads(line)["kind"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()} == {
        "run",
        *kinds[name],
    }
    assert told.count("\n## ") == (0 if name == "linear" else 1)  # which is nothing without what the device allows
    if name == "correctness":
        assert told.count("PASS") == 2


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"ceilings": "ended with 1", "attention": None, "linear": "no time was left"}
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: ends[name])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setitem(PARTS, "linear", replace(PARTS["linear"], seconds=0))
    monkeypatch.setattr(sys, "argv", [*COMMAND[1:], "--out", str(tmp_path), "--only", *ends])
    gpu.main()
    data = Data.read([tmp_path / "gpu.jsonl"])
    assert {each["part"]: each["error"] for each in data.of("error")} == {k: v for k, v in ends.items() if v}
    assert [each["part"] for each in data.of("part")] == list(ends)
    assert (tmp_path / "gpu.md").read_text().strip() == capsys.readouterr().out.strip()


def test_a_part_is_a_process_with_a_time_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    arguments = argparse.Namespace(out=tmp_path, device="cpu", small=True)
    assert gpu.run_part("ceilings", arguments, str(tmp_path), 0.01) == "took more than 0 s"
    assert not (tmp_path / "gpu.jsonl").exists()
    assert gpu.run_part("ceilings", arguments, str(tmp_path), 100) is None
    assert Data.read([tmp_path / "gpu.jsonl"]).of("ceiling")
    arguments.device = "nothing of this kind"
    assert gpu.run_part("ceilings", arguments, str(tmp_path), 100) == "ended with 1"


@native
def test_a_server_ends_with_its_part(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [*COMMAND, "--out", str(tmp_path), "--part", "server", "--scratch", str(scratch), "--seconds", "100"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        log = scratch / "bfloat16.log"
        while not (log.exists() and "Args" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(scratch) in _text(path)]
    assert mine == []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_what_is_busy_and_what_idle() -> None:
    trace = Trace([(0.0, 4.0, "a"), (2.0, 3.0, "b"), (6.0, 10.0, "a")])
    assert trace.busy == pytest.approx(8e-6)
    assert trace.idle == pytest.approx(0.2)
    assert trace.kernels() == {"a": (2, pytest.approx(8e-6)), "b": (1, pytest.approx(1e-6))}
    assert "aten::mm" in Trace.of(lambda: torch.ones(3, 3).mm(torch.ones(3, 3)), CPU).kernels()


def test_the_best_tile_is_found() -> None:
    """Of a kernel that is faster the larger its tile is, wrong from 64 on, and can't be made of two stages."""

    def prepare() -> torch.Tensor:
        tile = trial("k", CPU)
        if tile["num_stages"] == 2:
            raise RuntimeError("out of resources")
        time.sleep(0.05 / tile["BLOCK"])
        return torch.ones(3) if tile["BLOCK"] < 64 else torch.zeros(3)

    trial = Trial({"k": {"BLOCK": 8, "num_stages": 3}})
    best, before, after = tuned(trial, "k", lambda: prepare, CPU, graph=False)
    assert best["BLOCK"] == 32 and best["num_stages"] > 2 and trial.table["k"] == best
    assert after < before / 2


def test_targets_are_those_of_the_plan() -> None:
    h100: Mapping[str, float] = {"read_gb_s": 3000.0, "gemm_gflop_s": 8e5}
    records = [
        {"kind": "run", "at": "1"},
        {"kind": "ceiling", "at": "1", "copies_gb_s": {"1024": 3000.0}, **h100},
        *(
            {"kind": "step", "form": form, "rows": 1, "context": 9, "seconds": s, "read_gb_s": 3e3, "weights": 15e9}
            | {"cached": 0}
            for form, s in (("bfloat16", 0.0066), ("fp8", 0.01))
        ),
        *(
            {"kind": "attention", "what": "decode", "backend": backend, "batch": batch, "context": 1024, "cache": c}
            | {"bytes": 3e9, "seconds": seconds}
            for backend, batch, c, seconds in (
                ("triton", 1, "bfloat16", 0.01),  # few requests may take longer
                ("triton", 8, "bfloat16", 0.0012),
                ("triton", 64, "bfloat16", 0.0011),
                ("sdpa", 8, "bfloat16", 1.0),
                ("triton", 8, "float8_e4m3fn", 0.0013),
            )
        ),
        {"kind": "trace", "form": "bfloat16", "rows": 9, "idle": 0.02, "busy": 1.0, "kernels": {"k": 0.5}},
    ]
    told = {target.title: target.told(Data(records))[2:] for target in TARGETS}
    assert told["decoding at batch 1, bfloat16, of the bandwidth"] == ["75.8%", "PASS"]
    assert told["decoding at batch 1, fp8"] == ["50.0%", "short"]
    assert told["attention while decoding, batch ≥ 8, the least of all sizes"] == ["83.3%", "PASS"]
    assert told["that attention, cache in fp8"] == ["76.9%", "short"]
    assert told["idle while decoding"] == ["2.0%", "PASS"]
    assert told["1000 in, 1000 out, bfloat16"] == ["-", "-"]
