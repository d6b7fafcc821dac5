"""What clients and operators should not do: nobody else notices, and who did it is told what was wrong."""

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.serve.conftest import Server
from tests.tiny import write_model

TOKENS = range(368)
IDLE = ("tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_queue_size")


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all clients of this file; at the end it must be as good as new."""
    folder = tmp_path_factory.mktemp("abuse")
    write_model(folder / "model", "llama")
    server = Server("--model-id", str(folder / "model"), log=folder / "log").wait_ready()
    before = server.generate("a b c", max_new_tokens=20)
    yield server
    assert server.generate("a b c", max_new_tokens=20) == before
    assert server.stop() == 0, server.output
    for word in ("ERROR", "Traceback", "books were wrong"):
        assert word not in server.output


def gauges(server: Server) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in httpx.get(f"{server.url}/metrics").text.splitlines())
    return {name: float(value) for name, _, value in lines if name in IDLE}


def comes_to_rest(server: Server) -> None:
    deadline = time.monotonic() + 20
    while any((now := gauges(server)).values()):
        assert time.monotonic() < deadline, now
        time.sleep(0.05)


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1e-46},
    {"temperature": 1e30, "top_k": 2**31 - 1},
    {"temperature": 1e-45, "repetition_penalty": 1e-45},
    {"repetition_penalty": 1e-30, "do_sample": True},
    {"repetition_penalty": 1e30, "do_sample": True, "top_n_tokens": 5},
    {"top_p": 1e-30, "typical_p": 1e-30},
    {"top_p": 0.99999999999, "typical_p": 0.99999999999},
    {"frequency_penalty": -2, "presence_penalty": 2, "seed": 2**64 - 1, "do_sample": True},
    {"logit_bias": {str(token): -100 for token in TOKENS}},
    {"logit_bias": {str(token): 100 for token in TOKENS}, "do_sample": True},
    {"stop": ["x" * 400_000] * 4},
    {"decoder_input_details": True, "truncate": 1},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: ",".join(parameters))
def test_extreme_settings_are_settings(abused: Server, parameters: dict[str, Any]):
    answer = abused.generate("hello", max_new_tokens=5, details=True, **parameters)
    tokens = answer["details"]["tokens"]  # type: ignore[index]  # any JSON
    assert len(tokens) == 5
    assert all(isinstance(token["logprob"], float) for token in tokens)


async def _misbehave(server: Server, chance: random.Random) -> None:
    """Ask for something long and leave at a random moment: politely, rudely, or after never having read a byte."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    tokens = chance.choice([5, 100, 250])
    path, body = chance.choice(
        [
            ("/generate", {"inputs": "a b " * 80, "parameters": {"max_new_tokens": tokens}}),
            ("/generate_stream", {"inputs": "a b c", "parameters": {"max_new_tokens": tokens}}),
            ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": tokens, "stream": chance.random() < 0.5}),
        ]
    )
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    writer.write((head.encode() + text)[: None if chance.random() < 0.9 else 120])
    await asyncio.sleep(chance.random())
    if chance.random() < 0.3:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


def test_clients_that_leave_take_everything_with_them(abused: Server):
    async def crowd() -> None:
        chance = random.Random(0)
        await asyncio.gather(*[_misbehave(abused, chance) for _ in range(300)])

    asyncio.run(crowd())
    comes_to_rest(abused)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 500}}
    with httpx.stream("POST", f"{abused.url}/generate_stream", json=body) as response:
        next(response.iter_lines())  # and leaves: the engine has nothing else to do
    comes_to_rest(abused)


def test_too_many_at_once_are_sent_away_and_the_rest_is_served(abused: Server):
    async def crowd() -> list[int]:
        body = {"inputs": "a b c", "parameters": {"max_new_tokens": 30}}
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            answers = await asyncio.gather(*[client.post(f"{abused.url}/generate", json=body) for _ in range(300)])
        return [answer.status_code for answer in answers]

    for _ in range(2):  # the second time shows that all permits came back
        codes = asyncio.run(crowd())
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 128
        comes_to_rest(abused)


def test_weights_that_are_no_numbers_fail_requests_and_nothing_else(tmp_path: Path):
    folder = write_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][300] = np.nan
    save_file(tensors, folder / "model.safetensors")
    server = Server("--model-id", str(folder), log=tmp_path / "log").wait_ready()

    async def crowd() -> list[httpx.Response]:
        async def ask(bias: int) -> httpx.Response:
            parameters = {"max_new_tokens": 40, "do_sample": True, "logit_bias": {"300": bias}}
            body = {"inputs": "a b c d", "parameters": parameters}
            return await client.post(f"{server.url}/generate", json=body)

        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*[ask(bias) for bias in (-100, 100) * 8])

    for _ in range(2):  # the second time in the cache's pages of the first
        answers = asyncio.run(crowd())
        assert [answer.status_code for answer in answers] == [200, 424] * 8
        assert "not a number" in answers[1].json()["error"]
    assert server.stop() == 0, server.output
