"""A load generator that costs little: streamed completions of OpenAI-compatible servers over bare sockets.

It shares the machine's cores with the server it measures: a chunk costs it some 5 µs, an HTTP client library's 100.
Knows no workload and no server's peculiarities.
"""

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec


class BenchmarkError(Exception):
    """A server refused, broke off or gave fewer tokens than asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed completion; times are ``time.perf_counter()`` seconds."""

    begin: float
    stamps: list[float]
    """Arrival of each event that brings tokens."""
    end: float
    """Arrival of the last token: many tokens of a long run may have no text."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the server's cache, as far as it tells."""
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.begin


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Exchange(asyncio.Protocol):
    """One connection, one request. ``finished`` gets None, or what went wrong."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._line = b""
        self._now = 0.0
        self.stamps: list[float] = []
        self.end = 0.0
        self.usage = _Usage()
        self.body = b""
        """Of a response that is no stream of events."""
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]  # a protocol of streams gets a writable transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ or error  # what a callback raised
            self._finish(f"{cause.__class__.__name__}: {cause}")

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self.body += body
            return
        *lines, self._line = (self._line + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
                event = _decode(line[5:])
                for choice in event.choices:
                    if choice.text or choice.finish_reason is None:
                        self.stamps.append(self._now)
                    self.end = self._now
                if event.usage is not None:
                    self.usage = event.usage
                if event.error is not None:
                    self._finish(str(event.error)[:300])

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._finish(None if status == 200 else f"{status} {self.body[:300].decode(errors='replace')}")

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(f"the connection was lost: {error or 'closed by the server'}")

    def _finish(self, error: str | None) -> None:
        if not self.finished.done():
            if error is None:
                self.finished.set_result(None)
            else:
                self.finished.set_exception(BenchmarkError(error))


async def complete(url: str, prompt: str, new: int, *, seconds: float = 900) -> Answer:
    """Stream one completion of exactly ``new`` tokens, greedy. Raises BenchmarkError, also on a shortfall.

    Each request has a connection of its own: reusing one races with servers that close theirs behind a stream.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    body = msgspec.json.encode(
        {
            "model": "default",
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(seconds):
            transport, exchange = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(head.encode() + body), parts.hostname, parts.port
            )
            try:
                await exchange.finished
            finally:
                transport.abort()
    except (OSError, TimeoutError) as error:
        raise BenchmarkError(f"{url}: {error.__class__.__name__}: {error}") from error
    usage = exchange.usage
    if usage.completion_tokens != new or not exchange.stamps:
        raise BenchmarkError(f"{url}: {usage.completion_tokens} tokens instead of {new}")
    cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
    return Answer(begin, exchange.stamps, exchange.end, usage.prompt_tokens, cached or 0, usage.completion_tokens)


async def run(url: str, requests: Iterable[tuple[str, int]], streams: int) -> list[Answer]:
    """(prompt, new tokens) one after the other, ``streams`` at a time. The first error ends it."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def stream() -> None:
        for prompt, new in waiting:
            answers.append(await complete(url, prompt, new))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return answers


async def arrive(url: str, requests: Sequence[tuple[str, int]], times: Sequence[float]) -> list[Answer]:
    """Each request at its time, in seconds from now, whatever became of those before it."""
    begin = time.perf_counter()

    async def one(request: tuple[str, int], at: float) -> Answer:
        await asyncio.sleep(begin + at - time.perf_counter())
        return await complete(url, *request)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(request, at)) for request, at in zip(requests, times, strict=True)]
    return [task.result() for task in tasks]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Figures of a load. Tokens per second count from the first request to the last token; a gap between tokens is
    one between two events of the same stream."""
    wall = max(answer.end for answer in answers) - min(answer.begin for answer in answers)
    first = [answer.first for answer in answers]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer.stamps)]
    spans = [answer.end - answer.stamps[0] for answer in answers if len(answer.stamps) > 1]
    figures = {
        "wall_s": wall,
        "tokens_s": sum(answer.tokens for answer in answers) / wall,
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "computed_tokens": sum(answer.prompt_tokens - answer.cached_tokens + answer.tokens for answer in answers),
        "ttft_p50_ms": 1e3 * statistics.median(first),
        "ttft_p99_ms": 1e3 * quantile(first, 0.99),
    }
    if gaps:
        decoding = [answer for answer in answers if len(answer.stamps) > 1]
        rates = [(a.tokens - 1) / span for a, span in zip(decoding, spans, strict=True) if span > 0]
        figures |= {
            "decode_tokens_s": statistics.median(rates) if rates else 0.0,
            "itl_p50_ms": 1e3 * statistics.median(gaps),
            "itl_p99_ms": 1e3 * quantile(gaps, 0.99),
            "itl_max_ms": 1e3 * max(gaps),
        }
    return figures


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
