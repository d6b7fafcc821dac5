"""The demo model through the whole server: its answers, and what its answers may not depend on."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.serve.conftest import Server
from tgi.kernels.library import library

pytestmark = pytest.mark.real

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969 the first person walked on",
    "Water boils at 100 degrees",
    "Once upon a time, in a small village",
    "Die Hauptstadt von Deutschland ist",
    "🙂 emoji and ünïcode",
    "1 2 3 4 5 6 7 8",
]


def chat(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tgi", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def test_the_opposite_of_hot_is_cold(server: Server):
    answer = chat(server, "What is the opposite of hot?", max_tokens=30)
    assert "cold" in answer["choices"][0]["message"]["content"].lower()
    assert answer["usage"]["completion_tokens"] <= 30


def test_next_token_distributions_equal_the_references(server: Server, reference: Any):
    """transformers on the same weights in fp32, through its own GGUF reader."""
    for prompt in PROMPTS:
        ids = [token["id"] for token in httpx.post(f"{server.url}/tokenize", json={"inputs": prompt}).json()]
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        answer = server.generate(prompt, max_new_tokens=1, details=True, top_n_tokens=5)
        for token in answer["details"]["top_tokens"][0]:  # type: ignore[index]  # JSON
            assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=1e-4), prompt


def test_prompt_logprobs_equal_the_references(server: Server, reference: Any):
    prompt = " ".join(PROMPTS)
    answer = server.generate(prompt, max_new_tokens=1, decoder_input_details=True)
    prefill = answer["details"]["prefill"]  # type: ignore[index]  # JSON
    ids = torch.tensor([token["id"] for token in prefill])
    with torch.inference_mode():
        logprobs = reference(ids[None]).logits[0, :-1].log_softmax(-1)
    assert prefill[0]["logprob"] is None
    got = torch.tensor([token["logprob"] for token in prefill[1:]])
    torch.testing.assert_close(got, logprobs.gather(1, ids[1:, None]).squeeze(1), atol=1e-3, rtol=0)


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Requests of every kind: greedy and sampled, short and long, penalties, warpers, stops, top tokens."""
    chance = random.Random(7)
    requests = []
    for number in range(count):
        prompt = " ".join(chance.choice(PROMPTS) for _ in range(chance.choice([1, 1, 2, 20])))
        parameters: dict[str, Any] = {"max_new_tokens": chance.choice([1, 5, 20, 40]), "details": True}
        if number % 2:
            parameters |= {"do_sample": True, "seed": number, "temperature": chance.choice([0.5, 0.9, 1.3])}
            if chance.random() < 0.5:
                parameters |= {"top_k": chance.choice([5, 50])}
            if chance.random() < 0.5:
                parameters |= {"top_p": chance.choice([0.7, 0.95])}
            if chance.random() < 0.2:
                parameters |= {"typical_p": 0.9}
        if chance.random() < 0.3:
            parameters |= {"repetition_penalty": 1.2}
        if chance.random() < 0.3:
            parameters |= {"frequency_penalty": 0.5}
        if chance.random() < 0.3:
            parameters |= {"stop": [" the", "\n"]}
        if chance.random() < 0.3:
            parameters |= {"top_n_tokens": 3}
        requests.append({"inputs": prompt, "parameters": parameters})
    return requests


async def together(server: Server, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Their answers, all at once."""
    limits = httpx.Limits(max_connections=len(requests))
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        answers = await asyncio.gather(*[client.post("/generate", json=request) for request in requests])
        return [answer.raise_for_status().json() for answer in answers]


def check_alone(server: Server, requests: Sequence[dict[str, Any]], crowd: Sequence[dict[str, Any]]) -> None:
    """Each gets the same tokens when it comes alone; with native kernels the same log-probabilities, to the bit."""
    info = httpx.get(f"{server.url}/info").json()
    exact = library() is not None and info["device"] == "cpu"
    assert info["implementation"]["model"].startswith("tgi.models.dense, by the row of LlamaForCausalLM")
    assert info["implementation"]["forward"] == "as one recorded program" or not exact
    assert info["implementation"]["attention"] == ["native" if exact else "sdpa"]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for request, answer in zip(requests, crowd, strict=True):
            alone = client.post("/generate", json=request).raise_for_status().json()
            if exact:
                assert alone == answer, request
            assert [t["id"] for t in alone["details"]["tokens"]] == [t["id"] for t in answer["details"]["tokens"]], (
                request
            )
            assert alone["generated_text"] == answer["generated_text"]
            assert alone["details"]["finish_reason"] == answer["details"]["finish_reason"]


def test_64_concurrent_mixed_requests_give_what_each_gives_alone(server: Server):
    requests = mixed_requests(64)
    check_alone(server, requests, asyncio.run(together(server, requests)))


@pytest.mark.skipif(library() is None, reason="only the native kernels have these")
@pytest.mark.parametrize(
    ("options", "sane"),
    [
        ([], True),
        (["--dtype", "bfloat16"], True),
        (["--quantize", "int8", "--kv-cache-dtype", "int8"], True),
        (["--quantize", "fp8", "--kv-cache-dtype", "fp8_e4m3fn"], True),
        (["--quantize", "int4"], False),  # rounds what was 4-bit before once more
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_precision_answers_the_same_to_the_bit(tmp_path: Path, options: list[str], sane: bool):
    server = Server("--device", "cpu", *options, log=tmp_path / "log").wait_ready(300)
    try:
        if sane:
            answer = chat(server, "What is the opposite of hot?", max_tokens=30)
            assert "cold" in answer["choices"][0]["message"]["content"].lower()
        requests = mixed_requests(16)
        check_alone(server, requests, asyncio.run(together(server, requests)))
    finally:
        assert server.stop() == 0, server.output


def test_the_stream_says_what_the_answer_says(server: Server):
    body = {"inputs": PROMPTS[6], "parameters": {"max_new_tokens": 40, "details": True}}
    whole = httpx.post(f"{server.url}/generate", json=body, timeout=120).json()
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=120) as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == whole["generated_text"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert [e["token"]["id"] for e in events] == [t["id"] for t in whole["details"]["tokens"]]


def test_a_disconnected_client_frees_its_place(server: Server):
    def running() -> float:
        for line in httpx.get(f"{server.url}/metrics").text.splitlines():
            if line.startswith("tgi_batch_current_size "):
                return float(line.split()[1])
        return 0.0

    body = {"inputs": "Count: 1 2 3", "parameters": {"max_new_tokens": 4000}}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
        next(response.iter_lines())
    # The next request's steps report the batch size; the abandoned one must be gone from it.
    server.generate("Hello", max_new_tokens=3)
    assert running() <= 1
