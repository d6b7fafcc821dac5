"""Real servers: the launcher's own command, real processes, the real model."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store

LAUNCHER = Path(sys.executable).with_name("text-generation-launcher")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One launcher with its children, in a session of its own; or another ``program`` that serves HTTP."""

    def __init__(
        self, *arguments: str, log: Path, program: Sequence[str | Path] = (LAUNCHER,), **environment: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [*program, "--hostname", "127.0.0.1", "--port", str(self.port), *arguments]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_ready(self, seconds: float = 60) -> "Server":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.output}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready after {seconds} s:\n{self.output}")

    def children(self, rank: int = 0) -> dict[str, int]:
        """Pids of the launcher's children by the module they run; of several that run the same the ``rank``-th."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
                command = (stat.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            # A child that is about to be another program has the launcher's command.
            if parent == self.process.pid and b"--status-fd" in command and _rank(command) in (rank, None):
                found[command[command.index(b"-m") + 1].decode()] = int(stat.parent.name)
        return found

    def session(self) -> list[int]:
        """Pids of all processes that it or its children have started and that still run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def metric(self, series: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name == series)

    def generate(self, prompt: str, **parameters: object) -> dict[str, object]:
        response = httpx.post(
            f"{self.url}/generate", json={"inputs": prompt, "parameters": parameters}, timeout=120
        ).raise_for_status()
        answer: dict[str, object] = response.json()
        return answer

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def _rank(command: list[bytes]) -> int | None:
    flag = next((flag for flag in (b"--rank", b"--worker") if flag in command), None)
    return None if flag is None else int(command[command.index(flag) + 1])


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, as a newcomer starts it."""
    options = ["--device", request.param, "--dtype", "float32"]
    server = Server(*options, log=tmp_path_factory.mktemp("serve") / "log").wait_ready(300)
    yield server
    assert server.stop() == 0, server.output


@pytest.fixture(scope="session")
def reference() -> Any:
    """transformers on the same weights in fp32, through its own GGUF reader."""
    transformers = pytest.importorskip("transformers")
    (weights,) = resolve_model(flags.DEFAULT_MODEL, None, store(flags.cache_options())).weights
    folder, name = Path(weights).parent, Path(weights).name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
