"""A router as clients meet it: real HTTP on a port of its own, a real tokenizer, and an engine that does as told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from tests import small_tokenizers
from tests.fake_engine import FakeEngine, echo
from tgi.core.config import Limits, ModelFiles, Settings
from tgi.core.messages import Submit
from tgi.router.app import build, configure, create
from tgi.router.connection import READER_PATIENCE, watch_readers

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ suffix }}"
)

LIMITS = Limits(
    max_concurrent_requests=8,
    max_input_tokens=100,
    max_total_tokens=200,
    max_batch_prefill_tokens=256,
    max_batch_total_tokens=1024,
    max_batch_size=8,
    payload_limit=100_000,
)


def settings(folder: Path, limits: Limits = LIMITS, pipeline_tag: str | None = None, **changes: Any) -> Settings:
    small_tokenizers.write(
        folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    )
    model = ModelFiles(model_id="a/model", sha="abc", pipeline_tag=pipeline_tag, folder=str(folder), weights=[])
    values: dict[str, Any] = {"run_dir": str(folder), "ledger": {"weights": 1, "cache": 2}} | changes
    return Settings(model=model, limits=limits, pools=[], **values)


class Router:
    """``with Router(settings) as router: router.http.post(...)``. ``engine=False``: nobody listens yet."""

    def __init__(
        self, settings: Settings, *, engine: bool = True, reader_patience: float = READER_PATIENCE, **behaviour: Any
    ) -> None:
        self.settings = settings
        self.reply: Callable[[Submit], Sequence[int] | str] = echo
        self.service = build(settings)
        self._with_engine = engine
        self._reader_patience = reader_patience
        self._behaviour = behaviour
        self._exits = ExitStack()

    @cached_property
    def engine(self) -> FakeEngine:
        """Serves while it is entered."""
        return FakeEngine(self.settings.socket, lambda submit: self.reply(submit), **self._behaviour)

    def __enter__(self) -> Router:
        listener = socket.create_server(("127.0.0.1", 0))
        watch_readers(listener, self._reader_patience)
        self.address: tuple[str, int] = listener.getsockname()
        self._server = uvicorn.Server(configure(create(self.service)))
        thread = threading.Thread(target=self._server.run, args=([listener],))
        if self._with_engine:
            self._exits.enter_context(self.engine)
        thread.start()
        self._exits.callback(thread.join)
        self._exits.callback(self._stop)
        self.url = f"http://{self.address[0]}:{self.address[1]}"
        self.http = self._exits.enter_context(httpx.Client(base_url=self.url, timeout=20))
        if self._with_engine:
            until(lambda: self.service.client.connected)
        else:
            until(lambda: self._server.started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def drain(self) -> None:
        """As the router's process is told to end."""
        self._server.servers[0].get_loop().call_soon_threadsafe(self.service.client.drain)

    def _stop(self) -> None:
        self._server.should_exit = True

    def says(self, text: str) -> list[int]:
        """Every request is answered so; special tokens are written by name. Returns the token ids."""
        ids = self.service.tokenizer.encode(text, add_special_tokens=False)
        self.reply = lambda submit: ids
        return ids

    def generate(self, inputs: str = "hello", **parameters: Any) -> httpx.Response:
        return self.http.post("/generate", json={"inputs": inputs, "parameters": parameters})

    def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "hello", **fields})

    def metric(self, series: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        raise KeyError(series)

    def send_raw(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A request on a bare connection, for tests that hang up or read byte by byte."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        return connection


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def events(content: bytes) -> list[Any]:
    """The JSON of a stream's events, and "[DONE]". Fails on any other framing than TGI's."""
    assert content.endswith(b"\n\n")
    found = []
    for block in content[:-2].split(b"\n\n"):
        assert block.startswith(b"data: ")
        data = block.removeprefix(b"data: ")
        found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found
