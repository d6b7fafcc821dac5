"""OpenAI's responses and Anthropic's messages, by their makers' clients, from the real server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.real

QUESTION = "What is the opposite of hot?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


# --- Anthropic -------------------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "model": "tgi",
    "max_tokens": 40,
    "messages": [{"role": "user", "content": QUESTION}],
    "extra_body": {"temperature": 0},
}
TOOLS: Any = [{"name": "forecast", "description": "The weather in a city.", "input_schema": SCHEMA}]


def test_anthropic(server: Server, claude: anthropic.Anthropic):
    answer = claude.messages.create(**ASKED)
    (block,) = answer.content
    assert block.type == "text"
    assert "cold" in block.text.lower()
    assert answer.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().stop_reason == answer.stop_reason

    async def slowly() -> str:
        client = anthropic.AsyncAnthropic(base_url=server.url, api_key="-", max_retries=0)
        async with client, client.messages.stream(**ASKED) as stream:
            return await stream.get_final_text()

    assert asyncio.run(slowly()) == block.text


def test_anthropic_counts_tokens_and_finds_them_in_its_cache(claude: anthropic.Anthropic):
    system = "You answer in one word. " * 20
    count = claude.messages.count_tokens(model="tgi", system=system, messages=ASKED["messages"]).input_tokens
    for read_at_least in (0, 64):
        usage = claude.messages.create(**ASKED, system=system).usage
        read = usage.cache_read_input_tokens or 0
        assert read >= read_at_least
        assert usage.input_tokens + read == count


def test_anthropic_stop_sequences_and_first_words(claude: anthropic.Anthropic):
    counting: Any = [{"role": "user", "content": "Count to ten."}, {"role": "assistant", "content": "1, 2, 3, 4,"}]
    answer = claude.messages.create(**ASKED | {"messages": counting}, stop_sequences=["7"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "7")
    assert answer.content[0].to_dict() == {"type": "text", "text": " 5, 6, "}


def test_anthropic_tools(claude: anthropic.Anthropic):
    asked = ASKED | {"tools": TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 100}
    answer = claude.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.name == "forecast"
    assert call.input["city"] in ("Rome", "Oslo")
    assert type(call.input["days"]) is int
    with claude.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    turns: Any = [
        *asked["messages"],
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    last = claude.messages.create(**asked | {"messages": turns, "tool_choice": {"type": "none"}})
    assert last.content[0].type == "text"


def test_anthropic_structured_output(claude: anthropic.Anthropic):
    answer = claude.messages.create(
        **ASKED | {"max_tokens": 100}, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}
    )
    assert answer.content[0].type == "text"
    assert set(json.loads(answer.content[0].text)) == {"city", "days"}


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def test_responses(server: Server, client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tgi", "input": QUESTION, "max_output_tokens": 60, "temperature": 0}
    answer = client.responses.create(**asked, store=True)
    assert "cold" in answer.output_text.lower()
    streamed = list(client.responses.create(**asked, stream=True))
    text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
    last = streamed[-1]
    assert last.type == f"response.{answer.status}"
    assert text == last.response.output_text == answer.output_text  # type: ignore[union-attr]  # the last has one
    second = client.responses.create(
        model="tgi", input="Say it again.", previous_response_id=answer.id, max_output_tokens=9, temperature=0
    )
    assert second.usage is not None
    assert answer.usage is not None
    assert second.usage.input_tokens > answer.usage.total_tokens
    client.responses.delete(answer.id)


class Forecast(pydantic.BaseModel):
    city: str
    days: int


def test_responses_structured_output(client: openai.OpenAI):
    answer = client.responses.parse(
        model="tgi", input=QUESTION, text_format=Forecast, max_output_tokens=100, temperature=0
    )
    assert isinstance(answer.output_parsed, Forecast)


def test_responses_tools(client: openai.OpenAI):
    tools: Any = [{"type": "function", "name": "forecast", "parameters": SCHEMA, "strict": True}]
    asked: dict[str, Any] = {"model": "tgi", "input": QUESTION, "max_output_tokens": 100, "temperature": 0}
    answer = client.responses.create(**asked, tools=tools, tool_choice="required")
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    with client.responses.stream(**asked, tools=tools, tool_choice="required") as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    turns: Any = [{"role": "user", "content": QUESTION}, call, result]
    assert client.responses.create(**asked | {"input": turns}).output_text
