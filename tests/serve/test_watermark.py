"""The watermark of the real model: the detector finds what the server marked, and nothing else."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.conftest import LAUNCHER, Server
from tgi.core.watermark import detect
from tgi.launcher import flags

VOCABULARY = 49152
PROMPTS = ["Once upon a time", "The history of Rome", "My favourite recipe is"]
SAMPLED = {"do_sample": True, "seed": 1, "temperature": 1.0, "max_new_tokens": 150}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Fewer green tokens, which it favours more."""
    chosen = ["--watermark-gamma", "0.25", "--watermark-delta", "4", "--max-total-tokens", "256"]
    server = Server(*chosen, log=tmp_path_factory.mktemp("other") / "log").wait_ready()
    yield server
    assert server.stop() == 0, server.output


def answer(server: Server, prompt: str, **parameters: object) -> tuple[str, list[int]]:
    """(text, ids)"""
    made: Any = server.generate(prompt, details=True, **parameters)
    return made["generated_text"], [token["id"] for token in made["details"]["tokens"]]


def answers(server: Server, **parameters: object) -> list[tuple[str, list[int]]]:
    """To all prompts, in one batch."""
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        return list(clients.map(lambda prompt: answer(server, prompt, **parameters), PROMPTS))


def streamed(server: Server, prompt: str, **parameters: object) -> list[int]:
    body = {"inputs": prompt, "parameters": parameters}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=120) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    return [json.loads(line.removeprefix("data:"))["token"]["id"] for line in lines]


def command(text: str, *arguments: str) -> tuple[int, Any]:
    """(status, result) of the detector as an operator runs it."""
    program = LAUNCHER.with_name("text-generation-server")
    done = subprocess.run(
        [program, "detect-watermark", flags.DEFAULT_MODEL, "--json", *arguments],
        input=text.encode(),
        stdout=subprocess.PIPE,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout)


def test_a_watermark_is_found_in_its_text_and_in_no_other(server: Server) -> None:
    marked, plain = answers(server, **SAMPLED, watermark=True), answers(server, **SAMPLED)
    assert all(detect(ids, VOCABULARY, 0.5).z > 6 for _, ids in marked)
    assert all(detect(ids, VOCABULARY, 0.5).z < 4 for _, ids in plain)
    for (text, ids), expected in ((marked[0], 0), (plain[0], 1)):
        status, result = command(text)
        assert status == expected
        # The text may be cut into other tokens than those it was made of, though hardly anywhere.
        assert result["z"] == pytest.approx(detect(ids, VOCABULARY, 0.5).z, abs=1.5)


def test_share_and_strength_are_the_operator_s(other: Server) -> None:
    marked, plain = answers(other, **SAMPLED, watermark=True), answers(other, **SAMPLED)
    assert all(detect(ids, VOCABULARY, 0.25).z > 12 for _, ids in marked)
    assert all(detect(ids, VOCABULARY, 0.25).z < 4 for _, ids in plain)
    assert command(marked[0][0], "--watermark-gamma", "0.25", "--threshold", "12")[0] == 0


def test_greedy_texts_carry_it_too(other: Server) -> None:
    for text, ids in answers(other, watermark=True, max_new_tokens=100):
        assert detect(ids, VOCABULARY, 0.25).z > 4, text


def test_neighbours_and_streaming_change_nothing(server: Server) -> None:
    parameters = SAMPLED | {"watermark": True, "max_new_tokens": 60}
    together = answers(server, **parameters)
    for prompt, (text, ids) in zip(PROMPTS, together, strict=True):
        assert answer(server, prompt, **parameters) == (text, ids)
    assert streamed(server, PROMPTS[0], **parameters) == together[0][1]
