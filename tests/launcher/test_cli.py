"""The commands as a user types them: exit codes, the last line on standard error, and what is logged."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = "from tgi.cli import launcher as main"
SERVER = "from tgi.cli import server as main"


def command(which: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {which}; sys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=60,
    )


def model_folder(path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text("{}")
    return path


def test_errors_end_with_their_name_and_cause(tmp_path: Path) -> None:
    done = command(LAUNCHER, "--model-id", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert done.stderr == f"Error: DownloadError: {tmp_path}/config.json is missing\n"
    done = command(LAUNCHER, "--max-input-tokens", "5", "--max-total-tokens", "5")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: ArgumentValidation: `max_input_tokens`(5) must be < `max_total_tokens`(5)\n",
    )


def test_a_disk_that_takes_nothing() -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    done = command(f"{full}; {LAUNCHER}", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and "No usable temporary directory" in done.stderr


def test_the_launcher_is_told_of_a_bad_path_before_anything_else() -> None:
    done = command(LAUNCHER, "--tokenizer-config-path", "/no/file")
    assert done.returncode == 1 and "`--tokenizer-config-path`: /no/file" in done.stderr


def test_secrets_are_not_logged(tmp_path: Path) -> None:
    done = command(LAUNCHER, "--model-id", str(tmp_path), "--port", "0", "--api-key", "k3y", HF_API_TOKEN="t0ken")
    assert "api_key: ***" in done.stdout and "hf_api_token: ***" in done.stdout
    assert "k3y" not in done.stdout + done.stderr and "t0ken" not in done.stdout + done.stderr


def test_obsolete_flags_are_warned_of_and_env_is_shown(tmp_path: Path) -> None:
    done = command(LAUNCHER, "--model-id", str(tmp_path), "--port", "0", "--max-waiting-tokens", "3", "--env")
    assert re.search(r"WARN text_generation_launcher: `--max-waiting-tokens` changes nothing here", done.stdout)
    assert "Runtime environment:" in done.stdout and f"Python: {sys.version.split()[0]}" in done.stdout


def test_json_lines(tmp_path: Path) -> None:
    done = command(LAUNCHER, "--model-id", str(tmp_path), "--port", "0", "--json-output")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and all(line["target"] == "text_generation_launcher" for line in lines)
    assert lines[0]["level"] == "INFO" and lines[0]["fields"]["message"].startswith("Args { model_id: ")


def test_download_weights(tmp_path: Path) -> None:
    done = command(SERVER, "download-weights", str(model_folder(tmp_path)), "--logger-level", "info", "--json-output")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path} is in {tmp_path}" in json.loads(done.stdout.splitlines()[-1])["fields"]["message"]
    done = command(SERVER, "download-weights", "org/absent", XDG_CACHE_HOME=str(tmp_path), HF_HOME=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("Error: DownloadError: org/absent is not in the cache")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "m", "--sharded"], "text-generation-launcher --model-id"),
        (["quantize", "m", "out"], "`quantize` is not here"),
        (["download-weights", "m", "--merge-lora"], "`--merge-lora` is not supported yet"),
        (["download-weights", "m", "--auto-convert"], "`--auto-convert` is not supported yet"),
        (["download-weights", "m", "--trust-remote-code"], "`--trust-remote-code` is not supported yet"),
        (["download-weights", "m", "--extension", ".bin"], "`--extension` .bin is not supported"),
        (["download-weights", "m", "--nonsense"], "--nonsense"),
        (["download-weights"], "model_id"),
    ],
)
def test_what_the_server_command_refuses(arguments: list[str], text: str) -> None:
    done = command(SERVER, *arguments)
    assert done.returncode == 2 and text in done.stderr


def test_no_auto_convert_is_what_happens_anyway(tmp_path: Path) -> None:
    assert command(SERVER, "download-weights", str(model_folder(tmp_path)), "--no-auto-convert").returncode == 0
