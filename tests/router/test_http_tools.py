"""Tools over HTTP, as applications use them."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from huggingface_hub import InferenceClient
from msgspec.structs import replace

from tests.router.serving import LIMITS, TEMPLATE, Router, events, settings
from tests.router.test_chat_families import SOURCES
from tgi.router.tools import TOOL_PROMPT

ROOM = replace(LIMITS, max_input_tokens=2000, max_total_tokens=4000, max_batch_prefill_tokens=4000, max_batch_size=8)

FUNCTION = {
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = '{"city": "Größe \\"☃\\"", "days": 7}'
CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
QUESTION = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """The template knows nothing of tools."""
    with Router(settings(tmp_path_factory.mktemp("model"), ROOM)) as router:
        yield router


@pytest.fixture(scope="module")
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def choice(router: Router, **fields: Any) -> Any:
    """The whole answer's only choice, after a look at whether its stream says the same."""
    fields = {"tools": TOOLS, "seed": 1} | fields
    (whole,) = router.chat(**fields).raise_for_status().json()["choices"]
    *chunks, done = events(router.chat(**fields, stream=True).raise_for_status().content)
    assert done == "[DONE]"
    streamed: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        streamed["content"] += delta["content"] or ""
        for call in delta["tool_calls"] or []:
            if "id" in call:
                assert list(call) == ["index", "id", "type", "function"]
                assert call["index"] == len(streamed["tool_calls"])
                streamed["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
            else:
                assert list(call) == ["index", "function"]
                assert call["function"]["name"] is None
                streamed["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        assert (chunk is chunks[-1]) == (chunk["choices"][0]["finish_reason"] is not None)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    message = whole["message"]
    assert streamed["content"] == (message["content"] or "")
    for theirs, ours in zip(streamed["tool_calls"], message.get("tool_calls", []), strict=True):
        assert theirs["function"] == ours["function"]
        assert theirs["id"] != ours["id"]
    return whole


def test_a_call(router: Router) -> None:
    ids = router.says(CALL + "</s>")
    answer = choice(router)
    (call,) = answer["message"].pop("tool_calls")
    assert answer["message"] == {"role": "assistant", "content": None}
    assert answer["finish_reason"] == "tool_calls"
    assert re.fullmatch("call_[0-9a-f]{24}", call.pop("id"))
    assert call == {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    usage = router.chat(tools=TOOLS).json()["usage"]
    assert usage["completion_tokens"] == len(ids)
    assert usage["prompt_tokens"] == len(router.engine.submits[-1].token_ids)


def test_one_run(router: Router) -> None:
    """TGI asks a second time when no tool helps, and whenever the list is empty."""
    ids = router.says("a cat</s>")
    for tools in (TOOLS, []):
        before = len(router.engine.submits)
        answer = router.chat(tools=tools, logprobs=True).json()
        assert answer["choices"][0]["message"]["content"] == "a cat"
        assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["logprobs"]["content"]) == len(ids)
        assert len(router.engine.submits) == before + 1


def test_arguments_stream_as_they_come(router: Router) -> None:
    router.says(CALL + "</s>")
    *chunks, _ = events(router.chat(tools=TOOLS, stream=True).content)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert len([delta for delta in deltas if delta["tool_calls"]]) > 5
    assert all(delta["content"] is None for delta in deltas if delta["tool_calls"])


def test_several_calls(router: Router) -> None:
    router.says(f"{CALL}\n{CALL}</s>")
    answer = choice(router, parallel_tool_calls=True)
    assert [call["function"]["arguments"] for call in answer["message"]["tool_calls"]] == [ARGUMENTS] * 2
    assert len({call["id"] for call in answer["message"]["tool_calls"]}) == 2
    assert answer["finish_reason"] == "tool_calls"


def test_text(router: Router) -> None:
    for text in ("a cat {}", " ", "", '{"name": "dog", "parameters": {}}', "{"):
        router.says(f"{text}</s>")
        assert choice(router) == {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": "stop",
        }


def test_a_call_cut_short(router: Router) -> None:
    ids = router.says(CALL + "</s>")
    head = len(router.service.tokenizer.encode(CALL[: CALL.index(ARGUMENTS)], add_special_tokens=False))
    answer = choice(router, max_tokens=head + 4)
    (call,) = answer["message"]["tool_calls"]
    assert 0 < len(call["function"]["arguments"]) < len(ARGUMENTS)
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    assert answer["finish_reason"] == "length"
    # Before the call has a name it is text; when it is whole, nobody knows whether another would have followed.
    assert choice(router, max_tokens=3)["message"] == {"role": "assistant", "content": CALL[:3]}
    assert choice(router, max_tokens=len(ids) - 1)["finish_reason"] == "length"


def test_a_stop_string_in_arguments(router: Router) -> None:
    router.says(CALL + "</s>")
    answer = choice(router, stop="days")
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS.partition("days")[0]
    assert answer["finish_reason"] == "stop"


def test_each_choice_has_its_own_calls(router: Router) -> None:
    router.says(CALL + "</s>")
    choices = router.chat(tools=TOOLS, n=2).json()["choices"]
    assert [c["message"]["tool_calls"][0]["function"]["arguments"] for c in choices] == [ARGUMENTS] * 2
    assert choices[0]["message"]["tool_calls"][0]["id"] != choices[1]["message"]["tool_calls"][0]["id"]


def test_the_engine_is_told_the_grammar(router: Router) -> None:
    router.says("a</s>")

    def grammar(**fields: Any) -> str:
        assert router.chat(**fields).status_code == 200
        return router.engine.submits[-1].sampling.grammar

    assert grammar() == grammar(tools=[]) == grammar(tools=TOOLS, tool_choice="none") == ""
    assert r'"\"weather\""' in grammar(tools=TOOLS)
    assert (
        grammar(tools=TOOLS) == grammar(tools=TOOLS, tool_choice="auto") != grammar(tools=TOOLS, tool_choice="weather")
    )


def test_logprobs_are_of_all_tokens(router: Router) -> None:
    ids = router.says(CALL + "</s>")
    assert len(choice(router, logprobs=True)["logprobs"]["content"]) == len(ids)


NOT_FOUND = {"error": "Tool error: Tool with name f not found", "error_type": "tool_error"}
EXCLUSIVE = {"error": "Tool error: Grammar and tools are mutually exclusive", "error_type": "tool_error"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat_tokenize"])
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tool_choice": "f"}, NOT_FOUND),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": True}, NOT_FOUND),
        ({"tool_choice": {"type": "function", "name": "f"}}, NOT_FOUND),
        ({"response_format": {"type": "json_object"}}, EXCLUSIVE),
        ({"tools": [], "response_format": {"type": "json_object"}}, EXCLUSIVE),
    ],
)
def test_tool_errors(router: Router, path: str, fields: dict[str, Any], error: dict[str, str]) -> None:
    response = router.http.post(path, json={"messages": [QUESTION], "tools": TOOLS, **fields})
    assert response.status_code == 422
    assert response.json() == error


