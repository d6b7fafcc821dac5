"""Which servers are compared and how each is started: one table of command lines. Starts and stops them.

Each gets what suits it best, also where that differs between workloads. Knows no workload but by name.
"""

import http.client
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from client import Answer, BenchmarkError, complete
from machine import processes

LONG = ("W5", "W6")
"""Workloads of long prompts."""
SHORT = ("W1", "W2", "W3", "W4", "W7")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A server at a precision. Several may share both, each with workloads of its own."""

    server: str
    precision: str
    """Column of the table."""
    form: str
    """What the server calls its weights."""
    bits: float
    """Of one weight, on average."""
    command: str
    """With the names of ``Places`` in braces."""
    kv_bits: int = 16
    environment: Mapping[str, str] = field(default_factory=dict)
    workloads: Sequence[str] = SHORT + LONG
    reserved_tokens: int = 0
    """Tokens whose keys and values it holds from the start, if its memory isn't touched as it is needed."""
    reserved_bytes: int = 0
    """The same for a server whose cache is of a given size."""

    @property
    def name(self) -> str:
        return f"{self.server}, {self.precision}"


TGI = {
    "32-bit": "--dtype float32",
    "16-bit": "--dtype bfloat16",
    "8-bit": "--quantize int8",
    "4-bit": "--quantize int4",
}
"""Our own options for each precision."""

_TGI = "{tgi} --model-id {model} --hostname 127.0.0.1 --port {port} "
_LLAMA = (
    "{llama_bin}/llama-server --host 127.0.0.1 --port {port} -t {threads} -tb {threads} -fa on --cont-batching"
    " -m {gguf}"
)
_STREAMS = " -np 32 -c 16384"
_ONE = " -np 1 -c 8192"
"""Requests that share a long prompt are fastest one after the other in one slot: slots share no cache."""
_VLLM = (
    "{vllm_python} -m vllm.entrypoints.cli.main serve {model} --served-model-name default --dtype float32"
    " --host 127.0.0.1 --port {port} --max-model-len 8192 --no-enable-log-requests"
)
_VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def _llama(server: str, precision: str, form: str, bits: float) -> list[Recipe]:
    command = f"{_LLAMA}/model-{form}.gguf"
    return [
        Recipe(server, precision, form, bits, command + _STREAMS, workloads=SHORT, reserved_tokens=16384),
        Recipe(server, precision, form, bits, command + _ONE, workloads=LONG, reserved_tokens=8192),
    ]


RECIPES = [
    Recipe("tgi", "32-bit", "float32", 32, _TGI + TGI["32-bit"], kv_bits=32),
    Recipe("tgi", "16-bit", "bfloat16", 16, _TGI + TGI["16-bit"]),
    Recipe("tgi", "8-bit", "int8", 8.5, _TGI + TGI["8-bit"]),
    Recipe("tgi", "4-bit", "int4", 4.5, _TGI + TGI["4-bit"]),
    *_llama("llama.cpp", "32-bit", "F32", 32),
    *_llama("llama.cpp", "16-bit", "F16", 16),
    *_llama("llama.cpp BF16", "16-bit", "BF16", 16),
    *_llama("llama.cpp", "8-bit", "Q8_0", 8.51),
    *_llama("llama.cpp", "4-bit", "Q4_0", 5.35),  # its own default: the tied embedding stays at 8 bits
    Recipe("vllm", "16-bit", "float32", 32, _VLLM, kv_bits=32, environment=_VLLM_ENVIRONMENT, reserved_bytes=4 << 30),
]
"""vLLM's 16-bit weights are slower than its float32 on CPUs without AMX, so these stand for it in that column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things lie on this machine; "" for what isn't there."""

    model: str
    """Folder with config.json, tokenizer.json and safetensors."""
    tgi: str
    llama_bin: str = ""
    gguf: str = ""
    vllm_python: str = ""
    threads: int

    def fill(self, command: str, port: int) -> list[str]:
        """The command line. Raises BenchmarkError, naming the option, if it needs a place that isn't given."""
        for name in ("llama_bin", "gguf", "vllm_python"):
            if f"{{{name}}}" in command and not getattr(self, name):
                raise BenchmarkError(f"--{name.replace('_', '-')} is needed for: {command}")
        names = {name: shlex.quote(str(getattr(self, name))) for name in self.__slots__}
        return shlex.split(command.format(port=port, **names))


class Server:
    """A server in a session of its own; leaving the ``with`` ends all of its processes."""

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._log = log
        self._begin = time.perf_counter()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                cwd=log.parent,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        while left := processes(self.pid):
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)

    async def begin(self, prompt: str, seconds: float = 600) -> dict[str, float]:
        """Wait until it serves. Seconds from its command to: any HTTP answer, readiness, the first token."""
        times: dict[str, float] = {}
        while "ready_s" not in times:
            status = self._health()
            if status is not None:
                times.setdefault("port_s", time.perf_counter() - self._begin)
            if status == 200:
                times["ready_s"] = time.perf_counter() - self._begin
            elif self._process.poll() is not None:
                raise BenchmarkError(f"it ended with {self._process.returncode}: {self.output}")
            elif time.perf_counter() - self._begin > seconds:
                raise BenchmarkError(f"it isn't ready after {seconds:.0f} s: {self.output}")
            else:
                time.sleep(0.01)
        answer: Answer = await complete(self.url, prompt, 2)
        return times | {"first_token_s": answer.stamps[0] - self._begin}

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def _health(self) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    @property
    def output(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-1500:]

    @property
    def resident(self) -> int:
        """Bytes of all its processes."""
        return sum(process.resident for process in processes(self.pid))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(recipe: Recipe, places: Places, log: Path) -> Server:
    port = free_port()
    return Server(places.fill(recipe.command, port), port, log, recipe.environment)
