"""Several routers on one port before one engine: clients can't tell. Real processes, a tiny model."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.kernels.conftest import native as native_only
from tests.serve.conftest import Server
from tests.serve.test_loss import ASKED, Load, end_engine, healthy, native, serving, until
from tests.tiny import write_model

pytestmark = native_only

ROUTER = "tgi.router.app"
WORKERS = 3
MOST = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    bounds = ("--router-workers", str(WORKERS), "--max-concurrent-requests", str(MOST))
    with serving(tiny, log, *bounds) as server:
        yield server


class Clients:
    """Connections that are kept."""

    def __init__(self, server: Server, count: int) -> None:
        self._address = ("127.0.0.1", server.port)
        self._open = [socket.create_connection(self._address, timeout=60) for _ in range(count)]

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    def ask(self, path: str, body: object = None) -> list[httpx.Response]:
        """All at once, a request on each."""

        async def ask(connection: socket.socket) -> httpx.Response:
            content = b"" if body is None else json.dumps(body).encode()
            method = "GET" if body is None else "POST"
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            reader, writer = await asyncio.open_connection(sock=connection.dup())
            writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            lengths = [field.split(":")[1] for field in fields if field.startswith("content-length")]
            answer = await reader.readexactly(int(lengths[0]))
            writer.close()
            return httpx.Response(int(status.split()[1]), content=answer)

        async def ask_all() -> list[httpx.Response]:
            return await asyncio.gather(*map(ask, self._open))

        return asyncio.run(ask_all())


@pytest.fixture
def clients(server: Server) -> Iterator[Clients]:
    clients = Clients(server, 64)
    yield clients
    clients.close()


def sockets(pid: int) -> int:
    """Open ones, of any kind."""
    return sum(str(file.readlink()).startswith("socket:") for file in Path(f"/proc/{pid}/fd").iterdir())


def series(answer: httpx.Response) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_connections_are_shared_out_and_any_of_them_tells_the_sums(server: Server) -> None:
    pids = [server.children(worker)[ROUTER] for worker in range(WORKERS)]
    idle = [sockets(pid) for pid in pids]
    before = server.metric("tgi_request_count")
    clients = Clients(server, 60)
    try:
        answers = clients.ask("/generate", native("hello world", 1))
        assert {answer.status_code for answer in answers} <= {200, 429}
        shares = [sockets(pid) - other for pid, other in zip(pids, idle, strict=True)]
        assert min(shares) >= 10, shares
        done = sum(answer.status_code == 200 for answer in answers)
        for page in map(series, clients.ask("/metrics")):
            assert page["tgi_request_count"] == before + 60
            assert page["tgi_request_success"] == page["tgi_request_duration_count"] == before + done
            assert page['tgi_request_failure{err="overloaded"}'] == 60 - done
            assert page["tgi_request_generated_tokens_sum"] == page["tgi_request_success"]
            assert page["tgi_batch_next_size_sum"] == page["tgi_request_success"]
            assert page["tgi_queue_size"] == page["tgi_batch_current_size"] == 0
    finally:
        clients.close()


def test_the_bound_on_requests_is_the_server_s(server: Server, clients: Clients) -> None:
    for _ in range(2):  # permits are given back
        answers = [answer.status_code for answer in clients.ask("/generate", native("hello world", 100))]
        assert (answers.count(200), answers.count(429)) == (MOST, 64 - MOST)


def test_the_loss_of_a_router_is_that_of_its_connections_only(server: Server, clients: Clients) -> None:
    counted = series(clients.ask("/metrics")[0])
    address = ("127.0.0.1", server.port)
    pids = [server.children(worker)[ROUTER] for worker in range(WORKERS)]
    load = Load(server, [("/generate_stream", native("hello world"))] * 12)
    load.grow(200)
    os.kill(pids[1], signal.SIGKILL)
    whole, cut = 0, 0
    for future in load._answers:
        whole, cut = (whole, cut + 1) if isinstance(future.exception(60), httpx.TransportError) else (whole + 1, cut)
    assert whole > 0 and cut > 0
    until(lambda: server.children(1).get(ROUTER, pids[1]) != pids[1])
    until(lambda: "The webserver worker=1 serves again" in server.output)
    assert [server.children(worker)[ROUTER] for worker in (0, 2)] == [pids[0], pids[2]]
    with socket.create_connection(address):
        assert healthy(server)
    now = series(httpx.get(f"{server.url}/metrics"))
    assert now["tgi_request_count"] == counted["tgi_request_count"] + 12
    assert now["tgi_request_success"] == counted["tgi_request_success"] + whole
    falling = [name for name in counted if now[name] < counted[name] and "current" not in name and "queue" not in name]
    assert not falling
    later = Clients(server, 64)  # all permits of the one that is gone are back
    answers = [answer.status_code for answer in later.ask("/generate", native("hello world", 100))]
    later.close()
    assert answers.count(200) == MOST


def test_the_loss_of_the_engine_harms_no_router_and_counts_once(server: Server) -> None:
    asked = ASKED[:6]
    undisturbed = Load(server, asked).answers()
    load = Load(server, asked)
    load.grow(10)
    end_engine(server)
    assert load.answers() == undisturbed
    page = series(httpx.get(f"{server.url}/metrics"))
    assert page["tgi_engine_restarts"] == 1
    assert sum(page[f'tgi_batch_inference_failure{{method="{method}"}}'] for method in ("prefill", "decode")) == 1
    assert page['tgi_request_failure{err="generation"}'] == 0


def test_a_single_router_is_started_again_and_serves_who_waits(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log") as server:
        first = server.children()[ROUTER]
        os.kill(first, signal.SIGKILL)
        assert server.generate("hello", max_new_tokens=3)["generated_text"]
        assert server.children()[ROUTER] != first
        assert healthy(server)
