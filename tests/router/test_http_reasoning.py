"""Models that reason, over HTTP: as each dialect tells it, and how clients turn it on and off."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pydantic
import pytest
from huggingface_hub import InferenceClient
from msgspec.structs import replace
from openai.types.responses import Response, ResponseStreamEvent

from tests import small_tokenizers
from tests.router import serving
from tests.router.serving import LIMITS, Router, events, settings
from tests.router.test_http_anthropic import named_events
from tgi.core.grammar import load_tokenizer, start
from tgi.core.messages import Thinking
from tgi.core.vocabulary import Vocabulary

ROOM = replace(LIMITS, max_input_tokens=2000, max_total_tokens=4000, max_batch_prefill_tokens=4000)

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>")
SAID = "<think>\nLet me see.\n</think>\n\nIt is cold.</s>"
QUESTION = {"role": "user", "content": "hello"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": SCHEMA}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
RESPONSE_TOOLS: list[Any] = [{"type": "function", **FUNCTION}]
CLAUDE_TOOLS: list[Any] = [{"name": "weather", "input_schema": SCHEMA}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@contextmanager
def reasoner(folder: Path, template: str, *special: str, **changes: Any) -> Iterator[Router]:
    """A model with this template, by name, and these special tokens."""
    source = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "TEMPLATE", source)
        own = settings(folder, ROOM, **changes)
    tokenizer = small_tokenizers.byte_level()
    tokenizer.add_special_tokens(list(special))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    with Router(own) as router:
        yield router


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """The model opens its reasoning by itself; the template can turn it off."""
    with reasoner(tmp_path_factory.mktemp("qwen"), "qwen3") as router:
        yield router


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """The prompt opens the reasoning, always."""
    with reasoner(tmp_path_factory.mktemp("deepseek"), "deepseek_r1") as router:
        yield router


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Special tokens mark everything; the template reads an effort."""
    with reasoner(tmp_path_factory.mktemp("gpt"), "gpt_oss", *HARMONY) as router:
        yield router


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Doesn't reason."""
    with Router(settings(tmp_path_factory.mktemp("plain"), ROOM)) as router:
        yield router


@pytest.fixture
def router(request: pytest.FixtureRequest) -> Router:
    """The one that the test names."""
    found: Router = request.getfixturevalue(request.param)
    return found


