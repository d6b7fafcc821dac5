"""The commands as a user types them: exit codes, the last line on standard error, and what is logged."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny import write_model

LAUNCHER = "from tgi.cli import launcher as main"
ROUTER = "from tgi.cli import router as main"
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


def test_a_program_among_the_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = write_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pytorch_model/data.pkl", pickle.dumps({"model.norm.weight": Program()}))
    for which, *words in ((LAUNCHER, "--model-id", str(folder), "--port", "0"), (SERVER, "serve", str(folder))):
        done = command(which, *words)
        assert done.returncode == 1
        assert done.stderr.startswith(f"Error: {folder}/pytorch_model.bin: its pickle asks for posix.system")
    assert not (tmp_path / "canary").exists()


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
        (["nothing"], "'nothing'"),
        ([], "command"),
        (["serve", "m", "--speculate", "2"], "`--speculate` is not supported yet"),
        (["serve", "m", "--port", "80"], "--port"),
        (["serve"], "MODEL_ID"),
        (["download-weights", "m", "--extension", ".bin"], "invalid value '.bin' for `--extension`"),
        (["download-weights", "m", "--nonsense"], "--nonsense"),
        (["download-weights"], "MODEL_ID"),
    ],
)
def test_what_the_server_command_refuses(arguments: list[str], text: str) -> None:
    done = command(SERVER, *arguments)
    assert done.returncode == 2 and text in done.stderr


def test_what_the_launcher_of_tgi_asks_of_a_download(tmp_path: Path) -> None:
    """Permissions and conversions that a model doesn't need are no reason to refuse it."""
    asked = ["--extension", ".safetensors", "--auto-convert", "--trust-remote-code", "--merge-lora"]
    done = command(SERVER, "download-weights", str(model_folder(tmp_path)), *asked)
    assert done.returncode == 0 and done.stdout.count("changes nothing here") == 2
    done = command(SERVER, "download-weights", str(model_folder(tmp_path)), "--no-auto-convert", "--no-merge-lora")
    assert done.returncode == 0 and "changes nothing here" not in done.stdout


def test_help_of_the_server_is_of_the_subcommand() -> None:
    assert "{serve,download-weights,detect-watermark,quantize}" in command(SERVER, "--help").stdout
    assert "--uds-path" in command(SERVER, "serve", "--help").stdout


def test_an_engine_by_hand_says_what_it_lacks(tmp_path: Path) -> None:
    prefix = tmp_path / "engine"
    done = command(SERVER, "serve", str(tmp_path), "--uds-path", str(prefix))
    assert (done.returncode, done.stderr) == (1, f"Error: DownloadError: {tmp_path}/config.json is missing\n")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "engine-0").write_text("no socket")
    done = command(SERVER, "serve", str(tmp_path), "--uds-path", str(prefix))
    assert done.returncode == 1 and f"Error: ShardCannotStart: {prefix}-0 is in the way" in done.stderr
    assert (tmp_path / "engine-0").read_text() == "no socket"


def test_a_router_without_an_engine_says_how_to_start_one(tmp_path: Path) -> None:
    done = command(ROUTER, "--master-shard-uds-path", str(tmp_path / "e-0"), "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: WebserverCannotStart: there is no engine on {tmp_path}/e-0")
    assert f"--uds-path {tmp_path}/e`" in done.stderr


def test_print_schema() -> None:
    done = command(ROUTER, "--port", "80", "print-schema")
    assert done.returncode == 0
    assert "/generate_stream" in json.loads(done.stdout)["paths"]
    assert done.stdout.startswith('{\n  "openapi"')
    assert command(ROUTER, "--no-such-flag", "print-schema").returncode == 2
