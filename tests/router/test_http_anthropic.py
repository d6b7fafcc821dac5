"""Anthropic's messages over HTTP, mostly through Anthropic's own client."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from msgspec.structs import replace

from tests.router.serving import LIMITS, Router, settings

ROOM = replace(LIMITS, max_input_tokens=2000, max_total_tokens=4000, max_batch_prefill_tokens=4000)

ASKED: dict[str, Any] = {"model": "m", "max_tokens": 200, "messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"name": "weather", "description": "The weather somewhere.", "input_schema": SCHEMA}]
ARGUMENTS = '{"city": "Größe \\"☃\\"", "days": 7}'
CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"), ROOM)) as router:
        yield router


@pytest.fixture(scope="module")
def client(router: Router) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=0) as client:
        yield client


def ask(router: Router, **fields: Any) -> httpx.Response:
    return router.http.post("/v1/messages", json=ASKED | fields)


def prompt(router: Router, **fields: Any) -> str:
    """What the engine was asked."""
    router.says("a</s>")
    assert ask(router, **fields).raise_for_status()
    return router.service.tokenizer.decode(router.engine.submits[-1].token_ids, skip_special_tokens=False)


def named_events(content: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events. Fails on any that isn't named as its type is."""
    assert content.endswith("\n\n")
    found = []
    for block in content[:-2].split("\n\n"):
        match = re.fullmatch("event: (.*)\ndata: (.*)", block)
        assert match, block
        found.append(json.loads(match[2]))
        assert found[-1]["type"] == match[1]
    return found


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_a_message(router: Router) -> None:
    ids = router.says("the dog</s>")
    response = ask(router)
    assert response.status_code == 200
    assert re.fullmatch("req_[0-9a-f]{32}", response.headers["request-id"])
    assert response.headers["x-generated-tokens"] == str(len(ids))
    answer = response.json()
    assert re.fullmatch("msg_[0-9a-f]{32}", answer.pop("id"))
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "a/model",
        "content": [{"type": "text", "text": "the dog"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(router.engine.submits[-1].token_ids),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(ids),
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_a_stream(router: Router) -> None:
    router.says("the dog</s>")
    response = ask(router, stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    assert re.fullmatch("req_[0-9a-f]{32}", response.headers["request-id"])
    start, *rest, stop = named_events(response.text)
    usage: dict[str, Any] = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    usage["output_tokens_details"] = {"thinking_tokens": 0}
    usage["input_tokens"] = len(router.engine.submits[-1].token_ids)
    message = start["message"]
    assert start["type"] == "message_start"
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    assert message["usage"] == usage | {"output_tokens": 1}
    assert rest == [
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "the"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " dog"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": usage | {"output_tokens": 3},
        },
    ]
    assert stop == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("says", "fields", "blocks", "reason"),
    [
        ("the quick ☃</s>", {}, ["text"], "end_turn"),
        ("</s>", {}, ["text"], "end_turn"),
        ("the quick dog", {"max_tokens": 2}, ["text"], "max_tokens"),
        ("the quick brown fox", {"stop_sequences": ["zzz", "n fo"]}, ["text"], "stop_sequence"),
        (f"{CALL}</s>", {"tools": TOOLS}, ["tool_use"], "tool_use"),
        (f"{CALL}\n{CALL}</s>", {"tools": TOOLS}, ["tool_use", "tool_use"], "tool_use"),
        (f"{CALL}</s>", {"tools": TOOLS, "max_tokens": 60}, ["tool_use"], "max_tokens"),
        (f"{CALL}</s>", {}, ["text"], "end_turn"),
    ],
)
def test_the_stream_adds_up_to_the_whole(
    router: Router, client: anthropic.Anthropic, says: str, fields: dict[str, Any], blocks: list[str], reason: str
) -> None:
    router.says(says)
    response = ask(router, **fields)
    whole = Message.model_validate_json(response.content, strict=True)
    assert [block.type for block in whole.content] == blocks
    assert whole.stop_reason == reason
    event = pydantic.TypeAdapter[Any](RawMessageStreamEvent)
    for data in named_events(ask(router, **fields, stream=True).text):
        if data["type"] != "ping":
            event.validate_python(data, strict=True)
    with client.messages.stream(**ASKED | fields) as stream:
        folded = stream.get_final_message()

    async def folded_slowly() -> Any:
        async with anthropic.AsyncAnthropic(base_url=router.url, api_key="-", max_retries=0) as client:
            assert len((await client.messages.create(**ASKED | fields)).content) == len(blocks)
            async with client.messages.stream(**ASKED | fields) as stream:
                return await stream.get_final_message()

    cut_in_a_call = reason == "max_tokens" and blocks == ["tool_use"]
    for streamed in (folded, asyncio.run(folded_slowly())):
        assert streamed.stop_reason == whole.stop_reason
        assert streamed.stop_sequence == whole.stop_sequence
        assert streamed.usage == whole.usage
        for theirs, ours in zip(streamed.content, whole.content, strict=True):
            if theirs.type == ours.type == "text":
                assert theirs.text == ours.text
            elif theirs.type == ours.type == "tool_use":
                assert theirs.name == ours.name == "weather"
                assert re.fullmatch("[a-zA-Z0-9_-]+", ours.id)
                # Where the tokens ran out the client makes of the beginning what it can.
                assert ours.input == ({} if cut_in_a_call else json.loads(ARGUMENTS))
                assert cut_in_a_call or theirs.input == ours.input
                assert str(theirs.input["city"]).startswith("Größe")
            else:
                raise AssertionError((theirs, ours))


def test_stop_sequences_are_told_and_removed(client: anthropic.Anthropic, router: Router) -> None:
    router.says("the quick brown fox</s>")
    answer = client.messages.create(**ASKED, stop_sequences=["zzz", "n fo"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "n fo")
    assert answer.content[0].to_dict() == {"type": "text", "text": "the quick brow"}


def test_cached_tokens_are_no_input_tokens(tmp_path: Path) -> None:
    with Router(settings(tmp_path), cached=5) as router:
        ids = router.says("a b</s>")
        usage = ask(router, max_tokens=9).json()["usage"]
        given = len(router.engine.submits[-1].token_ids)
        expected: dict[str, Any] = {"input_tokens": given - 5, "cache_read_input_tokens": 5}
        expected |= {"cache_creation_input_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}
        assert usage == expected | {"output_tokens": len(ids)}
        start, *_, delta, _ = named_events(ask(router, max_tokens=9, stream=True).text)
        assert start["message"]["usage"] == expected | {"output_tokens": 1}
        assert delta["usage"] == usage


# --- Requests --------------------------------------------------------------------------------------------------------


def test_prompts(router: Router) -> None:
    def text(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}

    user = {"role": "user", "content": "hello"}
    assert prompt(router) == "<user>hello;<assistant>"
    assert prompt(router, system="Be brief.") == "<system>Be brief.;<user>hello;<assistant>"
    assert prompt(router, system=[text("Be "), text("brief.")]) == "<system>Be brief.;<user>hello;<assistant>"
    assert prompt(router, messages=[{"role": "user", "content": [text("hel"), text("lo")]}]) == prompt(router)
    again = [user, {"role": "assistant", "content": "hi"}, user]
    assert prompt(router, messages=again) == "<user>hello;<assistant>hi;<user>hello;<assistant>"
    # Successive messages of one role are one turn, and the system may have a word in between.
    assert prompt(router, messages=[user, user]) == "<user>hellohello;<assistant>"
    told = [user, {"role": "system", "content": "Be brief."}]
    assert prompt(router, messages=told) == "<user>hello;<system>Be brief.;<assistant>"


def test_a_last_word_by_the_assistant_is_gone_on_with(router: Router, client: anthropic.Anthropic) -> None:
    begun = [*ASKED["messages"], {"role": "assistant", "content": "Well, the"}]
    assert prompt(router, messages=begun) == "<user>hello;<assistant>Well, the"
    router.says(" dog</s>")
    answer = client.messages.create(**ASKED | {"messages": begun})
    assert answer.content[0].to_dict() == {"type": "text", "text": " dog"}


def test_tool_results(router: Router, client: anthropic.Anthropic) -> None:
    router.says(f"{CALL}\n{CALL}</s>")
    answer = client.messages.create(**ASKED, tools=TOOLS)
    calls = [block for block in answer.content if block.type == "tool_use"]
    parts = [{"type": "text", "text": "no"}, {"type": "text", "text": " sun"}]
    results: Any = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "sunny"},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": parts, "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    said = [block.to_dict() for block in answer.content]
    turns: Any = [*ASKED["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    router.says("fine</s>")
    assert client.messages.create(**ASKED | {"messages": turns}, tools=TOOLS).stop_reason == "end_turn"
    ids = router.engine.submits[-1].token_ids
    text = router.service.tokenizer.decode(ids, skip_special_tokens=False)
    arguments = json.dumps(json.loads(ARGUMENTS), ensure_ascii=False)
    calls_text = ", ".join(
        f'{{"id": "{call.id}", "type": "function", "function": {{"name": "weather", "arguments": {arguments}}}}}'
        for call in calls
    )
    assert f"<assistant>[{calls_text}];<tool>sunny;<tool>Error: no sun;<user>Go on." in text
    empty = [*turns[:2], {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]
    assert "<tool>;<assistant>" in prompt(router, messages=empty)


def test_reasoning_goes_to_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.router.serving.TEMPLATE", "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    )
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": [thought, hidden, {"type": "text", "text": "hi"}]},
        *ASKED["messages"],
    ]
    with Router(settings(tmp_path)) as router:
        assert prompt(router, messages=messages, max_tokens=1) == "<>hello<hm>hi<>hello"


def test_sampling(router: Router) -> None:
    router.says("a</s>")
    assert ask(router).status_code == 200
    sampling = router.engine.submits[-1].sampling
    assert (sampling.greedy, sampling.temperature, sampling.top_p, sampling.top_k) == (False, 1, 1, 0)
    assert ask(router, temperature=0.5, top_p=0.9, top_k=7, max_tokens=9).status_code == 200
    submit = router.engine.submits[-1]
    sampling = submit.sampling
    assert (sampling.greedy, sampling.temperature, sampling.top_p, sampling.top_k) == (False, 0.5, 0.9, 7)
    assert submit.max_new_tokens == 9
    for fields in ({"temperature": 0}, {"top_p": 0}):
        assert ask(router, **fields).status_code == 200
        assert router.engine.submits[-1].sampling.greedy


def test_tool_choice(router: Router) -> None:
    router.says("a</s>")

    def grammar(**fields: Any) -> str:
        assert ask(router, **{"tools": TOOLS} | fields).raise_for_status()
        return router.engine.submits[-1].sampling.grammar

    any_, auto = {"type": "any"}, {"type": "auto"}
    assert grammar() == grammar(tool_choice=auto) != ""
    assert grammar(tool_choice={"type": "none"}) == grammar(tools=None) == ""
    assert "text" not in grammar(tool_choice=any_)
    single = grammar(tool_choice=any_ | {"disable_parallel_tool_use": True})
    assert single == grammar(tool_choice=any_) != grammar(tool_choice=any_ | {"disable_parallel_tool_use": False})
    assert single == grammar(tool_choice={"type": "tool", "name": "weather"})


def test_what_changes_nothing_is_accepted(router: Router) -> None:
    router.says("a</s>")
    fields: dict[str, Any] = {
        "metadata": {"user_id": "u"},
        "service_tier": "standard_only",
        "thinking": {"type": "adaptive", "display": "summarized"},
        "cache_control": {"type": "ephemeral"},
        "speed": "standard",
        "output_config": {},
        "tools": [TOOLS[0] | {"type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
        "stop_sequences": [],
        "top_k": 0,
    }
    for name, value in fields.items():
        assert ask(router, **{name: value}).status_code == 200, name
    assert router.http.post("/v1/messages?beta=true", json=ASKED).status_code == 200


def content(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [*ASKED["messages"], {"role": role, "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 4000}, "`max_new_tokens` must be <= 4000. Given: "),
        ({"temperature": 1.1}, "temperature: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"stop_sequences": ["a"] * 5}, "`stop` supports up to 4 stop sequences"),
        ({"messages": []}, "`messages` must not be empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: Invalid enum value 'tool'"),
        ({"messages": [{"role": "user", "content": []}]}, "a message of role `user` has no content"),
        ({"system": [IMAGE]}, "system[0]"),
        (content(IMAGE), "`image` is not supported in `user`"),
        (content({"type": "document", "source": {}}), "`document` is not supported in `user`"),
        (content({"type": "search_result"}), "content[0].type: Invalid value 'search_result'"),
        (content(USE), "`tool_use` is not supported in `user`"),
        (content({"type": "thinking", "thinking": "x"}), "`thinking` is not supported in `user`"),
        (content(USE, role="assistant"), "the last message has a `tool_use` without a `tool_result`"),
        (
            content({"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}),
            "`image` is not supported in `tool_result`",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "`enable_thinking` is not supported"),
        ({"thinking": {"type": "enabled"}}, "`thinking` of type `enabled` needs `budget_tokens`"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "`thinking` of type `enabled` needs `budget_tokens`"),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}, "max_tokens": 99}, "must be less than `max_tokens`"),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 9}},
            "`thinking` of type `disabled` has no `budget_tokens`",
        ),
        ({"thinking": {"type": "between_tools"}}, "`thinking` of type `between_tools` is not supported"),
        ({"thinking": {"type": "adaptive", "display": "x"}}, "thinking.display: "),
        ({"output_config": {"effort": "low"}}, "`reasoning_effort` is not supported"),
        ({"speed": "fast"}, "`speed` is not supported"),
        ({"mcp_servers": [{}]}, "`mcp_servers` is not supported"),
        ({"context_management": {}}, "`context_management` is not supported"),
        ({"container": "x"}, "`container` is not supported"),
        ({"diagnostics": {}}, "`diagnostics` is not supported"),
        ({"inference_geo": "eu"}, "`inference_geo` is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "`web_search_20250305`"),
        ({"tools": [{"name": "f"}]}, "tool `f` needs an `input_schema`"),
        ({"tools": [TOOLS[0] | {"input_examples": [{}]}]}, "`tools.input_examples` is not supported"),
        ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "`tools.defer_loading` is not supported"),
        ({"tools": [TOOLS[0] | {"allowed_callers": ["x"]}]}, "`tools.allowed_callers` is not supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "`tool_choice` of type `tool` needs a `name`"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "Tool with name f not found"),
        ({"tool_choice": {"type": "any"}}, "`tool_choice` of type `any` needs `tools`"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_name(router: Router, fields: dict[str, Any], words: str, stream: bool) -> None:
    router.says("a</s>")
    response = ask(router, **fields, stream=stream)
    assert response.status_code == 400
    error = response.json()
    assert error["error"].pop("message").find(words) >= 0, response.text
    request_id = response.headers["request-id"]
    assert error == {"type": "error", "error": {"type": "invalid_request_error"}, "request_id": request_id}


def test_counting_tokens(router: Router, client: anthropic.Anthropic) -> None:
    router.says("a</s>")
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    for fields in ({}, {"system": "Be brief."}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": {"type": "any"}}):
        fields |= asked
        count = client.messages.count_tokens(**fields)
        assert count.input_tokens == client.messages.create(**fields, max_tokens=1).usage.input_tokens
    response = router.http.post("/v1/messages/count_tokens", json=asked)
    assert list(response.json()) == ["input_tokens"]
    assert response.headers["request-id"].startswith("req_")
    refused = router.http.post("/v1/messages/count_tokens", json=asked | {"thinking": {"type": "between_tools"}})
    assert refused.status_code == 400
    assert "`thinking`" in refused.json()["error"]["message"]


# --- Errors ----------------------------------------------------------------------------------------------------------


def error_type(response: httpx.Response) -> str:
    error = response.json()
    assert error["type"] == "error"
    assert error["request_id"] == response.headers["request-id"]
    assert error["error"]["message"]
    kind: str = error["error"]["type"]
    return kind


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_is_no_request(router: Router, path: str) -> None:
    kind = {"content-type": "application/json"}
    for body, headers in ((b"{", kind), (b"[]", kind), (b"{}", {}), (b"{}", kind)):
        response = router.http.post(path, content=body, headers=headers)
        assert (response.status_code, error_type(response)) == (400, "invalid_request_error")
    response = router.http.post(path, content=b" " * (LIMITS.payload_limit + 1), headers=kind)
    assert (response.status_code, error_type(response)) == (413, "request_too_large")


def test_keys(tmp_path: Path) -> None:
    with Router(settings(tmp_path, api_key="Käse-1"), engine=False) as router:
        path, body = "/v1/messages/count_tokens", {"model": "m", "messages": ASKED["messages"]}
        for headers in ({"x-api-key": "Käse-1"}, {"authorization": "Bearer Käse-1"}):
            encoded = {name.encode(): value.encode() for name, value in headers.items()}
            assert router.http.post(path, json=body, headers=encoded).status_code == 200
            response = router.http.post("/generate", json={"inputs": ""}, headers=encoded)
            assert (response.status_code == 401) == ("x-api-key" in headers)
        for headers in ({}, {"x-api-key": ""}, {"x-api-key": "x"}, {"x-api-key": "Bearer x"}, {"authorization": "x"}):
            response = router.http.post(path, json=body, headers=headers)
            assert (response.status_code, error_type(response)) == (401, "authentication_error")
        with (
            anthropic.Anthropic(base_url=router.url, api_key="x") as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(**ASKED)


def test_failures_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.router.pipeline.ENGINE_PATIENCE", 0.05)
    with Router(settings(tmp_path, replace(LIMITS, max_concurrent_requests=0))) as router:
        response = ask(router, max_tokens=1)
        assert (response.status_code, error_type(response)) == (429, "rate_limit_error")
    with Router(settings(tmp_path)) as router:
        router.reply = lambda submit: "out of luck"
        response = ask(router, max_tokens=1)
        assert (response.status_code, error_type(response)) == (500, "api_error")
        assert response.json()["error"]["message"].endswith("out of luck")
        assert "x-compute-type" not in response.headers
    with Router(settings(tmp_path), engine=False) as router:
        response = ask(router, max_tokens=1)
        assert (response.status_code, error_type(response)) == (529, "overloaded_error")


def test_a_stream_that_fails(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        with (
            anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=0) as client,
            client.messages.stream(**ASKED | {"max_tokens": 100}) as stream,
            pytest.raises(anthropic.APIStatusError) as error,
        ):
            for event in stream:
                if event.type == "text":
                    router.engine.fault("out of luck")
        assert error.value.body == {
            "type": "error",
            "error": {"type": "api_error", "message": error.value.body["error"]["message"]},  # type: ignore[index]
            "request_id": error.value.request_id,
        }
        assert router.metric('tgi_request_failure{err="generation"}') == 1