def choice(router: Router, **fields: Any) -> Any:
    """The whole answer's only choice, after a look at whether its stream says the same."""
    whole = router.chat(**fields).raise_for_status().json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = events(router.chat(**fields, stream=True, stream_options=options).raise_for_status().content)
    (one,) = whole["choices"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (one["message"].get(name) or "")
    arguments = [call["function"]["arguments"] for delta in deltas for call in delta["tool_calls"] or []]
    assert "".join(arguments) == "".join(call["function"]["arguments"] for call in one["message"].get("tool_calls", []))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(chunks[1:]) + [
        one["finish_reason"]
    ]
    told = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    assert told == sorted(told)
    assert chunks[-1]["usage"] == last["usage"] == whole["usage"]
    return one


def tokens(router: Router, text: str) -> int:
    return len(router.service.tokenizer.encode(text, add_special_tokens=False))


# --- Replies ---------------------------------------------------------------------------------------------------------


def test_a_reply(qwen: Router) -> None:
    qwen.says(SAID)
    assert choice(qwen) == {
        "index": 0,
        "message": {"role": "assistant", "content": "It is cold.", "reasoning_content": "Let me see."},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = qwen.chat().json()["usage"]
    thought = tokens(qwen, SAID.partition("\n\n")[0])
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert usage["completion_tokens"] == tokens(qwen, SAID)


def test_deltas_are_of_one_kind(qwen: Router) -> None:
    """Content is null beside reasoning, and a delta without reasoning has no key for it."""
    qwen.says(SAID)
    *chunks, _ = events(qwen.chat(stream=True).content)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    thinking = [delta for delta in deltas if "reasoning_content" in delta]
    assert len(thinking) > 5
    assert all(delta["reasoning_content"] and delta["content"] is None for delta in thinking)
    assert all(delta["content"] is not None for delta in deltas if delta not in thinking)
    assert deltas.index(thinking[-1]) < min(deltas.index(delta) for delta in deltas if delta["content"])


REPLIES = [
    ("qwen", "It is cold.</s>", None, "It is cold.", "stop"),
    ("qwen", "<think></think>It is cold.</s>", None, "It is cold.", "stop"),
    ("qwen", "<think>\n\n</think>\n\nIt is cold.</s>", None, "It is cold.", "stop"),
    ("qwen", "<think>so</think></s>", "so", None, "stop"),
    ("qwen", "<think>so", "so", None, "stop"),
    ("qwen", "</s>", None, "", "stop"),
    ("qwen", "I <think>so</think></s>", None, "I <think>so</think>", "stop"),
    ("qwen", "<think>a </thin b</think> c <think>d</think></s>", "a </thin b", "c <think>d</think>", "stop"),
    ("qwen", "<think>größe ☃</think>☃</s>", "größe ☃", "☃", "stop"),
    ("deepseek", "so</think>\n\nIt is cold.</s>", "so", "It is cold.", "stop"),
    ("deepseek", "</think>It is cold.</s>", None, "It is cold.", "stop"),
    ("deepseek", "so it is</s>", "so it is", None, "stop"),
    ("deepseek", "", "", None, "stop"),
    (
        "gpt",
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>It is cold.</s>",
        "so",
        "It is cold.",
        "stop",
    ),
    ("gpt", "<|channel|>final<|message|>It is cold.</s>", None, "It is cold.", "stop"),
]


@pytest.mark.parametrize(("router", "says", "reasoning", "content", "finish"), REPLIES, indirect=["router"])
def test_replies(router: Router, says: str, reasoning: str | None, content: str | None, finish: str) -> None:
    router.says(says or "</s>")
    answer = choice(router)
    assert answer["finish_reason"] == finish
    assert answer["message"].get("reasoning_content") == (reasoning or None)
    assert answer["message"]["content"] == (content if reasoning or content else "")


@pytest.mark.parametrize(("router", "says", "reasoning", "content", "finish"), REPLIES, indirect=["router"])
def test_all_dialects_tell_the_same(
    router: Router, says: str, reasoning: str | None, content: str | None, finish: str
) -> None:
    router.says(says or "</s>")
    given, expected = choice(router)["message"], []
    if "reasoning_content" in given:
        expected.append(("reasoning", given["reasoning_content"]))
    if given["content"] is not None:
        expected.append(("text", given["content"]))
    response, count = respond(router)
    items = []
    for item in response.output:
        assert item.type in ("reasoning", "message")
        (part,) = item.content
        assert part.type == ("reasoning_text" if item.type == "reasoning" else "output_text")
        items.append(("reasoning" if item.type == "reasoning" else "text", part.text))
    message = converse(router)
    blocks = [
        ("reasoning", block.thinking) if block.type == "thinking" else ("text", block.text) for block in message.content
    ]
    assert items == blocks == expected
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == count
    assert router.chat().json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}


def respond(router: Router, **fields: Any) -> tuple[Any, int]:
    """The response, and how many tokens were reasoning, after a look at whether its stream says the same."""
    fields = {"model": "m", "input": "hello"} | fields
    raw = router.http.post("/v1/responses", json=fields).raise_for_status()
    whole = Response.model_validate_json(raw.content)
    stream = router.http.post("/v1/responses", json=fields | {"stream": True}).raise_for_status()
    adapter = pydantic.TypeAdapter[Any](ResponseStreamEvent)
    told = [adapter.validate_python(data) for data in named_events(stream.text)]
    for item, other in zip(told[-1].response.output, whole.output, strict=True):
        same = {"id": "", "call_id": ""}
        assert item.model_dump() | same == other.model_dump() | same
    assert told[-1].response.usage == whole.usage
    thought = "".join(event.delta for event in told if event.type == "response.reasoning_text.delta")
    items = [item for item in whole.output if item.type == "reasoning"]
    assert thought == "".join(part.text for item in items for part in item.content or [])
    assert whole.usage is not None
    return whole, whole.usage.output_tokens_details.reasoning_tokens


def converse(router: Router, **fields: Any) -> Any:
    """Anthropic's message, by its client, after a look at whether its stream says the same."""
    asked: dict[str, Any] = {"model": "m", "max_tokens": 500, "messages": [QUESTION]} | fields
    with anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=0) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
    same = {"id": ""}
    assert [block.to_dict() | same for block in final.content] == [block.to_dict() | same for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert ("thinking" in kinds) == ("signature" in kinds) == any(block.type == "thinking" for block in whole.content)
    return whole


def test_cut_in_reasoning(qwen: Router) -> None:
    qwen.says(SAID)
    answer = choice(qwen, max_tokens=5)
    assert answer["finish_reason"] == "length"
    assert answer["message"]["content"] is None
    assert "Let me see.".startswith(answer["message"]["reasoning_content"])
    response, count = respond(qwen, max_output_tokens=5)
    (item,) = response.output
    assert (response.status, item.type, item.status, count) == ("incomplete", "reasoning", "incomplete", 5)
    message = converse(qwen, max_tokens=5)
    assert [block.type for block in message.content] == ["thinking"]
    assert message.stop_reason == "max_tokens"


def test_each_choice_reasons_by_itself(qwen: Router) -> None:
    said = ("<think>a</think>the dog</s>", "<think>bcd</think>a cat</s>")
    texts = iter(said * 2)
    qwen.reply = lambda submit: qwen.service.tokenizer.encode(next(texts), add_special_tokens=False)
    answer = qwen.chat(n=2).json()
    thoughts = [one["message"]["reasoning_content"] for one in answer["choices"]]
    assert thoughts == ["a", "bcd"]
    thought = sum(tokens(qwen, text.partition("</think>")[0] + "</think>") for text in said)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    *chunks, _ = events(qwen.chat(n=2, stream=True).content)
    for index in (0, 1):
        own = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(delta.get("reasoning_content", "") for delta in own) == thoughts[index]


def test_logprobs_are_of_all_tokens_that_are_told(qwen: Router) -> None:
    ids = qwen.says(SAID)
    thought = tokens(qwen, SAID.partition("\n\n")[0])
    for fields, count in (({}, len(ids)), ({"include_reasoning": False}, len(ids) - thought)):
        asked = {"logprobs": True, **fields}
        content = choice(qwen, **asked)["logprobs"]["content"]
        assert len(content) == count
        *chunks, _ = events(qwen.chat(**asked, stream=True).content)
        assert [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]] == content


