"""The load generator against servers of a few lines: what it counts, what it refuses, how packets may be cut."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest

from client import Answer, BenchmarkError, arrive, complete, quantile, run, summary


def event(text: str) -> bytes:
    return f'data: {{"choices":[{{"index":0,"text":"{text}","finish_reason":null}}],"usage":null}}\n\n'.encode()


LAST = (
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":5}}}'
    b"\n\ndata: [DONE]\n\n"
)
EVENTS = event("a") + event("é") + event("") + LAST
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def against(response: bytes, packet: int, use: Callable[[str], object]) -> object:
    """What ``use`` of the URL gives while a server answers everything so, in packets of that many bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
        await reader.readexactly(length)
        for at in range(0, len(response), packet):
            writer.write(response[at : at + packet])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def whole() -> object:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")  # type: ignore[misc]  # awaitable

    return asyncio.run(whole())


@pytest.mark.parametrize("packet", [3, 50, 10_000])
@pytest.mark.parametrize("chunk", [1, 17, 10_000])
def test_events_are_read_however_they_are_cut(packet: int, chunk: int) -> None:
    answer = against(OK + chunked(EVENTS, chunk), packet, lambda url: complete(url, "x", 3))
    assert isinstance(answer, Answer)
    assert len(answer.stamps) == 3
    assert (answer.prompt_tokens, answer.cached_tokens, answer.tokens) == (7, 5, 3)
    assert answer.begin < answer.stamps[0] <= answer.stamps[-1] <= answer.end


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy", "429 busy"),
        (OK + chunked(event("a") + b'data: {"error":{"message":"no memory"}}\n\n', 9), "no memory"),
        (OK + chunked(EVENTS, 40)[:-30], "connection was lost"),
        (OK + chunked(EVENTS.replace(b'completion_tokens":3', b'completion_tokens":2'), 40), "2 tokens instead of 3"),
        (OK + chunked(b"data: {nonsense\n\n", 40), "DecodeError"),
        (b"nonsense\r\n\r\n", "HttpParser"),
    ],
)
def test_what_goes_wrong_is_told(response: bytes, told: str) -> None:
    with pytest.raises(BenchmarkError, match=told):
        against(response, 1000, lambda url: complete(url, "x", 3))


def test_nobody_there_is_told() -> None:
    with pytest.raises(BenchmarkError, match="ConnectionRefused"):
        asyncio.run(complete("http://127.0.0.1:9", "x", 3))


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(BenchmarkError, match="Timeout"):
        asyncio.run(complete(f"http://127.0.0.1:{silent.getsockname()[1]}", "x", 3, seconds=0.05))


def test_streams_share_the_requests() -> None:
    answers = against(OK + chunked(EVENTS, 40), 1000, lambda url: run(url, [("x", 3)] * 7, 3))
    assert isinstance(answers, list) and len(answers) == 7


def test_arrivals_come_at_their_times() -> None:
    answers = against(OK + chunked(EVENTS, 40), 1000, lambda url: arrive(url, [("x", 3)] * 2, [0.0, 0.1]))
    assert isinstance(answers, list)
    assert answers[1].begin - answers[0].begin >= 0.09


def test_a_summary_counts_from_the_first_request_to_the_last_token() -> None:
    answers = [Answer(1.0, [2.0, 2.1, 2.3], 2.4, 10, 4, 5), Answer(1.5, [4.0], 5.0, 10, 0, 1)]
    figures = summary(answers)
    assert figures["wall_s"] == pytest.approx(4.0)
    assert figures["tokens_s"] == pytest.approx(6 / 4.0)
    assert figures["ttft_p50_ms"] == pytest.approx(1750)
    assert figures["itl_p50_ms"] == pytest.approx(150)
    assert figures["itl_max_ms"] == pytest.approx(200)
    assert figures["decode_tokens_s"] == pytest.approx(4 / 0.4)
    assert figures["computed_tokens"] == 6 + 5 + 10 + 1


def test_quantiles_are_values_that_occur() -> None:
    values = list(range(1, 101))
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([3.0], 0.01) == 3.0
