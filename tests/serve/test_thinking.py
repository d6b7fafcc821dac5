"""Reasoning by the real model: told apart, and brought to an end by a budget."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import Server

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model as if it had been taught to reason."""
    options = ["--device", "cpu", "--dtype", "float32", "--reasoning-parser", "think"]
    server = Server(*options, log=tmp_path_factory.mktemp("thinker") / "log").wait_ready(120)
    yield server
    assert server.stop() == 0, server.output


def body(budget: int | None = None, **fields: Any) -> dict[str, Any]:
    """The reply begins within reasoning."""
    return {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "<think>\nLet me"},
        ],
        "continue_final_message": True,
        "max_tokens": 80,
        "seed": 5,
        **({} if budget is None else {"thinking_budget": budget}),
        **fields,
    }


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(**fields), timeout=120)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def test_without_a_budget_this_model_never_stops_reasoning(thinker: Server) -> None:
    (choice,) = (answer := ask(thinker))["choices"]
    assert choice["finish_reason"] in ("length", "stop")
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("budget", [0, 1, 12])
def test_a_budget_brings_it_to_an_end(thinker: Server, budget: int) -> None:
    answer = ask(thinker, budget=budget, logprobs=True)
    (choice,) = answer["choices"]
    closing = 3  # tokens of the mark
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget + closing
    assert choice["message"]["content"]
    assert "think>" not in choice["message"]["content"]
    free = ask(thinker)["choices"][0]["message"]["reasoning_content"]
    assert free.startswith(choice["message"].get("reasoning_content", ""))
    assert all(token["logprob"] < 0 for token in choice["logprobs"]["content"])


def test_an_answer_behind_it_holds_its_schema(thinker: Server) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
    for seed in range(4):
        (choice,) = ask(thinker, budget=10, response_format=format, seed=seed, temperature=1.5)["choices"]
        assert choice["message"]["reasoning_content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"])["answer"], int)


def test_streams_and_answers_agree(thinker: Server) -> None:
    message = ask(thinker, budget=12)["choices"][0]["message"]
    client = openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", timeout=120)
    told = body(12)
    extra = {key: told.pop(key) for key in ("continue_final_message", "thinking_budget")}
    text = reasoning = ""
    for chunk in client.chat.completions.create(model="-", stream=True, extra_body=extra, **told):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert (text, reasoning) == (message["content"], message["reasoning_content"])


def test_the_native_route_is_raw(thinker: Server) -> None:
    answer = thinker.generate("<think>\nLet me", max_new_tokens=5)
    assert set(answer) == {"generated_text"}
