import socket
from pathlib import Path

import msgspec
import pytest

from tgi.core.messages import FRAME, Cancel, Delta, Hello, Ping, Pong, Step, ToRouter, frame
from tgi.engine.mailbox import Gone, Mailbox


@pytest.fixture
def mailbox(tmp_path: Path):
    box = Mailbox(tmp_path / "engine.sock", Hello(7))
    yield box
    box.close()


def connect(mailbox: Mailbox, tmp_path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "engine.sock"))
    client.settimeout(5)
    assert list(mailbox.poll(wait=True)) == []
    assert receive(client) == Hello(7)
    return client


def receive(client: socket.socket) -> ToRouter:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += client.recv(count - len(data))
        return data

    (length,) = FRAME.unpack(exactly(FRAME.size))
    return msgspec.msgpack.decode(exactly(length), type=ToRouter)


def test_the_socket_of_an_engine_that_was_killed_is_taken_over(tmp_path: Path):
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    box = Mailbox(path, Hello(7))
    connect(box, tmp_path).close()
    box.close()


def test_messages_arrive_whole_however_they_are_cut(mailbox: Mailbox, tmp_path: Path):
    with connect(mailbox, tmp_path) as client:
        data = frame(Ping(1)) + frame(Cancel(2)) + frame(Ping(3))
        got = []
        for at in range(0, len(data), 3):
            client.sendall(data[at : at + 3])
            got += [message for _, message in mailbox.poll(wait=True)]
        assert got == [Ping(1), Cancel(2), Ping(3)]


def test_a_router_that_does_not_read_stops_nobody(mailbox: Mailbox, tmp_path: Path):
    with connect(mailbox, tmp_path) as slow, connect(mailbox, tmp_path) as quick:
        big = Step([Delta(1, 0, [], embedding=[0.5] * 100_000)])
        for _ in range(20):
            mailbox.send(0, big)
        mailbox.send(1, Pong(1))
        assert receive(quick) == Pong(1)
        for _ in range(20):
            for _ in mailbox.poll(wait=False):
                pass
            # What didn't fit into the socket follows as the router reads.
            slow.setblocking(True)
            length = FRAME.unpack(slow.recv(FRAME.size, socket.MSG_WAITALL))[0]
            body = b""
            while len(body) < length:
                body += slow.recv(length - len(body))
                list(mailbox.poll(wait=False))
            assert msgspec.msgpack.decode(body, type=ToRouter) == big


@pytest.mark.parametrize("garbage", [FRAME.pack(1 << 30), FRAME.pack(3) + b"\xff\xff\xff"])
def test_a_broken_router_is_dropped_and_others_stay(mailbox: Mailbox, tmp_path: Path, garbage: bytes):
    with connect(mailbox, tmp_path) as bad, connect(mailbox, tmp_path) as good:
        bad.sendall(garbage)
        ((name, message),) = mailbox.poll(wait=True)
        assert (name, type(message)) == (0, Gone)
        good.sendall(frame(Ping(9)))
        assert list(mailbox.poll(wait=True)) == [(1, Ping(9))]
        mailbox.send(0, Pong(1))  # to nobody
        assert mailbox.oldest == 1


def test_a_closed_connection_is_told_once(mailbox: Mailbox, tmp_path: Path):
    connect(mailbox, tmp_path).close()
    ((name, message),) = mailbox.poll(wait=True)
    assert (name, type(message)) == (0, Gone)
    assert list(mailbox.poll(wait=False)) == []
    assert mailbox.oldest == -1
