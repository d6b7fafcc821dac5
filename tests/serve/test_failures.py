"""How a real server fails: clear words, a non-zero exit code, no harm to others."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server
from tests.tiny import write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, "llama")
    return folder


def ends(server: Server, *words: str) -> None:
    """The server gives up by itself, and its last line says why."""
    code = server.process.wait(60)
    last = server.output.strip().splitlines()[-1]
    assert code not in (0, None), server.output
    assert last.startswith("Error: "), server.output
    for word in words:
        assert word in last, server.output


def test_an_unknown_path(tmp_path: Path):
    ends(Server("--model-id", str(tmp_path / "nothing"), log=tmp_path / "log", HF_HUB_OFFLINE="1"), "nothing")


def test_a_folder_without_a_model(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    ends(Server("--model-id", str(tmp_path / "empty"), log=tmp_path / "log"), "config.json")


def test_truncated_weights(tmp_path: Path):
    write_model(tmp_path / "model", "llama")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    ends(Server("--model-id", str(tmp_path / "model"), log=tmp_path / "log"), weights.name)


def test_an_architecture_that_is_not_there(tmp_path: Path):
    write_model(tmp_path / "model", "llama")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["SomethingForCausalLM"]}))
    ends(Server("--model-id", str(tmp_path / "model"), log=tmp_path / "log"), "SomethingForCausalLM")


def test_a_busy_port(tmp_path: Path, tiny: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ends(Server("--model-id", str(tiny), "--port", port, log=tmp_path / "log"), port)


def test_memory_that_does_not_suffice(tmp_path: Path, tiny: Path):
    arguments = ["--model-id", str(tiny), "--max-batch-total-tokens", "4000000000"]
    ends(Server(*arguments, log=tmp_path / "log"), "`max_batch_total_tokens` must be <=")


def test_a_signal_stops_everything_and_lets_open_requests_finish(tmp_path: Path, tiny: Path):
    server = Server("--model-id", str(tiny), log=tmp_path / "log").wait_ready()
    children = server.children()
    body = {"inputs": "a b c", "parameters": {"max_new_tokens": 200}}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert events[-1]["generated_text"] is not None
    assert server.process.wait(30) == 0
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children.values()):
        assert time.monotonic() < deadline, "a child outlives the launcher"
        time.sleep(0.05)