def test_logprobs_of_a_response_spell_out_its_text(qwen: Router, gpt: Router) -> None:
    for router, says in (
        (qwen, SAID),
        (gpt, "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>It is cold.</s>"),
    ):
        router.says(says)
        (_, message), _ = respond(router, include=["message.output_text.logprobs"])[0].output, None
        (part,) = message.content
        spelled = "".join(entry.token for entry in part.logprobs or [])
        assert spelled == part.text == "It is cold."


# --- Tools -----------------------------------------------------------------------------------------------------------


def test_reasoning_then_a_call(qwen: Router) -> None:
    qwen.says(f"<think>\nI could <tool_call>call</tool_call>.\n</think>\n\n{CALL}</s>")
    answer = choice(qwen, tools=TOOLS)
    assert answer["finish_reason"] == "tool_calls"
    message = answer["message"]
    assert message["reasoning_content"] == "I could <tool_call>call</tool_call>."
    assert message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]
    response, _ = respond(qwen, tools=RESPONSE_TOOLS)
    assert [item.type for item in response.output] == ["reasoning", "function_call"]
    blocks = converse(qwen, tools=CLAUDE_TOOLS).content
    assert [block.type for block in blocks] == ["thinking", "tool_use"]
    assert blocks[1].input == {"city": "Rome"}


