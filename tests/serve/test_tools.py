"""Tools with the real model, which is too small to call them well: what it calls must be right in form all the same."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.real


class Place(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12)
    country: Literal["FR", "DE", "IT"]


class Weather(pydantic.BaseModel):
    """The weather in some places."""

    places: list[Place] = pydantic.Field(min_length=1, max_length=2)
    days: int = pydantic.Field(ge=1, le=7)
    unit: Literal["celsius", "fahrenheit"] | None


class Add(pydantic.BaseModel):
    """Add two numbers."""

    a: int = pydantic.Field(ge=-1000, le=1000)
    b: int = pydantic.Field(ge=-1000, le=1000)


MODELS = {model.__name__: model for model in (Weather, Add)}
ASKED: dict[str, Any] = {
    "model": "tgi",
    "messages": [{"role": "user", "content": "How warm is it in Paris, and what is 17 + 4?"}],
    "tools": [openai.pydantic_function_tool(model) for model in MODELS.values()],
    "max_tokens": 200,
}


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_hold_their_schemas(client: openai.OpenAI, seed: int):
    choice = client.chat.completions.create(
        **ASKED, tool_choice="required", parallel_tool_calls=seed % 2 == 0, temperature=1.5, seed=seed
    ).choices[0]
    calls = choice.message.tool_calls
    if choice.finish_reason == "length":
        calls = calls[:-1]  # cut, or whole by chance
    else:
        assert choice.finish_reason == "tool_calls"
        assert calls
    assert choice.message.content is None
    for call in calls:
        MODELS[call.function.name].model_validate_json(call.function.arguments, strict=True)


def test_a_named_function_streams_what_the_whole_answer_says(client: openai.OpenAI):
    request = ASKED | {"tool_choice": {"type": "function", "function": {"name": "Weather"}}, "temperature": 0}
    (whole,) = client.chat.completions.parse(**request).choices
    (call,) = whole.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert whole.finish_reason == "tool_calls"
    with client.chat.completions.stream(**request, stream_options={"include_usage": True}) as stream:
        parts = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        streamed = stream.get_final_completion()
    assert "".join(parts) == call.function.arguments
    assert len(parts) > 3
    assert streamed.choices[0].finish_reason == "tool_calls"
    assert streamed.choices[0].message.tool_calls[0].function == call.function
    assert streamed.usage.completion_tokens > len(parts)


@pytest.mark.parametrize(
    ("question", "calls"), [("How warm is it in Paris, and what is 17 + 4?", True), ("What is 17 + 4?", False)]
)
def test_auto_leaves_the_choice_to_the_model(client: openai.OpenAI, server: Server, question: str, calls: bool):
    """One run: what would have begun with a brace is a call, and everything else is said as without the grammar."""
    messages = [{"role": "user", "content": question}]
    request = ASKED | {"messages": messages, "tools": ASKED["tools"][1:], "temperature": 0, "max_tokens": 40}
    choice = client.chat.completions.create(**request).choices[0]
    prompt = httpx.post(f"{server.url}/chat_tokenize", json=request).json()["templated_text"]
    free = client.completions.create(
        model="tgi", prompt=prompt, temperature=0, max_tokens=40, extra_body={"add_special_tokens": False}
    ).choices[0]
    assert free.text.lstrip().startswith("{") == calls
    if calls:
        assert [call.function.name for call in choice.message.tool_calls] == ["Add"]
        assert choice.message.content is None
    else:
        assert choice.message.tool_calls is None
        assert (choice.message.content, choice.finish_reason) == (free.text, free.finish_reason)


def test_results_of_calls_are_answered(client: openai.OpenAI):
    request = ASKED | {"tool_choice": "Add", "temperature": 0}
    message = client.chat.completions.create(**request).choices[0].message
    (call,) = message.tool_calls
    assert MODELS["Add"].model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps(21)}
    answer = client.chat.completions.create(
        model="tgi", messages=[*ASKED["messages"], message, result], temperature=0, max_tokens=10
    ).choices[0]
    assert answer.message.content


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI):
    function = {"name": "f", "parameters": {"properties": {"a": {"not": {"type": "null"}}}}}
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.chat.completions.create(**ASKED | {"tools": [{"type": "function", "function": function}]})
    assert "tool `f`" in str(error.value)


# --- In a format that models are taught ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The same model, whose replies are taken for those of a Hermes. It was taught no calls, but repeats them."""
    options = ["--device", "cpu", "--dtype", "float32", "--tool-call-parser", "hermes"]
    server = Server(*options, log=tmp_path_factory.mktemp("hermes") / "log").wait_ready(300)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client
    assert server.stop() == 0, server.output


def called(number: int) -> list[dict[str, Any]]:
    """A question, its call and the result."""
    arguments = json.dumps({"a": number, "b": 1})
    call = {"id": f"call_{number}", "type": "function", "function": {"name": "Add", "arguments": arguments}}
    return [
        {"role": "user", "content": f"Add {number} and 1."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{number}", "content": str(number + 1)},
    ]


def test_a_model_that_calls_by_itself(taught: openai.OpenAI):
    """From its first mark on the call is the grammar's."""
    messages: Any = [*called(3), *called(5), *called(8), {"role": "user", "content": "Add 7 and 1."}]
    request = ASKED | {"messages": messages, "tools": ASKED["tools"][1:], "temperature": 0}
    whole = taught.chat.completions.parse(**request).choices[0]
    assert whole.finish_reason == "tool_calls"
    for call in whole.message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Add)
    with taught.chat.completions.stream(**request) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert [call.function for call in streamed.message.tool_calls] == [
        call.function for call in whole.message.tool_calls
    ]
    assert streamed.finish_reason == "tool_calls"


def test_text_of_a_model_that_may_call(taught: openai.OpenAI):
    messages: Any = [{"role": "user", "content": "Say hello."}]
    choice = taught.chat.completions.create(**ASKED | {"messages": messages, "temperature": 0}).choices[0]
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_are_required(taught: openai.OpenAI, seed: int):
    """As many as the model likes, unless one only is asked for."""
    request = ASKED | {"tool_choice": "required", "temperature": 1.5, "max_tokens": 400}
    several = taught.chat.completions.create(**request, seed=seed).choices[0]
    single = taught.chat.completions.create(**request, seed=seed, parallel_tool_calls=False).choices[0]
    for choice in (several, single):
        assert choice.message.content is None
        for call in choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]:
            MODELS[call.function.name].model_validate_json(call.function.arguments, strict=True)
    assert len(single.message.tool_calls) == 1
