"""Reasoning with the real model, which was taught none: the prompt opens it, and its budget or chance ends it. What
follows must be right in form all the same."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.real

BUDGET = 12
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
QUESTION = {"role": "user", "content": "How warm is it in Paris?"}
ASKED: dict[str, Any] = {
    "model": "tgi",
    "messages": [QUESTION, {"role": "assistant", "content": "<think>"}],
    "max_tokens": 150,
    "temperature": 1.5,
    "extra_body": {"thinking_budget": BUDGET, "continue_final_message": True},
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA}}
TOOLS: Any = [{"type": "function", "function": {"name": "forecast", "description": "Weather.", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--device", "cpu", "--dtype", "float32", "--reasoning-parser", "think", "--tool-call-parser", "hermes")
    server = Server(*options, log=tmp_path_factory.mktemp("serve") / "log").wait_ready(300)
    yield server
    assert server.stop() == 0, server.output


@pytest.fixture
def client(thinker: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def holds(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("seed", range(3))
def test_a_form_holds_behind_the_reasoning(client: openai.OpenAI, seed: int):
    answer = client.chat.completions.create(**ASKED, response_format=FORM, seed=seed)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content
    holds(choice.message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 1 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < BUDGET + 9  # the mark is several tokens
    chunks = client.chat.completions.create(**ASKED, response_format=FORM, seed=seed, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    thought = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    assert thought == choice.message.reasoning_content


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_behind_the_reasoning(client: openai.OpenAI, seed: int):
    choice = client.chat.completions.create(
        **ASKED, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    holds(call.function.arguments)


def test_a_budget_without_a_grammar(client: openai.OpenAI):
    for budget in (0, 5):
        body = ASKED["extra_body"] | {"thinking_budget": budget}
        answer = client.chat.completions.create(**ASKED | {"extra_body": body}, seed=1)
        message = answer.choices[0].message
        assert message.content
        assert bool(getattr(message, "reasoning_content", "")) == (budget > 0)


@pytest.mark.parametrize("seed", range(2))
def test_reasoning_that_nothing_opens(client: openai.OpenAI, seed: int):
    """The model may reason, and goes straight to what it must say."""
    asked = ASKED | {"messages": [QUESTION], "extra_body": {"enable_thinking": True}}
    choice = client.chat.completions.create(**asked, response_format=FORM, seed=seed).choices[0]
    if choice.finish_reason == "stop":
        holds(choice.message.content or "")
    else:
        assert choice.finish_reason == "length"


def test_anthropic(thinker: Server):
    asked: dict[str, Any] = {"model": "tgi", "max_tokens": 60, "thinking": {"type": "enabled", "budget_tokens": BUDGET}}
    asked |= {"messages": ASKED["messages"], "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=thinker.url, api_key="-", max_retries=0) as claude:
        answer = claude.messages.create(**asked)
        assert [block.type for block in answer.content] == ["thinking", "text"]
        with claude.messages.stream(**asked) as stream:
            streamed = stream.get_final_message().content
        assert [block.type for block in streamed] == [block.type for block in answer.content]
        assert streamed[0].to_dict() == answer.content[0].to_dict()
