"""Engine and router started by hand, as TGI's developers do: real processes, the real model."""

import os
import signal
import stat
import subprocess
from pathlib import Path

import httpx

from tests.serve.conftest import LAUNCHER, Server
from tgi.launcher import flags


def test_engine_and_router_by_hand(tmp_path: Path) -> None:
    command = [LAUNCHER.with_name("text-generation-server"), "serve", flags.DEFAULT_MODEL, "--uds-path", tmp_path / "e"]
    sizes = {"MAX_TOTAL_TOKENS": "256", "MAX_BATCH_TOTAL_TOKENS": "4096"}
    engine = subprocess.Popen(command, env=os.environ | sizes, stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None
        assert any("Shard ready" in line for line in engine.stdout)
        socket = tmp_path / "e-0"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        arguments = ["--tokenizer-name", flags.DEFAULT_MODEL, "--master-shard-uds-path", str(socket)]
        router = Server(*arguments, log=tmp_path / "log", program=[LAUNCHER.with_name("text-generation-router")])
        try:
            router.wait_ready()
            assert router.generate("The opposite of hot is", max_new_tokens=1)["generated_text"] == " cold"
            info = httpx.get(f"{router.url}/info").json()
            assert (info["model_id"], info["max_total_tokens"]) == (flags.DEFAULT_MODEL, 256)
            assert info["max_batch_total_tokens"] == 4096
            engine.send_signal(signal.SIGTERM)
            engine.communicate(timeout=30)
            assert engine.returncode == 0
            assert httpx.get(f"{router.url}/health").status_code == 503
            assert not socket.exists() and not socket.with_name("e-0.json").exists()
        finally:
            assert router.stop() == 0, router.output
    finally:
        engine.kill()
        engine.communicate()