def test_allowed_tools(qwen: Router) -> None:
    """Of the functions that the model is shown some may be called."""
    other = {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}}
    tools = [*RESPONSE_TOOLS, other]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    qwen.says(f"<think>so</think>{CALL}</s>")
    response, _ = respond(qwen, tools=tools, tool_choice=allowed)
    assert response.output[-1].type == "function_call"
    accepts = judge(qwen)
    assert accepts(CALL)
    assert not accepts("It is cold.")
    assert not accepts('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    respond(qwen, tools=tools, tool_choice=allowed | {"mode": "auto"})
    assert judge(qwen)("It is cold.")
    assert '"name": "time"' in last_prompt(qwen)


# --- Grammars --------------------------------------------------------------------------------------------------------


def judge(router: Router) -> Any:
    """Whether a text, of which all but the end token is given, is a whole reply under the last request's grammar."""
    submit = router.engine.submits[-1]
    assert submit.sampling.grammar
    tokenizer = router.service.tokenizer
    vocabulary = Vocabulary.load(Path(router.settings.model.folder))
    known = load_tokenizer(vocabulary, vocabulary.size, submit.sampling.end_token_ids)

    def accepts(text: str) -> bool:
        matcher = start(known, submit.sampling.grammar)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    return accepts


JSON = '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("router", "thought", "answers"),
    [
        ("qwen", "<think>\nI {see} <b>.\n</think>\n\n", ""),
        ("deepseek", "I {see} <b>.\n</think>\n\n", ""),
        (
            "gpt",
            "<|channel|>analysis<|message|>I {see} <b>.<|end|><|start|>assistant",
            "<|channel|>final<|message|>",
        ),
    ],
    indirect=["router"],
)
def test_a_format_holds_behind_the_reasoning(router: Router, thought: str, answers: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    router.says(f"{thought}{answers}{JSON}</s>")
    answer = choice(router, response_format=form)
    assert answer["message"]["reasoning_content"] == "I {see} <b>."
    assert answer["message"]["content"] == JSON
    accepts = judge(router)
    assert accepts(f"{thought}{answers}{JSON}")
    assert accepts(f"{answers}{JSON}") == (router.settings.model.folder.rfind("deepseek") < 0)
    assert not accepts(thought)
    assert not accepts(f"{thought}{answers}It is cold.")
    assert not accepts(f"{thought}{answers}{JSON} and so on")
    assert not accepts(f'{thought}{answers}{{"city": "Bonn"}}')
    assert not accepts(f"It is cold.{answers}{JSON}")
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    for response in (respond(router, text={"format": form})[0], converse(router, output_config={"format": form})):
        assert response
        assert judge(router)(f"{thought}{answers}{JSON}")


GPT_CALL = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{JSON}<|call|>"
CALLS = [
    ("qwen", "<think>so</think>\n\n", "", CALL),
    ("deepseek", "so</think>\n\n", "", '{"name": "weather", "parameters": {"city": "Rome"}}'),
    (
        "gpt",
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant",
        "<|channel|>final<|message|>",
        GPT_CALL,
    ),
]


@pytest.mark.parametrize(("router", "thought", "answers", "call"), CALLS, indirect=["router"])
def test_a_required_call_may_be_thought_about(router: Router, thought: str, answers: str, call: str) -> None:
    router.says(f"{thought}{call}</s>")
    answer = choice(router, tools=TOOLS, tool_choice="required")
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["reasoning_content"] == "so"
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == JSON
    accepts = judge(router)
    assert accepts(f"{thought}{call}")
    assert accepts(call) == thought.startswith("<")
    assert not accepts(f"{thought}{answers}It is cold.")
    assert not accepts(thought)
    assert not accepts(f"{thought}{call.replace('Rome', 'Bonn')}")


@pytest.mark.parametrize(("router", "thought", "answers", "call"), CALLS, indirect=["router"])
def test_a_call_on_offer_may_be_thought_about(router: Router, thought: str, answers: str, call: str) -> None:
    router.says(f"{thought}{answers}It is cold.</s>")
    answer = choice(router, tools=TOOLS)
    assert answer["message"] == {"role": "assistant", "content": "It is cold.", "reasoning_content": "so"}
    accepts = judge(router)
    for reply in (f"{thought}{answers}It is cold.", f"{thought}{call}"):
        assert accepts(reply), reply
    if thought.startswith("<"):
        assert accepts(f"{answers}It is cold.")
        assert accepts(call)
    assert not accepts(f"{thought}{call.replace('Rome', 'Bonn')}")


# --- Requests --------------------------------------------------------------------------------------------------------


def last_prompt(router: Router) -> str:
    return router.service.tokenizer.decode(router.engine.submits[-1].token_ids, skip_special_tokens=False)


def prompt(router: Router, **fields: Any) -> str:
    """As /chat_tokenize shows it, after a look at whether chats send the same."""
    body = {"messages": [QUESTION], **fields}
    text: str = router.http.post("/chat_tokenize", json=body).raise_for_status().json()["templated_text"]
    router.says("</s>")
    router.http.post("/v1/chat/completions", json=body).raise_for_status()
    assert last_prompt(router) == text
    return text


def budget(router: Router) -> Thinking | None:
    return router.engine.submits[-1].sampling.thinking


EMPTY = "<think>\n\n</think>\n\n"


def test_a_template_with_a_switch(qwen: Router) -> None:
    usual = prompt(qwen)
    off = {"enable_thinking": False}
    assert prompt(qwen, **off) == usual + EMPTY
    silent: list[dict[str, Any]] = [
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": off},
        {"chat_template_kwargs": off, "enable_thinking": True},
        off | {"reasoning_effort": "high"},
        off | {"reasoning_effort": "none"},
    ]
    for fields in silent:
        assert prompt(qwen, **fields) == usual + EMPTY, fields
        assert budget(qwen) is None
    loud: list[dict[str, Any]] = [{"enable_thinking": True}, {"reasoning_effort": "low"}, {"chat_template_kwargs": {}}]
    for fields in loud:
        assert prompt(qwen, **fields) == usual, fields


def test_a_template_with_a_switch_of_another_name(tmp_path: Path) -> None:
    with reasoner(tmp_path, "granite3") as router:
        usual = prompt(router)
        assert "<think>" in prompt(router, enable_thinking=True)
        assert prompt(router, reasoning_effort="high") == prompt(router, enable_thinking=True) != usual
        assert prompt(router, enable_thinking=False) == usual


@pytest.mark.parametrize(("template", "end"), [("glm4", "<think></think>"), ("smollm3", EMPTY.removesuffix("\n"))])
def test_other_templates_with_a_switch(tmp_path: Path, template: str, end: str) -> None:
    with reasoner(tmp_path, template) as router:
        for fields in ({"enable_thinking": False}, {"reasoning_effort": "none"}):
            assert prompt(router, **fields).endswith(end)
        assert not prompt(router).endswith(end)
        router.says("It is cold.</s>")
        assert choice(router, enable_thinking=False)["message"] == {"role": "assistant", "content": "It is cold."}


def test_a_template_that_reads_an_effort(gpt: Router) -> None:
    for effort in ("low", "high", "none"):
        assert f"Reasoning: {effort}\n" in prompt(gpt, reasoning_effort=effort)
    assert "Reasoning: medium\n" in prompt(gpt)
    kwargs = {"reasoning_effort": "low"}
    assert "Reasoning: low\n" in prompt(gpt, chat_template_kwargs=kwargs, reasoning_effort="high")
    assert "Reasoning: high\n" in prompt(gpt, reasoning_effort="high", enable_thinking=True)
    gpt.says("</s>")
    respond(gpt, reasoning={"effort": "low"})
    assert "Reasoning: low\n" in last_prompt(gpt)
    converse(gpt, output_config={"effort": "max"})
    assert "Reasoning: max\n" in last_prompt(gpt)


OFF: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [QUESTION], "enable_thinking": False}),
    ("/v1/chat/completions", {"messages": [QUESTION], "reasoning_effort": "none"}),
    ("/v1/chat/completions", {"messages": [QUESTION], "reasoning_effort": "none", "thinking_budget": 9}),
    ("/v1/responses", {"input": "hello", "reasoning": {"effort": "none"}}),
    ("/v1/responses", {"input": "hello", "enable_thinking": False}),
    ("/v1/messages", {"messages": [QUESTION], "max_tokens": 99, "thinking": {"type": "disabled"}}),
]


