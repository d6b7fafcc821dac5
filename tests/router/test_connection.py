"""Clients that are slow, silent, deaf or gone: each ends by itself and holds no place of others."""

import socket
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.router.serving import LIMITS, Router, settings, until
from tgi.router import call, connection

HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def answer(client: socket.socket) -> bytes:
    """All that the server says until it hangs up."""
    client.settimeout(10)
    found = b""
    while data := client.recv(65536):
        found += data
    return found


@pytest.mark.parametrize("begun", [b"", b"GET /inf", HEAD, HEAD + b"x-a: "])
def test_a_head_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connection.Connection, "patience", 0.2)
    with Router(settings(tmp_path)) as router, socket.create_connection(router.address) as client:
        client.sendall(begun)
        assert answer(client)[:12] == (b"HTTP/1.1 408" if begun else b"")


def test_a_second_head_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.Connection, "patience", 0.5)
    with Router(settings(tmp_path)) as router, socket.create_connection(router.address) as client:
        client.sendall(b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(0.7)  # between requests the connection may rest for longer
        client.sendall(b"GET /info HTTP/1.1\r\nhost: x\r\n")
        assert b"HTTP/1.1 408" in answer(client)


def test_a_body_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "BODY_PATIENCE", 0.1)
    monkeypatch.setattr(call, "SLOWEST_BODY", 1_000_000)
    with Router(settings(tmp_path)) as router, socket.create_connection(router.address) as client:
        client.sendall(HEAD + b'content-length: 50\r\n\r\n{"inputs"')
        found = answer(client)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert found.endswith(b"took too long to arrive")


def test_half_closed_clients_are_gone(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.05) as router:
        with router.send_raw("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 90}}) as client:
            until(lambda: router.service.client.open == 1)
            client.shutdown(socket.SHUT_WR)
            assert answer(client) == b""
            until(lambda: router.service.client.open == 0)
        with socket.create_connection(router.address) as client:
            client.sendall(HEAD)
            client.shutdown(socket.SHUT_WR)
            assert answer(client) == b""


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel doesn't tell")
@pytest.mark.parametrize("ahead", [1, 3])
def test_clients_that_sent_requests_ahead_and_left_are_gone(tmp_path: Path, ahead: int) -> None:
    with Router(settings(tmp_path), delay=0.05) as router:
        with router.send_raw("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 150}}) as client:
            client.sendall(b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n" * ahead)
            until(lambda: router.service.client.open == 1)
        until(lambda: router.service.client.open == 0, 5)
        until(lambda: len(router.engine.cancels) == 1)


def test_requests_sent_ahead_are_answered_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GLANCE", 0.01)
    with Router(settings(tmp_path), delay=0.02) as router:
        router.says("a</s>")
        with router.send_raw("/generate", {"inputs": "x"}) as client:
            client.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
            client.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer(client).count(b"HTTP/1.1 200 OK") == 5


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
def test_a_client_that_never_reads_loses_its_place(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_concurrent_requests=1, max_total_tokens=200_000)
    with Router(settings(tmp_path, limits), reader_patience=1.0, per_step=500) as router, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(router.address)
        body = b'{"inputs":"the quick fox","parameters":{"max_new_tokens":100000,"top_n_tokens":5}}'
        client.sendall(HEAD.replace(b"generate", b"generate_stream") + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: router.generate(max_new_tokens=1).status_code == 429)
        until(lambda: router.generate(max_new_tokens=1).status_code == 200, 20)
        until(lambda: router.service.client.open == 0)