def test_a_choice_without_tools_is_not_looked_at(router: Router) -> None:
    router.says("a</s>")
    for tools in (None, []):
        assert router.chat(tools=tools, tool_choice="f").status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function"}]}, "`function`"),
        ({"tools": [{"function": {"name": "f", "parameters": "{}"}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}, "tool `f`"),
        ({"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]}, "$.properties.a"),
        ({"tool_choice": {"type": "allowed_tools"}}, "`allowed_tools`"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"functions": [FUNCTION]}, "`functions`"),
        ({"function_call": "auto"}, "`function_call`"),
    ],
)
def test_refused_by_name(router: Router, fields: dict[str, Any], words: str) -> None:
    response = router.chat(**{"tools": TOOLS, **fields})
    assert response.status_code == 422
    assert words in response.text


# --- The prompt ------------------------------------------------------------------------------------------------------

ASSISTANT = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sunny"}


def prompt(router: Router, *messages: dict[str, Any], **fields: Any) -> str:
    body = {"messages": messages or [QUESTION], "tools": TOOLS, **fields}
    response = router.http.post("/chat_tokenize", json=body).raise_for_status()
    text: str = response.json()["templated_text"]
    router.says("a</s>")
    router.http.post("/v1/chat/completions", json=body).raise_for_status()
    submit = router.engine.submits[-1]
    assert router.service.tokenizer.decode(submit.token_ids, skip_special_tokens=False) == text
    return text


TOLD = f"\n---\n{json.dumps(TOOLS, separators=(',', ':'))}\n"


def test_tools_are_told_as_tgi_tells_them(router: Router) -> None:
    required = prompt(router, tool_choice="required")
    assert required == f"<user>hello{TOLD}{TOOL_PROMPT};<assistant>"
    assert prompt(router, tool_choice="weather") == required
    assert prompt(router, tool_choice="none") == "<user>hello;<assistant>"
    assert "plain text" in prompt(router)
    assert prompt(router, tool_prompt="Do call.") == f"<user>hello{TOLD}Do call.;<assistant>"
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert prompt(router, parts, tool_choice="required") == required


def test_words_put_in_the_assistants_mouth_stay_last(router: Router) -> None:
    text = prompt(router, QUESTION, {"role": "assistant", "content": "Sure:"}, tool_prompt="Do call.")
    assert text == f"<user>hello{TOLD}Do call.;<assistant>Sure:"


def test_earlier_calls_reach_the_template(router: Router) -> None:
    for content in (None, ""):
        text = prompt(router, ASSISTANT | {"content": content}, RESULT, tool_choice="none")
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
        assert text.partition("[")[2] == f"{json.dumps(call)}];<tool>sunny;<assistant>"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [({"arguments": {"a": 1}}, {"a": 1}), ({"parameters": {"a": 1}}, {"a": 1}), ({"arguments": ""}, {}), ({}, {})],
)
def test_arguments_of_all_kinds(router: Router, function: dict[str, Any], arguments: dict[str, Any]) -> None:
    calls = [{"id": "1", "function": {"name": "f", **function}}]
    text = prompt(router, ASSISTANT | {"tool_calls": calls}, RESULT, tool_choice="none")
    assert f'"function": {{"name": "f", "arguments": {json.dumps(arguments)}}}' in text


PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
READS = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
NAMES = "{% for message in messages %}<{{ message.tool_call_id }}|{{ message.name }}>{% endfor %}"


def test_a_template_that_reads_tools(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", READS)
    with Router(settings(tmp_path, ROOM)) as router:
        assert prompt(router) == json.dumps(TOOLS) + "<user>hello;<assistant>"
        assert prompt(router, tool_prompt="Do call.") == json.dumps(TOOLS) + "<user>hello\n---\nDo call.;<assistant>"
        assert prompt(router, tool_choice="none") == "<user>hello;<assistant>"


def test_a_template_for_tools(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": READS}]
    monkeypatch.setattr("tests.router.serving.TEMPLATE", named)
    with Router(settings(tmp_path, ROOM)) as router:
        assert prompt(router) == json.dumps(TOOLS) + "<user>hello;<assistant>"
        assert prompt(router, tool_choice="none") == "<user>hello"


def test_a_template_that_knows_no_calls_gets_them_as_text(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", PLAIN)
    spelled = '{"name": "weather", "parameters": {"city": "Rome"}}'
    with Router(settings(tmp_path, ROOM)) as router:
        assert prompt(router, ASSISTANT, RESULT, tools=None) == f"<assistant>{spelled}<tool>sunny"
        wordy = ASSISTANT | {"content": "Well."}
        assert prompt(router, wordy, RESULT, tools=None) == f"<assistant>Well.\n{spelled}<tool>sunny"


def test_names_and_ids_reach_the_template(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", NAMES)
    with Router(settings(tmp_path, ROOM)) as router:
        assert prompt(router, RESULT, tools=None) == "<1|weather>"


# --- In the model's own format ---------------------------------------------------------------------------------------

HERMES, MISTRAL, KIMI = (SOURCES[name] for name in ("qwen3", "mistral_v3", "kimi_k2"))
TWO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SPOKEN = f"Let me look. {TWO}\n{TWO}</s>"


def model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, template: str, **changes: Any) -> Router:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", template)
    return Router(settings(tmp_path, ROOM, **changes))


def test_native_calls(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model(tmp_path, monkeypatch, HERMES) as router:
        router.says(SPOKEN)
        answer = choice(router)
        assert answer["message"]["content"] == "Let me look."
        assert [call["function"]["arguments"] for call in answer["message"]["tool_calls"]] == ['{"city": "Rome"}'] * 2
        assert answer["finish_reason"] == "tool_calls"
        grammar = {}
        for parallel in (None, True, False):
            router.chat(tools=TOOLS, parallel_tool_calls=parallel).raise_for_status()
            grammar[parallel] = router.engine.submits[-1].sampling.grammar
        assert grammar[None] == grammar[True] != grammar[False]
        answer = choice(router, tool_choice="none")
        assert answer["message"]["content"] == SPOKEN.removesuffix("</s>")
        assert answer["finish_reason"] == "stop"
        assert router.engine.submits[-1].sampling.grammar == ""
        answer = choice(router, tools=[{"type": "function", "function": {"name": "other"}}])
        assert answer["message"]["content"] == SPOKEN.removesuffix("</s>")


def test_only_allowed_tools_are_called(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    with model(tmp_path, monkeypatch, HERMES) as router:
        router.says(SPOKEN)
        named = [{"type": "function", "function": {"name": "other"}}]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}
        answer = choice(router, tools=[*TOOLS, other], tool_choice=allowed)
        assert "tool_calls" not in answer["message"]
        assert "weather" not in router.engine.submits[-1].sampling.grammar


def test_a_native_call_cut_short(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model(tmp_path, monkeypatch, HERMES) as router:
        ids = router.says(SPOKEN)
        for most in range(1, len(ids)):
            answer = router.chat(tools=TOOLS, max_tokens=most).json()["choices"][0]
            assert answer["finish_reason"] == "length"
        answer = choice(router, stop="Ro")
        assert answer["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'
        assert answer["finish_reason"] == "stop"


def test_without_grammars(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing enforces is refused where it was asked for, and otherwise read."""
    with model(tmp_path, monkeypatch, HERMES, grammars=False) as router:
        router.says(SPOKEN)
        assert len(choice(router)["message"]["tool_calls"]) == 2
        assert router.engine.submits[-1].sampling.grammar == ""
        for fields in ({"tool_choice": "required"}, {"tool_choice": "weather"}, {"parallel_tool_calls": False}):
            response = router.chat(tools=TOOLS, **fields)
            assert (response.status_code, "grammar is not supported" in response.text) == (422, True)
    with model(tmp_path / "other", monkeypatch, PLAIN, grammars=False) as router:
        assert "grammar is not supported" in router.chat(tools=TOOLS).text


def test_ids_as_the_template_wants_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call and its result have the same one, whoever made it."""
    with model(tmp_path, monkeypatch, MISTRAL) as router:
        text = prompt(router, QUESTION, ASSISTANT, RESULT)
        (id,) = set(re.findall(r'id": "([^"]*)"', text))
        assert re.fullmatch("[0-9a-zA-Z]{9}", id)
        assert text.count(id) == 2
        router.says('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>')
        call = choice(router)["message"]["tool_calls"][0]
        text = prompt(router, QUESTION, ASSISTANT | {"tool_calls": [call]}, RESULT | {"tool_call_id": call["id"]})
        assert len(call["id"]) == 9 and text.count(call["id"]) == 2
    with model(tmp_path / "kimi", monkeypatch, KIMI) as router:
        opens, call = (
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>functions.weather:3<|tool_call_argument_begin|>",
        )
        router.says(f"{opens}{call}{{}}<|tool_call_end|><|tool_calls_section_end|></s>")
        assert router.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"][0]["id"] == "functions.weather:3"


def test_a_parser_of_the_operators_choice(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model(tmp_path, monkeypatch, PLAIN, tool_call_parser="pythonic") as router:
        router.says("[weather(city='Rome', days=2)]</s>")
        (call,) = choice(router)["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
        text = prompt(router, ASSISTANT, RESULT, tools=None)
        assert text == '<assistant>[weather(city="Rome")]<tool>sunny'


# --- Clients ---------------------------------------------------------------------------------------------------------


class Weather(pydantic.BaseModel):
    city: str
    days: int


def test_openai(router: Router, client: openai.OpenAI) -> None:
    router.says(f"{CALL}\n{CALL}</s>")
    asked: dict[str, Any] = {"model": "tgi", "messages": [QUESTION], "tools": TOOLS, "tool_choice": "required"}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    calls = answer.message.tool_calls or []
    assert [json.loads(call.function.arguments)["days"] for call in calls if call.type == "function"] == [7, 7]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    router.says("sunny</s>")
    messages: Any = [QUESTION, answer.message, *results]
    last = client.chat.completions.create(model="tgi", messages=messages, tools=asked["tools"]).choices[0]
    assert (last.message.content, last.finish_reason) == ("sunny", "stop")


def test_openai_parses(router: Router, client: openai.OpenAI) -> None:
    router.says('{"name": "Weather", "parameters": {"city": "Rome", "days": 2}}</s>')
    asked: dict[str, Any] = {
        "model": "tgi",
        "messages": [QUESTION],
        "tools": [openai.pydantic_function_tool(Weather)],
    }
    (call,) = client.chat.completions.parse(**asked).choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=2)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=2)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


def test_huggingface_hub(router: Router) -> None:
    router.says(CALL + "</s>")
    client = InferenceClient(base_url=router.url)
    asked: dict[str, Any] = {"messages": [QUESTION], "tools": TOOLS, "tool_choice": "required"}
    (call,) = client.chat_completion(**asked).choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    deltas = [part.choices[0].delta for part in client.chat_completion(**asked, stream=True)]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert "".join(call.function.arguments for call in calls) == ARGUMENTS
    assert calls[0].function.name == "weather"
