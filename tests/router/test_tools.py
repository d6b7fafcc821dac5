"""Tools: what the model is told, what its reply must spell, and what is read in it."""

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from tests import small_tokenizers
from tgi.core.errors import RequestError
from tgi.router.conversation import Call
from tgi.router.grammar import Grammars
from tgi.router.tools import MOST_CALLS, TOOL_PROMPT, ReplyParser, Tools, spelled, tools_of
from tgi.router.wire.openai import ChatRequest

WEATHER = {
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"$ref": "#/$defs/Days"}},
        "required": ["city"],
        "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 7}},
    },
}
TIME = {"name": "time", "parameters": {"properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}}
NOTHING = {"name": "nothing"}


def offer(*functions: dict[str, Any], **fields: Any) -> Tools | None:
    tools = [{"type": "function", "function": function} for function in functions]
    return tools_of(msgspec.convert({"messages": [], "tools": tools, **fields}, ChatRequest))


def offered(*functions: dict[str, Any], **fields: Any) -> Tools:
    tools = offer(*functions, **fields)
    assert tools is not None
    return tools


# --- What the model is told ------------------------------------------------------------------------------------------


def test_no_tools_no_calls() -> None:
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}, {"tools": [], "tool_choice": "anything"}):
        assert offer(WEATHER, **fields) is None


def test_definitions_are_as_the_client_sent_them() -> None:
    tools = offered(WEATHER, {"name": "f", "strict": True, "arguments": TIME["parameters"]}, NOTHING)
    assert tools.definitions == [
        {"type": "function", "function": WEATHER},
        {"type": "function", "function": {"name": "f", "parameters": TIME["parameters"]}},
        {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}},
    ]


def test_instructions() -> None:
    tools = offered(WEATHER, tool_choice="required")
    text = json.dumps(tools.definitions, separators=(",", ":"))
    assert tools.instructions(None, shown=False) == f"\n---\n{text}\n{TOOL_PROMPT}"
    assert tools.instructions("", shown=False) == f"\n---\n{text}\n{TOOL_PROMPT}"
    assert tools.instructions("Do call.", shown=False) == f"\n---\n{text}\nDo call."
    assert tools.instructions(None, shown=True) == ""
    assert tools.instructions("Do call.", shown=True) == "\n---\nDo call."
    assert "plain text" in offered(WEATHER).instructions(None, shown=False)


def test_an_unknown_tool() -> None:
    for choice in ("f", {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}):
        with pytest.raises(RequestError, match=r"^Tool error: Tool with name f not found$"):
            offer(WEATHER, tool_choice=choice)


@pytest.mark.parametrize(
    "fields",
    [{"response_format": {"type": "json_object"}}, {"guided_regex": "a"}, {"tools": [], "guided_choice": ["a"]}],
)
def test_tools_and_a_grammar(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^Tool error: Grammar and tools are mutually exclusive$"):
        offer(WEATHER, **fields)


def test_text_is_no_grammar() -> None:
    assert offer(WEATHER, response_format={"type": "text"})


# --- What the reply must spell ---------------------------------------------------------------------------------------

TOKENIZER = small_tokenizers.byte_level()
VOCABULARY = LLTokenizer(TOKENIZER.to_str(), eos_token=TOKENIZER.token_to_id("</s>"))
SPECIAL = {"<s>": 1, "<|im_end|>": TOKENIZER.token_to_id("<|im_end|>")}


def matcher(tools: Tools) -> LLMatcher:
    found = LLMatcher(VOCABULARY, tools.grammar(SPECIAL.values()))
    assert not found.is_error(), found.get_error()
    return found


def accepts(tools: Tools, text: str) -> bool:
    """Whether this may be the whole reply."""
    state, ids = matcher(tools), TOKENIZER.encode(text, add_special_tokens=False).ids
    return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()


PARIS = '{"name": "weather", "parameters": {"city": "Paris", "days": 7}}'
UTC = '{"name": "time", "parameters": {"zone": "UTC"}}'


def test_required_is_calls() -> None:
    tools = offered(WEATHER, TIME, tool_choice="required", parallel_tool_calls=True)
    assert accepts(tools, PARIS)
    assert accepts(tools, f"{PARIS}\n{UTC}")
    assert accepts(tools, "\n".join([UTC] * MOST_CALLS))
    assert not accepts(tools, "\n".join([UTC] * (MOST_CALLS + 1)))
    for wrong in ("", "{}", "Hello", f" {PARIS}", f"{PARIS}\n", f"{PARIS} {UTC}", PARIS[:-1], PARIS + "}"):
        assert not accepts(tools, wrong)


def test_schemas_hold() -> None:
    tools = offered(WEATHER, TIME, NOTHING)
    assert accepts(tools, '{"name": "nothing", "parameters": {}}')
    for name, arguments in (
        ("weather", '{"city": "Paris", "days": 8}'),
        ("weather", '{"days": 7}'),
        ("weather", '{"city": "Paris", "other": 7}'),
        ("weather", '{"city":"Paris"}'),
        ("weather", '["Paris"]'),
        ("time", '{"zone": "EST"}'),
        ("time", '{"city": "Paris"}'),
        ("nothing", '{"city": "Paris"}'),
        ("else", "{}"),
    ):
        assert not accepts(tools, f'{{"name": "{name}", "parameters": {arguments}}}')


def test_several_calls_must_be_asked_for() -> None:
    for choice in ("auto", "required"):
        for parallel in (None, False, True):
            tools = offered(WEATHER, TIME, tool_choice=choice, parallel_tool_calls=parallel)
            assert accepts(tools, PARIS)
            assert accepts(tools, f"{PARIS}\n{UTC}") == (parallel is True)


@pytest.mark.parametrize("choice", ["time", {"function": {"name": "time"}}, {"type": "function", "name": "time"}])
def test_a_named_function_is_called_once(choice: Any) -> None:
    tools = offered(WEATHER, TIME, tool_choice=choice, parallel_tool_calls=True)
    assert accepts(tools, UTC)
    for wrong in ("", "text", PARIS, f"{UTC}\n{UTC}"):
        assert not accepts(tools, wrong)


def test_auto_is_text_or_calls() -> None:
    tools = offered(WEATHER, TIME, parallel_tool_calls=True)
    for right in ("", "  ", "Hello", f" \n{PARIS}", f"{PARIS}\n{UTC}", f"See: {PARIS}", "\n\n☃ {}\t\0[]", "[{"):
        assert accepts(tools, right), right
    for wrong in ("{", "{}", " { ", f"{PARIS} and so on"):
        assert not accepts(tools, wrong), wrong


def test_special_tokens_are_left_to_text() -> None:
    for text in ("<s>", "<s>Hello<|im_end|>{}<s>", " <|im_end|>"):
        assert accepts(offered(WEATHER), text)
        assert not accepts(offered(WEATHER, tool_choice="required"), text)


def test_names_of_all_kinds() -> None:
    for name in ("größe", 'a "b" \\ c', "☃\n", "", "\u2028", "{"):
        tools = offered({"name": name}, tool_choice="required")
        call = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {{}}}}'
        assert accepts(tools, call)
        assert fold(tools.parser(), [call]) == ("", [(name, "{}")], True)