@pytest.mark.parametrize(("path", "body"), OFF)
def test_off(qwen: Router, deepseek: Router, gpt: Router, plain: Router, path: str, body: dict[str, Any]) -> None:
    """By the template's switch; without one reasoning is closed where it begins."""
    bounds = {
        qwen: None if "thinking_budget" not in body else Thinking(9, "<think>", "</think>"),
        deepseek: Thinking(0, "", "</think>"),
        gpt: Thinking(0, "<|channel|>analysis<|message|>", "<|end|>"),
    }
    for router, bound in bounds.items():
        router.says("</s>")
        router.http.post(path, json={"model": "m", **body}).raise_for_status()
        assert budget(router) == bound
    assert last_prompt(qwen).endswith(EMPTY)
    plain.says("</s>")
    answer = plain.http.post(path, json={"model": "m", **body})
    assert (answer.status_code, budget(plain)) == (422 if "thinking_budget" in body else 200, None)


ON: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [QUESTION], "enable_thinking": True, "thinking_budget": 7}),
    ("/v1/responses", {"input": "hello", "enable_thinking": True, "thinking_budget": 7}),
    (
        "/v1/messages",
        {"messages": [QUESTION], "max_tokens": 99, "thinking": {"type": "enabled", "budget_tokens": 7}},
    ),
]


