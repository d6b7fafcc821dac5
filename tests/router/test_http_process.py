"""The router as the launcher runs it: a process on an inherited socket that reports on a pipe and ends by SIGTERM."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.fake_engine import FakeEngine
from tests.router.serving import settings, until
from tgi.core.config import Settings
from tgi.core.messages import Failed, Ready, Status


@dataclass
class Process:
    popen: subprocess.Popen[bytes]
    url: str
    status: Status


@contextmanager
def started(settings: Settings, run_dir: Path) -> Iterator[Process]:
    path = run_dir / "settings.json"
    path.write_bytes(msgspec.json.encode(settings))
    read, write = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener, os.fdopen(read) as pipe:
        command = [sys.executable, "-m", "tgi.router.app", "--settings", str(path)]
        command += ["--status-fd", str(write), "--listen-fd", str(listener.fileno())]
        popen = subprocess.Popen(command, pass_fds=(write, listener.fileno()))
        os.close(write)
        try:
            status = msgspec.json.decode(pipe.readline(), type=Status)
            yield Process(popen, f"http://127.0.0.1:{listener.getsockname()[1]}", status)
        finally:
            popen.kill()
            popen.wait()


def test_serves_until_told_to_stop_and_finishes_open_answers(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with started(config, tmp_path) as process:
        assert process.status == Ready()
        assert httpx.get(f"{process.url}/health").status_code == 503
        with FakeEngine(config.socket) as engine:
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 5}}
            assert httpx.post(f"{process.url}/generate", json=body).status_code == 200
            engine.pause()
            with httpx.stream("POST", f"{process.url}/generate_stream", json=body) as response:
                until(lambda: len(engine.submits) == 2)
                process.popen.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.popen.wait(0.3)
                engine.resume()
                assert response.read().count(b"data: ") == 5
            assert process.popen.wait(10) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system doesn't tell")
def test_an_idle_router_sleeps(tmp_path: Path) -> None:
    def naps() -> int:
        status = Path(f"/proc/{process.popen.pid}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    config = settings(tmp_path)
    with started(config, tmp_path) as process, FakeEngine(config.socket):
        until(lambda: httpx.get(f"{process.url}/readyz").status_code == 200)
        time.sleep(0.5)
        before = naps()
        time.sleep(1.0)
        assert naps() - before <= 2


def test_a_model_folder_without_a_tokenizer(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with started(config, tmp_path) as process:
        assert isinstance(process.status, Failed)
        assert "tokenizer.json is missing" in process.status.message
        assert process.popen.wait(10) == 1


def test_the_router_never_imports_torch() -> None:
    program = "import sys, tgi.router.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_takes_as_many_connections_as_the_system_allows(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with started(settings(tmp_path), tmp_path) as process:
            assert resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