def test_schemas_that_leave_their_object_open() -> None:
    free = '{"name": "f", "parameters": {"x": 1, "y": [2]}}'
    for schema in (
        {"additionalProperties": True},
        {"required": ["x"]},
        {"anyOf": [{"required": ["x"]}, {"required": ["z"]}]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"x": {}}}}},
    ):
        assert accepts(offered({"name": "f", "parameters": schema}), free), schema
    for schema in ({}, {"type": ["object", "null"]}, {"properties": {"x": {}}}):
        assert not accepts(offered({"name": "f", "parameters": schema}), free), schema


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    folder = small_tokenizers.write(tmp_path_factory.mktemp("tokenizer"), "byte_level")
    grammars = Grammars(folder / "tokenizer.json", [2])
    yield grammars
    grammars.close()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string"}, '"object"'),
        ({"properties": {"a": {"not": {}}}}, '["not"] at `$.properties.a`'),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "/$defs/b"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "regex"),
        ({"properties": 3}, "properties"),
        ({"required": 3}, "required"),
        ({"required": [[]]}, "required"),
    ],
)
def test_schemas_that_cannot_be_enforced(grammars: Grammars, schema: dict[str, Any], reason: str) -> None:
    tools = offered(TIME, {"name": "f", "parameters": schema})
    with pytest.raises(RequestError, match=re.escape(reason)) as error:
        asyncio.run(tools.enforced([1], grammars.compile))
    assert error.value.message.startswith("Input validation error: the parameters of tool `f`: ")


def test_grammars_that_can_be_enforced(grammars: Grammars) -> None:
    for choice in ("auto", "required", "time"):
        tools = offered(WEATHER, TIME, NOTHING, tool_choice=choice)
        assert asyncio.run(tools.enforced([1], grammars.compile)) == tools.grammar([1])


def test_lenience_must_be_asked_for(grammars: Grammars) -> None:
    schema = {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}
    tools = offered({"name": "f", "parameters": schema, "strict": False})
    assert accepts(tools, '{"name": "f", "parameters": {"a": [1, 1]}}')
    assert not accepts(tools, '{"name": "f", "parameters": {"a": ["1"]}}')
    for strict in (True, None):
        with pytest.raises(RequestError, match="uniqueItems"):
            tools = offered({"name": "f", "parameters": schema, "strict": strict})
            asyncio.run(tools.enforced((), grammars.compile))


