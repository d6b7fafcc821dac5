"""OpenAI's responses over HTTP, mostly through OpenAI's own client."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from msgspec.structs import replace
from openai.types.responses import Response, ResponseStreamEvent

from tests.router.serving import LIMITS, Router, settings
from tests.router.test_http_anthropic import named_events
from tgi.router.store import ResponseStore, Stored

ROOM = replace(LIMITS, max_input_tokens=2000, max_total_tokens=4000, max_batch_prefill_tokens=4000)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
ARGUMENTS = '{"city": "Größe \\"☃\\"", "days": 7}'
CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"), ROOM)) as router:
        yield router


@pytest.fixture(scope="module")
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def ask(router: Router, **fields: Any) -> httpx.Response:
    return router.http.post("/v1/responses", json={"input": "hello"} | fields)


def last_prompt(router: Router) -> str:
    return router.service.tokenizer.decode(router.engine.submits[-1].token_ids, skip_special_tokens=False)


def prompt(router: Router, *items: dict[str, Any], **fields: Any) -> str:
    """What the engine was asked."""
    router.says("a</s>")
    assert ask(router, **({"input": items} if items else {}), **fields).raise_for_status()
    return last_prompt(router)


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_a_response(router: Router) -> None:
    ids = router.says("the dog</s>")
    response = ask(router, model="m", metadata={"a": "b"}, temperature=0.5, tools=TOOLS, user="me", instructions="Hm.")
    assert response.status_code == 200
    assert response.headers["x-generated-tokens"] == str(len(ids))
    answer = response.json()
    name = answer["id"].removeprefix("resp_")
    assert re.fullmatch("[0-9a-f]{32}", name)
    given = len(router.engine.submits[-1].token_ids)
    assert answer["created_at"] <= answer["completed_at"]
    assert answer == {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": answer["created_at"],
        "completed_at": answer["completed_at"],
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "a/model",
        "output": [
            {
                "type": "message",
                "id": f"msg_{name}_0",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "the dog", "annotations": [], "logprobs": []}],
            }
        ],
        "usage": {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": given + len(ids),
        },
        "instructions": "Hm.",
        "previous_response_id": None,
        "store": False,
        "max_output_tokens": None,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_logprobs": 0,
        "tools": [TOOLS[0] | {"description": None}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "metadata": {"a": "b"},
        "user": "me",
        "safety_identifier": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None, "generate_summary": None, "context": None, "mode": None},
        "service_tier": "default",
        "background": False,
    }


def test_a_stream(router: Router) -> None:
    router.says("the dog</s>")
    response = ask(router, stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    events = named_events(response.text)
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    created, in_progress, *rest, completed = events
    begun = created["response"]
    assert created == {"type": "response.created", "response": begun}
    assert in_progress == {"type": "response.in_progress", "response": begun}
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    (item,) = completed["response"]["output"]
    at = {"output_index": 0, "item_id": item["id"], "content_index": 0}
    (part,) = item["content"]
    message = {"type": "message", "id": item["id"], "status": "in_progress", "role": "assistant", "content": []}
    assert rest == [
        {"type": "response.output_item.added", "output_index": 0, "item": message},
        {"type": "response.content_part.added", **at, "part": part | {"text": ""}},
        {"type": "response.output_text.delta", **at, "delta": "the", "logprobs": []},
        {"type": "response.output_text.delta", **at, "delta": " dog", "logprobs": []},
        {"type": "response.output_text.done", **at, "text": "the dog", "logprobs": []},
        {"type": "response.content_part.done", **at, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    assert completed["type"] == "response.completed"
    assert ask(router).json() | {"id": "", "output": [], "completed_at": 0} == completed["response"] | {
        "id": "",
        "output": [],
        "completed_at": 0,
        "created_at": ask(router).json()["created_at"],
    }


def test_the_stream_of_a_call(router: Router) -> None:
    router.says(f"{CALL}</s>")
    _, _, added, *deltas, done, item_done, completed = named_events(ask(router, tools=TOOLS, stream=True).text)
    (item,) = completed["response"]["output"]
    assert re.fullmatch("fc_[0-9a-f]{32}_0", item["id"])
    assert item == {
        "type": "function_call",
        "id": item["id"],
        "call_id": item["call_id"],
        "name": "weather",
        "arguments": ARGUMENTS,
        "status": "completed",
    }
    assert added["item"] == item | {"arguments": "", "status": "in_progress"}
    assert {event["type"] for event in deltas} == {"response.function_call_arguments.delta"}
    assert len(deltas) > 5
    assert "".join(event["delta"] for event in deltas) == ARGUMENTS
    assert done["type"] == "response.function_call_arguments.done"
    assert (done["item_id"], done["name"], done["arguments"]) == (item["id"], "weather", ARGUMENTS)
    assert item_done["type"] == "response.output_item.done"
    assert item_done["item"] == item
    assert completed["type"] == "response.completed"


@pytest.mark.parametrize(
    ("says", "fields", "items", "status"),
    [
        ("the quick ☃</s>", {}, ["message"], "completed"),
        ("the quick ☃</s>", {"include": LOGPROBS}, ["message"], "completed"),
        ("the quick ☃</s>", {"top_logprobs": 2}, ["message"], "completed"),
        ("</s>", {}, ["message"], "completed"),
        ("the quick dog", {"max_output_tokens": 2}, ["message"], "incomplete"),
        (f"{CALL}</s>", {"tools": TOOLS}, ["function_call"], "completed"),
        (f"{CALL}\n{CALL}</s>", {"tools": TOOLS, "parallel_tool_calls": True}, ["function_call"] * 2, "completed"),
        (f"{CALL}</s>", {"tools": TOOLS, "max_output_tokens": 60}, ["function_call"], "incomplete"),
        (f"{CALL}</s>", {}, ["message"], "completed"),
    ],
)
def test_the_stream_adds_up_to_the_whole(
    router: Router, client: openai.OpenAI, says: str, fields: dict[str, Any], items: list[str], status: str
) -> None:
    router.says(says)
    fields = {"model": "m", "input": "hello"} | fields
    whole = Response.model_validate_json(ask(router, **fields).content)
    assert [item.type for item in whole.output] == items
    assert whole.status == whole.output[-1].status == status  # type: ignore[union-attr]  # all that we make have one
    event = pydantic.TypeAdapter[Any](ResponseStreamEvent)
    told = named_events(ask(router, **fields, stream=True).text)
    for data in told:
        event.validate_python(data)
    finals = [Response.model_validate(told[-1]["response"])]
    assert told[-1]["type"] == f"response.{status}"
    if status == "completed":  # the client's helper waits for nothing else
        with client.responses.stream(**fields) as stream:
            finals.append(stream.get_final_response())

    async def slowly() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
            answer = await client.responses.create(**fields)
            return answer, [event async for event in await client.responses.create(**fields, stream=True)]

    answer, streamed = asyncio.run(slowly())
    text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in streamed if event.type == "response.function_call_arguments.delta")
    for final in (*finals, answer, streamed[-1].response):
        assert final.status == status
        assert final.incomplete_details == whole.incomplete_details
        assert final.usage == whole.usage
        assert final.output_text == whole.output_text == text
        calls = [item.arguments for item in final.output if item.type == "function_call"]
        assert "".join(calls) == arguments
        assert [item.type for item in final.output] == items
    if items == ["function_call"] and status == "completed":
        assert arguments == ARGUMENTS


def test_logprobs_spell_out_the_text(router: Router) -> None:
    ids = router.says("cat ☃</s>")
    told = named_events(ask(router, top_logprobs=2, stream=True).text)
    (part,) = told[-1]["response"]["output"][0]["content"]
    assert [entry["logprob"] for entry in part["logprobs"]] == [-(n + 1) / 8 for n in range(len(ids) - 1)]
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == "cat ☃"
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == part["logprobs"]
    (done,) = (event for event in told if event["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]
    (part,) = ask(router, include=LOGPROBS).json()["output"][0]["content"]
    assert [entry["top_logprobs"] for entry in part["logprobs"]] == [[]] * (len(ids) - 1)


def test_cached_tokens(tmp_path: Path) -> None:
    with Router(settings(tmp_path), cached=5) as router:
        router.says("a</s>")
        assert ask(router).json()["usage"]["input_tokens_details"]["cached_tokens"] == 5


# --- Requests --------------------------------------------------------------------------------------------------------


def test_prompts(router: Router) -> None:
    user = {"role": "user", "content": "hello"}
    assert prompt(router) == "<user>hello;<assistant>"
    assert prompt(router, user) == prompt(router, user | {"type": "message"}) == prompt(router)
    parts = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
    assert prompt(router, user | {"content": parts}) == prompt(router)
    assert prompt(router, instructions="Be brief.") == "<system>Be brief.;<user>hello;<assistant>"
    assert prompt(router, user | {"role": "developer"}) == "<system>hello;<assistant>"
    written = {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": None}],
    }
    assert prompt(router, user, written, user) == "<user>hello;<assistant>hi;<user>hello;<assistant>"
    assert prompt(router, user, {"role": "assistant", "content": "hi"}, user) == prompt(router, user, written, user)
    refusal = written | {"content": [{"type": "refusal", "refusal": "no"}]}
    # What the assistant said last is not gone on with.
    assert prompt(router, user, refusal) == "<user>hello;<assistant>no;<assistant>"


def test_what_the_assistant_did_in_a_row_is_one_message(router: Router, client: openai.OpenAI) -> None:
    router.says(f"{CALL}\n{CALL}</s>")
    answer = client.responses.create(input="hello", model="m", tools=TOOLS, parallel_tool_calls=True)
    calls = [item for item in answer.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    parts = [{"type": "input_text", "text": "no"}, {"type": "input_text", "text": " sun"}]
    said = {"role": "assistant", "content": "Look:"}
    items: Any = [
        {"role": "user", "content": "hello"},
        said,
        *answer.output,
        results[0],
        results[1] | {"output": parts},
    ]
    router.says("fine</s>")
    assert client.responses.create(input=items, model="m").output_text == "fine"
    arguments = json.dumps(json.loads(ARGUMENTS), ensure_ascii=False)
    called = ", ".join(
        f'{{"id": "{call.call_id}", "type": "function", "function": {{"name": "weather", "arguments": {arguments}}}}}'
        for call in calls
    )
    assert last_prompt(router) == f"<user>hello;<assistant>Look:[{called}];<tool>sunny;<tool>no sun;<assistant>"


def test_reasoning_goes_to_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.router.serving.TEMPLATE", "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    )
    full = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "h"}]}
    said = {"role": "assistant", "content": "hi"}
    with Router(settings(tmp_path)) as router:
        assert prompt(router, full, said, max_output_tokens=1) == "<h>hi"
        full["content"] = [{"type": "reasoning_text", "text": "hm"}]
        assert prompt(router, full, said, max_output_tokens=1) == "<hm>hi"
        assert prompt(router, {"type": "reasoning", "encrypted_content": "x"}, said, max_output_tokens=1) == "<>hi"


def test_every_field_reaches_the_engine(router: Router) -> None:
    router.says("a</s>")
    assert ask(router).status_code == 200
    submit = router.engine.submits[-1]
    assert (submit.sampling.greedy, submit.sampling.temperature, submit.sampling.top_p) == (False, 1, 1)
    assert submit.max_new_tokens == 4000 - len(submit.token_ids)
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 7,
        "top_logprobs": 3,
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "frequency_penalty": 1,
        "presence_penalty": -1,
        "logit_bias": {"5": 3},
        "seed": 9,
        "ignore_eos": True,
        "min_tokens": 2,
        "priority": 4,
        "cache_salt": "x",
        "stop": None,
    }
    assert ask(router, **fields).status_code == 200
    submit = router.engine.submits[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.25)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, 1, -1)
    assert (sampling.logit_bias, sampling.seed, sampling.min_tokens, sampling.top_n_tokens) == ({5: 3}, 9, 2, 3)
    assert (submit.stop_token_ids, submit.max_new_tokens, submit.priority) == ([], 7, 4)
    assert submit.cache_salt
    for greedy in ({"temperature": 0}, {"top_p": 0}):
        assert ask(router, **greedy).status_code == 200
        assert router.engine.submits[-1].sampling.greedy
    router.says("the quick dog</s>")
    assert ask(router, stop=" dog").json()["output"][0]["content"][0]["text"] == "the quick"


def test_tool_choice(router: Router) -> None:
    router.says("a</s>")

    def grammar(**fields: Any) -> str:
        assert ask(router, **{"tools": TOOLS} | fields).raise_for_status()
        return router.engine.submits[-1].sampling.grammar

    assert grammar() == grammar(tool_choice="auto") != ""
    assert grammar(tool_choice="none") == grammar(tools=None) == ""
    assert grammar(tool_choice="required") != grammar()
    assert grammar(tool_choice={"type": "function", "name": "weather"}) == grammar(
        tool_choice="required", parallel_tool_calls=False
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"store": None},
        {"background": False},
        {"truncation": "disabled"},
        {"service_tier": "auto"},
        {"reasoning": {"effort": None}},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"summary": "auto", "generate_summary": "auto", "context": "auto", "mode": "standard"}},
        {"include": ["reasoning.encrypted_content"]},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"include": []},
        {"stream_options": {"include_obfuscation": False}},
        {"prompt_cache_key": "x", "safety_identifier": "y"},
        {"prompt_cache_retention": "in_memory"},
    ],
)
def test_what_changes_nothing_is_accepted(router: Router, fields: dict[str, Any]) -> None:
    router.says("a</s>")
    assert ask(router, **fields).status_code == 200


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "hello"}, fields]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": None}, "input: "),
        ({"input": []}, "`input` must not be empty"),
        ({"max_output_tokens": 0}, "max_output_tokens: "),
        ({"max_output_tokens": 4000}, "`max_new_tokens` must be <= 4000. Given: "),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"top_p": 1.5}, "`top_p` must be >= 0.0 and <= 1.0"),
        ({"top_logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5"),
        ({"metadata": {"a": 1}}, "metadata"),
        (item(type="item_reference", id="msg_1"), "input[1]: items of type `item_reference` are not supported"),
        (item(type="computer_call"), "input[1]: items of type `computer_call` are not supported"),
        (item(content="x"), "input[1]: an item of type `message` needs `role`"),
        (item(role="user"), "input[1]: an item of type `message` needs `content`"),
        (item(type="function_call", name="f", arguments="{}"), "needs `call_id`"),
        (item(type="function_call_output", call_id="1"), "needs `output`"),
        (item(role="user", content=[{"type": "input_image", "image_url": "x"}]), "`input_image` is not supported"),
        (item(role="user", content=[{"type": "input_file", "file_id": "x"}]), "`input_file` is not supported"),
        (item(role="user", content=[{"type": "input_audio"}]), "input[1].content[0].type: Invalid value"),
        (
            item(type="function_call_output", call_id="1", output=[{"type": "input_image"}]),
            "`input_image` is not supported",
        ),
        ({"truncation": "auto"}, "`truncation` is not supported"),
        ({"service_tier": "flex"}, "`service_tier` is not supported"),
        ({"background": True}, "`background` is not supported"),
        ({"background_options": {}}, "`background_options` is not supported"),
        ({"conversation": "conv_1"}, "`conversation` is not supported"),
        ({"prompt": {"id": "x"}}, "`prompt` is not supported"),
        ({"prompt_cache_retention": "24h"}, "`prompt_cache_retention` is not supported"),
        ({"prompt_cache_options": {}}, "`prompt_cache_options` is not supported"),
        ({"max_tool_calls": 1}, "`max_tool_calls` is not supported"),
        ({"context_management": [{}]}, "`context_management` is not supported"),
        ({"moderation": {}}, "`moderation` is not supported"),
        ({"access_programs": {}}, "`access_programs` is not supported"),
        ({"image": {}}, "`image` is not supported"),
        ({"reasoning": {"effort": "low"}}, "`reasoning_effort` is not supported"),
        ({"reasoning": {"summary": "detailed"}}, "`reasoning.summary` is not supported"),
        ({"reasoning": {"context": "all_turns"}}, "`reasoning.context` is not supported"),
        ({"reasoning": {"mode": "pro"}}, "`reasoning.mode` is not supported"),
        ({"enable_thinking": True}, "`enable_thinking` is not supported"),
        ({"thinking_budget": 9}, "`thinking_budget` is not supported"),
        ({"text": {"verbosity": "low"}}, "`text.verbosity` is not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "`text.format` of type `json_schema` needs a `name`"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type: "),
        ({"include": ["file_search_call.results"]}, "`include` of `file_search_call.results` is not supported"),
        ({"stream_options": {"include_obfuscation": True}}, "`stream_options.include_obfuscation` is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools of type `web_search` are not supported"),
        ({"tools": [{"type": "function"}]}, "a tool of type `function` needs a `name`"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "`tool_choice` of type `mcp` is not supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "`tool_choice` of type `function` needs a `name`"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "Tool with name f not found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_name(router: Router, fields: dict[str, Any], words: str, stream: bool) -> None:
    router.says("a</s>")
    response = ask(router, **fields, stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.pop("message").find(words) >= 0, response.text
    assert error == {"type": "invalid_request_error", "param": None, "code": None}


# --- Stored responses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_stored_can_be_had_again_and_forgotten(router: Router, client: openai.OpenAI, stream: bool) -> None:
    router.says("the dog</s>")
    fields: dict[str, Any] = {"model": "m", "input": "hello", "store": True}
    if stream:
        answer = list(client.responses.create(**fields, stream=True))[-1].response
    else:
        answer = client.responses.create(**fields)
    assert client.responses.retrieve(answer.id).to_dict() == answer.to_dict()
    assert router.http.delete(f"/v1/responses/{answer.id}").json() == {
        "id": answer.id,
        "object": "response",
        "deleted": True,
    }
    for forgotten in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as error:
            forgotten(answer.id)
        assert answer.id in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**fields, previous_response_id=answer.id)


def test_what_another_router_could_not_find_is_not_stored(tmp_path: Path) -> None:
    with Router(settings(tmp_path, router_workers=2)) as router:
        response = router.http.post("/v1/responses", json={"model": "m", "input": "hello", "store": True})
        assert response.status_code == 400
        assert "`store: true`" in response.text and "--router-workers" in response.text
        assert router.http.post("/v1/responses", json={"model": "m", "input": "hello"}).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"store": False}, {"store": None}])
def test_only_what_is_asked_for_is_stored(router: Router, fields: dict[str, Any]) -> None:
    router.says("a</s>")
    before = len(router.service.responses)
    answer = ask(router, **fields).json()
    assert (answer["store"], len(router.service.responses)) == (False, before)
    assert router.http.get(f"/v1/responses/{answer['id']}").status_code == 404


def test_conversations_go_on(router: Router, client: openai.OpenAI) -> None:
    router.says(f"{CALL}</s>")
    first = client.responses.create(model="m", input="hello", tools=TOOLS, instructions="Hm.", store=True)
    (call,) = first.output
    assert call.type == "function_call"
    router.says("sunny</s>")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    second = client.responses.create(model="m", input=[result], previous_response_id=first.id, store=True)
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)  # each stored response has the whole conversation
    client.responses.create(model="m", input="thanks", previous_response_id=second.id)
    assert re.fullmatch(
        r"<user>hello;<assistant>\[.*\];<tool>sun;<assistant>sunny;<user>thanks;<assistant>", last_prompt(router)
    )


def test_other_uses_of_stored_responses(router: Router) -> None:
    router.says("a</s>")
    path = f"/v1/responses/{ask(router, store=True).json()['id']}"
    assert router.http.get(path).status_code == 200
    response = router.http.get(path, params={"stream": "true"})
    assert (response.status_code, "`stream`" in response.text) == (400, True)
    response = router.http.post(f"{path}/cancel")
    assert (response.status_code, "`background`" in response.text) == (400, True)
    assert router.http.get(f"{path}/input_items").status_code == 404


def test_the_store_is_bounded() -> None:
    def stored(size: int) -> Stored:
        return Stored(b"x" * (size - 1), b"x")

    store = ResponseStore(max_responses=3, max_bytes=10)
    for id in "abc":
        store.put(id, stored(2))
    assert store.get("a") == stored(2)  # asked for last
    store.put("d", stored(2))
    assert [id for id in "abcd" if store.get(id)] == ["a", "c", "d"]
    store.put("e", stored(8))
    assert [id for id in "acde" if store.get(id)] == ["d", "e"]
    assert not store.delete("a")
    assert store.delete("e")
    store.put("f", stored(8))
    assert [id for id in "df" if store.get(id)] == ["d", "f"]
    store.put("g", stored(11))  # nobody makes room for what can't be kept
    assert [id for id in "dfg" if store.get(id)] == ["d", "f"]
    store.put("h", stored(10))
    assert store.get("h") == stored(10)


# --- Errors ----------------------------------------------------------------------------------------------------------


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return response.status_code, error["type"], error["code"]


def test_what_is_no_request(router: Router) -> None:
    kind = {"content-type": "application/json"}
    for body, headers in ((b"{", kind), (b"[]", kind), (b"{}", {}), (b"{}", kind)):
        response = router.http.post("/v1/responses", content=body, headers=headers)
        assert error_of(response) == (400, "invalid_request_error", None)
    response = router.http.post("/v1/responses", content=b" " * (LIMITS.payload_limit + 1), headers=kind)
    assert error_of(response) == (413, "invalid_request_error", None)


def test_keys(tmp_path: Path) -> None:
    with Router(settings(tmp_path, api_key="k"), engine=False) as router:
        for method, path in (("POST", ""), ("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/cancel")):
            response = router.http.request(method, f"/v1/responses{path}")
            assert error_of(response) == (401, "invalid_request_error", "invalid_api_key")
        client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="k", max_retries=0)
        with client, pytest.raises(openai.NotFoundError):
            client.responses.retrieve("x")


def test_failures_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.router.pipeline.ENGINE_PATIENCE", 0.05)
    with Router(settings(tmp_path, replace(LIMITS, max_concurrent_requests=0))) as router:
        assert error_of(ask(router)) == (429, "rate_limit_error", "rate_limit_exceeded")
    with Router(settings(tmp_path)) as router:
        router.reply = lambda submit: "out of luck"
        response = ask(router, store=True)
        assert error_of(response) == (500, "server_error", None)
        assert response.json()["error"]["message"].endswith("out of luck")
        assert len(router.service.responses) == 0
    with Router(settings(tmp_path), engine=False) as router:
        assert error_of(ask(router)) == (503, "server_error", None)


def test_a_stream_that_fails(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        events = []
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
            for event in client.responses.create(model="m", input="hello", stream=True, store=True):
                events.append(event)
                if event.type == "response.output_text.delta":
                    router.engine.fault("out of luck")
        error, failed = events[-2:]
        assert error.type == "error"
        assert error.code == "server_error"
        assert error.message.startswith("Request failed during generation: ")
        assert failed.type == "response.failed"
        assert (failed.response.status, failed.response.error.message) == ("failed", error.message)
        assert failed.response.usage.output_tokens > 0
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert len(router.service.responses) == 0
        assert router.metric('tgi_request_failure{err="generation"}') == 1
