"""Command lines, processes and what is read of them."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from client import BenchmarkError
from machine import Watch, processes
from overhead import durations, role, write_model
from report import Shape
from servers import RECIPES, Places, Server, free_port
from tgi.core.config import ModelFiles
from tgi.launcher.fit import elements

PLACES = Places(model="/m odel", tgi="launcher", llama_bin="/bin", gguf="/gguf", vllm_python="python", threads=2)

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name} {recipe.workloads[0]}")
def test_every_command_line_can_be_filled(recipe: object) -> None:
    line = PLACES.fill(recipe.command, 4321)  # type: ignore[attr-defined]  # a Recipe, which isn't hashable for ids
    assert "4321" in line
    assert not any("{" in word for word in line)


def test_a_missing_place_is_named() -> None:
    [first, *_] = [recipe for recipe in RECIPES if recipe.server == "llama.cpp"]
    with pytest.raises(BenchmarkError, match="--gguf is needed"):
        replace(PLACES, gguf="").fill(first.command, 1)


def test_a_server_ends_with_all_of_its_processes(tmp_path: Path) -> None:
    port = free_port()
    with Server([sys.executable, "-c", SERVER, str(port)], port, tmp_path / "log") as server:
        deadline = time.monotonic() + 20
        while len(processes(server.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(processes(server.pid)) == 2
        assert server.resident > 1_000_000
    assert processes(server.pid) == []


def test_a_server_that_ends_at_once_is_told_with_its_words(tmp_path: Path) -> None:
    with (
        Server([sys.executable, "-c", "print('no such flag')"], free_port(), tmp_path / "log") as server,
        pytest.raises(BenchmarkError, match="no such flag"),
    ):
        asyncio.run(server.begin("x"))


def test_foreign_processor_time_is_told_from_the_servers_own() -> None:
    burn = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(burn, start_new_session=True) as busy:
        try:
            own, foreign = Watch(busy.pid), Watch(os.getpid())
            time.sleep(0.6)
            assert foreign.foreign()["foreign_cores"] - own.foreign()["foreign_cores"] > 0.2
        finally:
            busy.kill()


def test_stages_are_read_from_metrics() -> None:
    told = "\n".join(
        f'{name}_bucket{{le="1"}} 3\n{name}_sum{{method="prefill"}} {a}\n{name}_sum{{method="decode"}} {b}'
        for name, a, b in (
            ("tgi_batch_inference_duration", 4.0, 6.0),
            ("tgi_batch_forward_duration", 2.0, 3.0),
            ("tgi_batch_decode_duration", 1.0, 1.0),
            ("tgi_batch_filter_duration", 0.5, 0.5),
        )
    )
    assert durations(told) == {"schedule": 2.0, "forward": 5.0, "sample": 2.0, "commit, send": 1.0}


def test_processes_are_named_by_what_they_run() -> None:
    assert role(["/usr/bin/python3", "-m", "tgi.router.app", "--x"]) == "tgi.router.app"
    assert role(["/usr/bin/llama-server", "-m", "x.gguf"]) == "x.gguf"
    assert role([]) == "ended"


def test_the_random_model_is_what_its_config_says(tmp_path: Path) -> None:
    write_model(tmp_path, tmp_path)
    files = ModelFiles(model_id="x", folder=str(tmp_path), weights=[str(tmp_path / "model.safetensors")])
    norms = 5 * 64
    assert elements(files) == Shape.read(tmp_path).weights + norms