@given(st.integers(0, 2**32), st.sampled_from(["auto", "required", "time"]))
def test_whatever_the_grammar_allows_is_read(seed: int, choice: str) -> None:
    """A model that draws any token the grammar allows: its calls are read, and hold what their schemas say."""
    tools = offered(WEATHER, TIME, NOTHING, tool_choice=choice)
    state, draw, ids = matcher(tools), random.Random(seed), list[int]()
    for _ in range(300):
        mask = state.compute_bitmask()
        allowed = [id for id in range(VOCABULARY.vocab_size) if mask[id // 8] >> id % 8 & 1]
        # An end, or a call, is likelier than one token among many.
        id = draw.choice([id for id in allowed if id in (2, TOKENIZER.token_to_id("{"))] or allowed)
        if id == 2:
            break
        ids.append(id)
        assert state.consume_token(id)
    else:
        return
    text, calls, complete = fold(tools.parser(), [TOKENIZER.decode(ids)])
    assert not text
    assert complete == bool(calls)
    assert calls or choice == "auto"
    for name, arguments in calls:
        values = json.loads(arguments)
        match name:
            case "weather":
                assert values.keys() <= {"city", "days"}
                assert len(values["city"]) <= 9
                assert 1 <= values.get("days", 1) <= 7
            case "time":
                assert values in ({"zone": "UTC"}, {"zone": "CET"})
            case "nothing":
                assert values == {}


# --- What is read in it ----------------------------------------------------------------------------------------------

Folded = tuple[str, list[tuple[str, str]], bool]


def fold(parser: ReplyParser, pieces: Iterable[str]) -> Folded:
    """All text, the calls as (name, arguments), and whether they are complete."""
    text, calls = "", list[Call]()
    for parsed in [*map(parser.push, pieces), parser.finish()]:
        text += parsed.text
        for delta in parsed.calls:
            if delta.index == len(calls):
                assert delta.id is not None and delta.name is not None
                calls.append(Call(delta.id, delta.name))
            else:
                assert delta.index == len(calls) - 1 and delta.id is delta.name is None
            assert delta.arguments
            calls[delta.index].arguments += delta.arguments
    assert len({call.id for call in calls}) == len(calls)
    return text, [(call.name, call.arguments) for call in calls], parser.complete


def read(text: str) -> Folded:
    return fold(ReplyParser(["weather", "time"]), [text])


@pytest.mark.parametrize(
    ("reply", "text", "calls", "complete"),
    [
        ("", "", [], False),
        ("Hello { you", "Hello { you", [], False),
        (" \n", " \n", [], False),
        (PARIS, "", [("weather", '{"city": "Paris", "days": 7}')], True),
        (f" {UTC}\n{UTC} ", "", [("time", '{"zone": "UTC"}')] * 2, True),
        ('{\n"name":"time","arguments" : {"zone":\n"}\\"{"} } ', "", [("time", '{"zone":\n"}\\"{"}')], True),
        # Cut short
        (PARIS[:20], PARIS[:20], [], False),
        (PARIS[:45], "", [("weather", '{"city": "P')], False),
        (PARIS[:-1], "", [("weather", '{"city": "Paris", "days": 7}')], True),
        (f"{UTC}\n{UTC[:9]}", "", [("time", '{"zone": "UTC"}')], True),
        # No calls
        (f"So: {PARIS}", f"So: {PARIS}", [], False),
        ('{"name": "else", "parameters": {}}', '{"name": "else", "parameters": {}}', [], False),
        ('{"name": "time", "parameters": []}', '{"name": "time", "parameters": []}', [], False),
        ('{"parameters": {}, "name": "time"}', '{"parameters": {}, "name": "time"}', [], False),
        (" {}", " {}", [], False),
        (f"{UTC} and {UTC}", f" and {UTC}", [("time", '{"zone": "UTC"}')], True),
        ('{"name": "time", "parameters": {}, "id": 3}', ', "id": 3}', [("time", "{}")], True),
    ],
)
def test_replies(reply: str, text: str, calls: list[tuple[str, str]], complete: bool) -> None:
    assert read(reply) == (text, calls, complete)


FRAGMENTS = st.lists(
    st.sampled_from([PARIS, UTC, "\n", " ", "{", "}", '"', "\\", '{"name": "', "weather", '", "parameters": {', "☃"])
    | st.text(max_size=5)
).map("".join)


@given(st.data(), FRAGMENTS)
@example(None, PARIS)
def test_any_cutting_reads_the_same(data: st.DataObject | None, reply: str) -> None:
    pieces = list(reply)
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)))))
        pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert fold(ReplyParser(["weather", "time"]), pieces) == read(reply)


def test_arguments_come_as_they_are_written() -> None:
    parser = ReplyParser(["weather"])
    deltas = [delta for character in PARIS for delta in parser.push(character).calls]
    assert [delta.arguments for delta in deltas] == list('{"city": "Paris", "days": 7}')


def test_without_tools_nothing_is_held_back() -> None:
    parser = ReplyParser([])
    for piece in (" ", "{", '"name"', PARIS):
        assert parser.push(piece) == (piece, [])
    assert parser.finish() == ("", [])


def test_calls_are_spelled_as_they_are_read() -> None:
    calls = [("weather", {"city": "Größe ☃"}), ("time", {"zone": "UTC"})]
    text = spelled({"name": name, "arguments": arguments} for name, arguments in calls)
    assert read(text) == ("", [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls], True)