@pytest.mark.parametrize(("path", "body"), ON)
def test_budgets(qwen: Router, deepseek: Router, plain: Router, path: str, body: dict[str, Any]) -> None:
    for router, opens in ((qwen, "<think>"), (deepseek, "")):
        router.says("</s>")
        router.http.post(path, json={"model": "m", **body}).raise_for_status()
        assert budget(router) == Thinking(7, opens, "</think>")
    error = plain.http.post(path, json={"model": "m", **body})
    assert error.status_code == (422 if "chat" in path else 400)
    assert "`enable_thinking` is not supported: the model doesn't reason" in error.text


def test_a_template_that_reads_a_budget_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TEMPLATE", serving.TEMPLATE + "{# <think></think> #}{{ thinking_budget }}")
    with Router(settings(tmp_path)) as router:
        assert prompt(router, thinking_budget=7).endswith("<assistant>7")
        assert budget(router) == Thinking(7, "<think>", "</think>")


def test_adaptive_is_as_the_model_does(qwen: Router, plain: Router) -> None:
    usual = prompt(qwen)
    for router in (qwen, plain):
        router.says("</s>")
        converse(router, thinking={"type": "adaptive"})
        assert budget(router) is None
    assert last_prompt(qwen) == usual


@pytest.mark.parametrize(
    ("router", "fields", "words"),
    [
        ("deepseek", {"reasoning_effort": "low"}, "`reasoning_effort` is not supported: the model's chat template"),
        ("plain", {"reasoning_effort": "low"}, "`reasoning_effort` is not supported: the model's chat template"),
        ("plain", {"enable_thinking": True}, "`enable_thinking` is not supported: the model doesn't reason"),
        ("plain", {"thinking_budget": 5}, "`thinking_budget` is not supported: the model doesn't reason"),
        ("plain", {"chat_template_kwargs": {"enable_thinking": True}}, "`chat_template_kwargs` must not set"),
        ("qwen", {"enable_thinking": True, "reasoning_effort": "none"}, "`enable_thinking` is true, and"),
        ("qwen", {"include_reasoning": False, "separate_reasoning": False}, "must not both be false"),
        ("qwen", {"separate_reasoning": False, "tools": TOOLS}, "`separate_reasoning: false` is not supported with"),
        ("qwen", {"thinking_budget": -1}, "thinking_budget"),
    ],
    indirect=["router"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations"])
def test_refused_by_name(router: Router, path: str, fields: dict[str, Any], words: str) -> None:
    before = len(router.engine.submits)
    response = router.http.post(path, json={"messages": [QUESTION], **fields})
    assert response.status_code == 422
    assert words in response.text
    assert len(router.engine.submits) == before


def test_neutral_where_nothing_reasons(plain: Router) -> None:
    usual = prompt(plain)
    for fields in ({"reasoning_effort": "none"}, {"enable_thinking": False}, {"include_reasoning": False}):
        assert prompt(plain, **fields) == usual
    plain.says("<think>so</think>It is cold.</s>")
    assert choice(plain)["message"] == {"role": "assistant", "content": "<think>so</think>It is cold."}


# --- Hidden, and not told apart --------------------------------------------------------------------------------------


def test_hidden(qwen: Router) -> None:
    qwen.says(SAID)
    assert choice(qwen, include_reasoning=False)["message"] == {"role": "assistant", "content": "It is cold."}
    thought = tokens(qwen, SAID.partition("\n\n")[0])
    usage = qwen.chat(include_reasoning=False).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    stream = qwen.chat(include_reasoning=False, stream=True).text
    assert "see" not in stream
    omitted = converse(qwen, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in omitted.content] == ["text"]


def test_not_told_apart(qwen: Router, deepseek: Router) -> None:
    text = SAID.removesuffix("</s>")
    qwen.says(SAID)
    assert choice(qwen, separate_reasoning=False)["message"] == {"role": "assistant", "content": text}
    deepseek.says(SAID.removeprefix("<think>"))
    message = choice(deepseek, separate_reasoning=False)["message"]
    assert message == {"role": "assistant", "content": text.removeprefix("<think>")}


def test_native_routes_are_raw(qwen: Router) -> None:
    qwen.says(SAID)
    text = SAID.removesuffix("</s>")
    assert qwen.generate().json()["generated_text"] == text
    stream = events(qwen.http.post("/generate_stream", json={"inputs": "hello"}).content.replace(b"data:{", b"data: {"))
    assert stream[-1]["generated_text"] == text
    assert qwen.complete().json()["choices"][0]["text"] == text


def test_clouds(qwen: Router) -> None:
    qwen.says(SAID)
    body = {"messages": [QUESTION]}
    message = qwen.http.post("/invocations", json=body).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Let me see."

    def predict(**fields: Any) -> httpx.Response:
        return qwen.http.post("/vertex", json={"instances": [body | fields]})

    assert predict().json() == {"predictions": [SAID.removesuffix("</s>")]}
    assert predict(include_reasoning=False).json() == {"predictions": ["It is cold."]}
    assert "`include_reasoning: false` is not supported" in predict(include_reasoning=False, tools=TOOLS).text


# --- Later turns -----------------------------------------------------------------------------------------------------


def test_what_a_stored_response_thought_is_told(qwen: Router) -> None:
    """Behind a call: the template shows no reasoning before the last question."""
    qwen.says(f"<think>\nWhere?\n</think>\n\n{CALL}</s>")
    with openai.OpenAI(base_url=f"{qwen.url}/v1", api_key="-", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "m", "tools": RESPONSE_TOOLS}
        first = client.responses.create(**asked, input="hello", store=True)
        result: Any = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "sunny"}
        qwen.says("It is cold.</s>")
        client.responses.create(**asked, input=[result], previous_response_id=first.id)
        told = f"<|im_start|>assistant\n<think>\nWhere?\n</think>\n\n{CALL}<|im_end|>"
        assert told in last_prompt(qwen)
        again: Any = [QUESTION, *first.output, result]
        client.responses.create(**asked, input=again)
        assert told in last_prompt(qwen)


def test_encrypted_reasoning_comes_back(qwen: Router) -> None:
    """Clients that keep nothing on the server may send only what they are told is encrypted."""
    include = ["reasoning.encrypted_content"]
    qwen.says(f"<think>\nWo? Größe ☃\n</think>\n\n{CALL}</s>")
    response, _ = respond(qwen, include=include, tools=RESPONSE_TOOLS)
    thought, call = response.output
    assert thought.type == "reasoning"
    assert thought.encrypted_content
    assert respond(qwen, tools=RESPONSE_TOOLS)[0].output[0].encrypted_content is None
    bare = {"type": "reasoning", "id": "rs_1", "summary": []}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    for encrypted, told in ((thought.encrypted_content, "Wo? Größe ☃"), ("gAAAA", ""), ("tgi:☃", ""), ("tgi:/w==", "")):
        items = [QUESTION, bare | {"encrypted_content": encrypted}, call.to_dict(), result]
        qwen.says("</s>")
        respond(qwen, input=items, tools=RESPONSE_TOOLS)
        assert f"<think>\n{told}\n</think>" in last_prompt(qwen) if told else "Wo?" not in last_prompt(qwen)


def test_thinking_blocks_come_back(qwen: Router) -> None:
    qwen.says(f"<think>\nWhere?\n</think>\n\n{CALL}</s>")
    message = converse(qwen, tools=CLAUDE_TOOLS)
    result = {"type": "tool_result", "tool_use_id": message.content[-1].id, "content": "sunny"}
    said = {"role": "assistant", "content": [block.to_dict() for block in message.content]}
    qwen.says("</s>")
    converse(qwen, tools=CLAUDE_TOOLS, messages=[QUESTION, said, {"role": "user", "content": [result]}])
    assert f"<think>\nWhere?\n</think>\n\n{CALL}<|im_end|>" in last_prompt(qwen)


# --- Clients ---------------------------------------------------------------------------------------------------------


class Forecast(pydantic.BaseModel):
    city: str


def test_openai(qwen: Router) -> None:
    qwen.says(f"<think>\nso\n</think>\n\n{JSON}</s>")
    asked: dict[str, Any] = {"model": "m", "messages": [QUESTION]}
    with openai.OpenAI(base_url=f"{qwen.url}/v1", api_key="-", max_retries=0) as client:
        answer: Any = client.chat.completions.create(**asked, reasoning_effort="high").choices[0].message
        assert (answer.content, answer.reasoning_content) == (JSON, "so")
        chunks = client.chat.completions.create(**asked, stream=True, extra_body={"enable_thinking": True})
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == JSON
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "so"
        parsed = client.chat.completions.parse(**asked, response_format=Forecast).choices[0].message.parsed
        assert parsed == Forecast(city="Rome")
        with client.chat.completions.stream(**asked, response_format=Forecast) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.parsed == parsed
        response = client.responses.parse(model="m", input="hello", text_format=Forecast)
        assert response.output_parsed == parsed
        with client.responses.stream(model="m", input="hello", text_format=Forecast) as events:
            final = events.get_final_response()
        assert final.output_parsed == parsed
        assert [item.type for item in final.output] == ["reasoning", "message"]

    async def slowly() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{qwen.url}/v1", api_key="-", max_retries=0) as client:
            stream = await client.responses.create(model="m", input="hello", stream=True)
            return [event async for event in stream if event.type.startswith("response.reasoning")]

    *deltas, done = asyncio.run(slowly())
    assert "".join(event.delta for event in deltas) == done.text == "so"


def test_huggingface_hub(qwen: Router) -> None:
    qwen.says(SAID)
    client = InferenceClient(base_url=qwen.url)
    answer: Any = client.chat_completion([QUESTION]).choices[0].message
    assert (answer.content, answer.reasoning_content) == ("It is cold.", "Let me see.")
    deltas = [part.choices[0].delta for part in client.chat_completion([QUESTION], stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "It is cold."


def test_the_events_of_a_response(qwen: Router) -> None:
    qwen.says("<think>so</think>Cold</s>")
    stream = qwen.http.post("/v1/responses", json={"input": "hello", "stream": True})
    told = named_events(stream.text)
    thought, message = told[-1]["response"]["output"]
    assert thought == {
        "type": "reasoning",
        "id": thought["id"],
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "so"}],
        "encrypted_content": None,
        "status": "completed",
    }
    assert thought["id"].startswith("rs_")
    own = [event for event in told[2:-1] if event["output_index"] == 0]
    at = {"output_index": 0, "item_id": thought["id"], "content_index": 0}
    for event in own:
        del event["sequence_number"]
    begun = thought | {"content": [], "status": "in_progress"}
    part = {"type": "reasoning_text", "text": ""}
    assert own[0] == {"type": "response.output_item.added", "output_index": 0, "item": begun}
    assert own[1] == {"type": "response.content_part.added", **at, "part": part}
    assert all(event == {"type": "response.reasoning_text.delta", **at, "delta": event["delta"]} for event in own[2:-3])
    assert own[-3] == {"type": "response.reasoning_text.done", **at, "text": "so"}
    assert own[-2] == {"type": "response.content_part.done", **at, "part": part | {"text": "so"}}
    assert own[-1] == {"type": "response.output_item.done", "output_index": 0, "item": thought}
    assert message["type"] == "message"


def test_the_events_of_a_message(qwen: Router) -> None:
    qwen.says("<think>so</think>Cold</s>")
    body = {"model": "m", "max_tokens": 99, "messages": [QUESTION], "stream": True}
    told = named_events(qwen.http.post("/v1/messages", json=body).text)
    own = [event for event in told if event.get("index") == 0]
    assert own[0]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert {event["delta"]["type"] for event in own[1:-2]} == {"thinking_delta"}
    assert own[-2]["delta"] == {"type": "signature_delta", "signature": ""}
    assert own[-1]["type"] == "content_block_stop"
    assert json.dumps(told).count("signature_delta") == 1
