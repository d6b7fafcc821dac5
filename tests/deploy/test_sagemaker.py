"""SageMaker's entry point, run as it is, with a launcher that only tells how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "sagemaker-entrypoint.sh"
NAMES = ("MODEL_ID", "REVISION", "NUM_SHARD", "QUANTIZE", "TRUST_REMOTE_CODE")


@pytest.fixture
def path(tmp_path: Path) -> str:
    launcher = tmp_path / "text-generation-launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@"\nfor name in {" ".join(NAMES)}; do printenv $name || echo -; done\n')
    launcher.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def run(path: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """With the word that SageMaker adds."""
    return subprocess.run(
        [SCRIPT, "serve"], env={"PATH": path, **environment}, capture_output=True, text=True, timeout=30
    )


def test_a_model_is_needed(path: str) -> None:
    for environment in ({}, {"HF_MODEL_ID": ""}, {"MODEL_ID": "m"}):
        done = run(path, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "HF_MODEL_ID must be set\n")


def test_the_model_alone(path: str) -> None:
    done = run(path, HF_MODEL_ID="org/name")
    assert done.stdout.splitlines() == ["--port 8080", "org/name", "-", "-", "-", "-"]


def test_all_variables(path: str) -> None:
    done = run(
        path,
        HF_MODEL_ID="/opt/ml/a model",
        HF_MODEL_REVISION="v1",
        SM_NUM_GPUS="4",
        HF_MODEL_QUANTIZE="gptq",
        HF_MODEL_TRUST_REMOTE_CODE="true",
    )
    assert done.stdout.splitlines() == ["--port 8080", "/opt/ml/a model", "v1", "4", "gptq", "true"]
    assert done.returncode == 0


def test_what_is_set_already_stays(path: str) -> None:
    assert run(path, HF_MODEL_ID="m", HF_MODEL_REVISION="", REVISION="v2").stdout.splitlines()[2] == "v2"
