"""Tools: what the model is told, and what its reply must spell, in every format."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from tests import small_tokenizers
from tests.router.test_reply import Folded, fold
from tgi.core.errors import RequestError
from tgi.core.grammar import load_tokenizer
from tgi.core.vocabulary import Vocabulary
from tgi.router.arguments import Json, Keyed
from tgi.router.formats import CALLS, TGI, Format, format_of
from tgi.router.grammar import Grammars
from tgi.router.reply import MOST_CALLS, ReplyParser
from tgi.router.tools import TOOL_PROMPT, ReplyGrammar, Tools, tools_of
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
PLAIN = {
    "name": "weather",
    "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
"""What all formats can be held to."""


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
    assert tools.instructions(None, TGI, shown=False) == f"\n---\n{text}\n{TOOL_PROMPT}"
    assert tools.instructions("", TGI, shown=False) == f"\n---\n{text}\n{TOOL_PROMPT}"
    assert tools.instructions("Do call.", TGI, shown=False) == f"\n---\n{text}\nDo call."
    assert tools.instructions(None, TGI, shown=True) == ""
    assert tools.instructions("Do call.", TGI, shown=True) == "\n---\nDo call."
    hermes = tools.instructions(None, ROWS["hermes"], shown=False)
    assert hermes.startswith(f"\n---\n{text}\n") and hermes.endswith("}\n</tool_call>\n")
    assert tools.instructions(None, ROWS["hermes"], shown=True) == ""
    assert "plain text" in offered(WEATHER).instructions(None, TGI, shown=False)


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

ROWS = {row.name: row for row in CALLS}
JSON_ROWS = [row for row in CALLS if isinstance(row.style, Json)]
KEYED_ROWS = [row for row in CALLS if isinstance(row.style, Keyed)]
END = "</s>"

Marks = Literal["special", "added", "absent"]
"""What the marks of a format are to the tokenizer."""


class Model(NamedTuple):
    """A format, and a vocabulary that its marks are part of, or not."""

    format: Format
    tokenizer: Tokenizer
    vocabulary: LLTokenizer
    special: dict[str, int]

    def grammar(self, *, thinking: bool = False) -> ReplyGrammar:
        return ReplyGrammar(
            self.format, thinking, {self.special[END]}, set(self.special.values()) - {self.special[END]}
        )

    def matcher(self, tools: Tools, *, thinking: bool = False) -> LLMatcher:
        found = LLMatcher(self.vocabulary, self.grammar(thinking=thinking).of(tools), log_level=0)
        assert not found.is_error(), found.get_error()
        return found

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """As the parser is given it."""
        hidden = set(self.special.values()) - set(self.format.special.values())
        return self.tokenizer.decode([id for id in ids if id not in hidden], skip_special_tokens=False)

    def accepts(self, tools: Tools, text: str, *, thinking: bool = False) -> bool:
        """Whether this may be the whole reply."""
        state, ids = self.matcher(tools, thinking=thinking), self.encode(text)
        return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()

    def read(self, tools: Tools, text: str, *, thinking: bool = False) -> Folded:
        return fold(ReplyParser(self.format, tools.schemas, thinking=thinking), [text])


@cache
def model(calls: str, reasoning: str = "none", marks: Marks = "absent") -> Model:
    format = format_of("", (), calls, reasoning)
    tokenizer = small_tokenizers.byte_level()
    found = [word for part in spellings(format) for word in re.findall(r"<[^<>\s]+>|\[[A-Z_/]+\]", part)]
    if marks == "special":
        tokenizer.add_special_tokens(found)
    elif marks == "added":
        tokenizer.add_tokens(found)
    special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    copy = Vocabulary(Tokenizer.from_str(tokenizer.to_str()), {})
    vocabulary = load_tokenizer(copy, copy.size, [special[END]])
    return Model(format.spelled_with(special), tokenizer, vocabulary, special)


def spellings(format: Format) -> list[str]:
    calls, reasoning = format.calls, format.reasoning
    parts = [calls.opens, calls.head, calls.middle, calls.tail, calls.between, calls.closes, calls.style.marks]
    if reasoning is not None:
        parts += [reasoning.opens, reasoning.closes, reasoning.joint, reasoning.answers]
    return parts


TOOLS = model("tgi")
PARIS = '{"name": "weather", "parameters": {"city": "Paris", "days": 7}}'
UTC = '{"name": "time", "parameters": {"zone": "UTC"}}'


def accepts(tools: Tools, text: str) -> bool:
    return TOOLS.accepts(tools, text)


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


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("marks", get_args(Marks))
@pytest.mark.parametrize("reasoning", ["none", "think"])
def test_what_is_accepted(name: str, marks: Marks, reasoning: str) -> None:
    """Calls as the row spells them, behind text where it may be, and text of any kind."""
    told = model(name, reasoning, marks)
    row = told.format.calls
    calls = [
        ("weather", {"city": 'Par"is\n☃', "days": 7}),
        ("time", {"zone": "UTC"}),
        ("nothing", {}),
        ("weather", {"city": ""}),
    ]
    one, all = row.spelled(calls[:1]), row.spelled(calls)
    before = "" if reasoning == "none" else "<think>Hm. {</think>\n\n"
    for choice in ("auto", "required"):
        several = offered(PLAIN, TIME, NOTHING, tool_choice=choice, parallel_tool_calls=True)
        single = offered(PLAIN, TIME, NOTHING, tool_choice=choice, parallel_tool_calls=False)
        default = offered(PLAIN, TIME, NOTHING, tool_choice=choice)
        assert told.accepts(several, before + one) and told.accepts(several, before + all)
        assert told.accepts(single, before + one) and not told.accepts(single, before + all)
        assert told.accepts(default, before + all) == row.taught
        assert told.accepts(several, "Sure.\n" + all) == (choice == "auto")  # in anchored formats this is text
        if before:
            assert told.accepts(several, before.removeprefix("<think>") + all, thinking=True)
            assert told.accepts(several, all)
        for wrong in ("", "Hello", one[:-1], one + " and so on"):
            if not (wrong == one[:-1] and told.encode(one)[-1] in told.special.values()):
                assert not told.accepts(offered(PLAIN, TIME, NOTHING, tool_choice="required"), before + wrong), wrong
    named = offered(PLAIN, TIME, NOTHING, tool_choice="weather", parallel_tool_calls=True)
    assert told.accepts(named, before + one) and not told.accepts(named, before + all)
    assert not told.accepts(named, before + row.spelled(calls[1:2]))
    auto = offered(PLAIN, TIME, NOTHING)
    for text in (
        "",
        " ",
        "Hello",
        "a { b",
        "[1]",
        "if a < b: <b>",
        "\n\n☃\t\0[]",
        '"name"',
        "```json",
        "to=",
        row.opens[:2],
    ):
        if not (name == "tgi" and text.startswith("{")):
            assert told.accepts(auto, before + text), text
    assert not told.accepts(auto, before + one + " and so on")


def test_auto_is_text_or_calls() -> None:
    tools = offered(WEATHER, TIME, parallel_tool_calls=True)
    for right in ("", "  ", "Hello", f" \n{PARIS}", f"{PARIS}\n{UTC}", f"See: {PARIS}", "\n\n☃ {}\t\0[]", "[{"):
        assert accepts(tools, right), right
    for wrong in ("{", "{}", " { ", f"{PARIS} and so on"):
        assert not accepts(tools, wrong), wrong


@pytest.mark.parametrize(
    ("name", "call", "text"),
    [
        ("hermes", "<tool_call>", "<tool_calls>"),
        ("mistral", "a [TOOL_CALLS]", "[TOOL]"),
        ("llama3_json", '{"name": ', '{"named": 1}'),
        ("llama3_json", ' {"type" : "function", "name":', '{"type": "function", "x": 1}'),
        ("pythonic", "[ weather (", "[weathers("),
        ("command_r", 'Action:\n```json\n[ {"tool_name": "weather"', 'Action: ```json [{"tool_name": "answer"'),
        ("gpt_oss", "<|channel|>commentary to=functions.", "<|channel|>commentary to=other"),
        ("gpt_oss", "<|channel|>analysis to=functions.", "<|channel|>analysis"),
        ("gpt_oss", " to=functions.", "to=function"),
        ("gemma", "```tool_code\nweather(", "```tool_code\nprint("),
    ],
)
def test_what_opens_a_call_must_finish_it(name: str, call: str, text: str) -> None:
    for marks in get_args(Marks):
        told, tools = model(name, "none", marks), offered(PLAIN, TIME)
        assert told.accepts(tools, text)
        state = told.matcher(tools)
        for id in told.encode(call):
            assert state.consume_token(id)
        assert not state.is_accepting()
        for id in told.encode("☃"):
            assert state.try_consume_tokens([id]) == 0


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


def test_special_tokens_are_left_to_text() -> None:
    for text in ("<s>", "<s>Hello<|im_end|>{}<s>", " <|im_end|>"):
        assert accepts(offered(WEATHER), text)
        assert not accepts(offered(WEATHER, tool_choice="required"), text)


def test_names_of_all_kinds() -> None:
    for name in ("größe", 'a "b" \\ c', "☃\n", "", "\u2028", "{"):
        tools = offered({"name": name}, tool_choice="required")
        call = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {{}}}}'
        assert accepts(tools, call)
        assert TOOLS.read(tools, call).told == ("", "", [[name, "{}"]], True)
    for row in CALLS:
        for names in (["get-weather"], ["mcp.tool/x:y"], ["get", "get_x", "g"], ["größe_2"]):
            for choice in ("auto", "required"):
                tools = offered(*({"name": name} for name in names), tool_choice=choice, parallel_tool_calls=True)
                calls = row.spelled([(name, {}) for name in names])
                assert model(row.name).accepts(tools, calls), (row.name, names)
                assert [call[0] for call in model(row.name).read(tools, calls).calls] == names
        for name in ("a b", "f(", '"', "", "x\n"):
            if not row.quoted:
                with pytest.raises(RequestError, match="can't be told"):
                    model(row.name).grammar().of(offered({"name": name}))


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
    grammars = Grammars(folder, None, [2])
    yield grammars
    grammars.close()


def enforce(grammars: Grammars, tools: Tools, calls: str = "tgi") -> str:
    return asyncio.run(tools.enforced(model(calls).grammar(), grammars.compile))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string"}, '"object"'),
        ({"properties": {"a": {"not": {}}}}, '["not"] at `$.properties.a`'),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "/$defs/b"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "regex"),
        ({"properties": {"a": {"extends": {}}}}, '["extends"] at `$.properties.a`'),
        ({"properties": 3}, "properties"),
        ({"required": 3}, "required"),
        ({"required": [[]]}, "required"),
    ],
)
def test_schemas_that_cannot_be_enforced(grammars: Grammars, schema: dict[str, Any], reason: str) -> None:
    for calls in ("tgi", "hermes", "pythonic"):
        tools = offered(TIME, {"name": "f", "parameters": schema})
        with pytest.raises(RequestError, match=re.escape(reason) if calls != "pythonic" else "tool `f`") as error:
            enforce(grammars, tools, calls)
        assert error.value.message.startswith("Input validation error: the parameters of tool `f`: ")


def test_grammars_that_can_be_enforced(grammars: Grammars) -> None:
    for row in CALLS:
        for choice in ("auto", "required", "time"):
            tools = offered(WEATHER, TIME, NOTHING, tool_choice=choice)
            assert enforce(grammars, tools, row.name) == model(row.name).grammar().of(tools)


def test_lenience_must_be_asked_for(grammars: Grammars) -> None:
    schema = {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}
    tools = offered({"name": "f", "parameters": schema, "strict": False})
    assert accepts(tools, '{"name": "f", "parameters": {"a": [1, 1]}}')
    assert not accepts(tools, '{"name": "f", "parameters": {"a": ["1"]}}')
    for strict in (True, None):
        with pytest.raises(RequestError, match="uniqueItems"):
            enforce(grammars, offered({"name": "f", "parameters": schema, "strict": strict}))


def test_many_tools(grammars: Grammars) -> None:
    """A hundred realistic ones are no trouble in any format."""
    functions = [{**WEATHER, "name": f"tool_{at}"} for at in range(100)]
    for name in ("hermes", "command_r", "pythonic", "qwen3_coder", "functiongemma"):
        enforce(grammars, offered(*functions), name)
        assert model(name).accepts(offered(*functions), ROWS[name].spelled([("tool_77", {"city": "a"})]))


# --- Walks -----------------------------------------------------------------------------------------------------------

TREE = {"type": "object", "properties": {"leaf": {"type": "integer"}, "inner": {"$ref": "#/$defs/tree"}}}
EVERYWHERE = {
    "name": "plain",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "Any."},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
            "ratio": {"type": "number"},
            "on": {"type": "boolean"},
            "unit": {"enum": ["C", "F", 'a "b"']},
            "level": {"enum": [1, None, "x", True]},
            "fixed": {"const": "one"},
            "perhaps": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "either": {"type": ["boolean", "null"]},
            "numbers": {"type": "array", "items": {"type": "integer"}},
            "day": {"$ref": "#/$defs/Day"},
            "word": {"type": "string", "pattern": "^[a-z<>/]{1,5}$"},
            "short": {"type": "string", "minLength": 1, "maxLength": 4},
            "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
            "any": {"type": "object"},
        },
        "required": ["count", "unit"],
        "$defs": {"Day": {"type": "string", "enum": ["mon", "tue"]}},
    },
}
"""All of it can be enforced in every style."""
DEEP = {
    "name": "plain_deep",
    "parameters": {
        "type": "object",
        "properties": {
            "tree": {"$ref": "#/$defs/tree"},
            "list": {
                "type": "array",
                "items": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            },
        },
        "$defs": {"tree": TREE},
    },
}
IN_JSON = {
    "name": "only-json",
    "parameters": {
        "properties": {
            "code": {"type": "string", "pattern": "^[a-z]{2}[0-9]+$"},
            "short": {"type": "string", "minLength": 2, "maxLength": 4},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
            "pair": {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
                "items": False,
                "minItems": 2,
            },
            "date": {"type": "string", "format": "date"},
        },
        "required": ["code", "pair"],
        "additionalProperties": {"type": "null"},
    },
}
NONE = {"name": "none"}


def walk(told: Model, tools: Tools, draw: random.Random, begin: str, *, thinking: bool) -> str | None:
    """A reply of a model that draws any token the grammar allows, and now and then something that leads somewhere.
    None if it found no end."""
    state, ids = told.matcher(tools, thinking=thinking), list[int]()
    calls = told.format.calls
    crumbs = [
        *spellings(told.format),
        calls.tail.strip(),
        calls.closes.strip(),
        '"',
        "}",
        "]",
        ")",
        *(calls.style.marks.split("\n")),
    ]
    tries = [told.encode(crumb) for crumb in crumbs if crumb]
    for id in told.encode(begin):
        assert state.consume_token(id), begin
        ids.append(id)
    end = told.special[END]
    for step in range(600):
        if state.is_stopped() or (state.is_accepting() and draw.random() < (0.05 if step < 20 else 0.5)):
            return told.decode(ids)
        if draw.random() < 0.4:
            some = draw.choice(tries)
            if state.deep_copy().try_consume_tokens(some) == len(some):
                assert state.try_consume_tokens(some) == len(some)
                ids += some
                continue
        mask = state.compute_bitmask()
        allowed = [id for id in range(told.vocabulary.vocab_size) if mask[id // 8] >> id % 8 & 1 and id != end]
        if not allowed:
            assert state.is_accepting()
            return told.decode(ids)
        id = draw.choice(allowed)
        assert state.consume_token(id)
        ids.append(id)
    return None


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("marks", get_args(Marks))
def test_whatever_the_grammar_allows_is_read(name: str, marks: Marks) -> None:
    """Replies that are drawn under the grammar: all their calls are of the tools, and hold what their schemas say."""
    draw = random.Random(f"{name} {marks}")
    row, finished = ROWS[name], 0
    functions = [EVERYWHERE, DEEP, NONE] + ([IN_JSON] if isinstance(row.style, Json) else [])
    own = "gpt_oss" if name == "gpt_oss" else "think"
    for at in range(6):
        choice = ["auto", "required", "plain"][at % 3]
        reasoning, thinking = draw.choice([("none", False), (own, False), (own, True)])
        parallel = draw.choice([None, True, False])
        told = model(name, reasoning, marks)
        tools = offered(*functions, tool_choice=choice, parallel_tool_calls=parallel)
        begin = ""
        if thinking:
            begin = "Hm." + told.format.reasoning.closes + told.format.reasoning.joint
        if choice == "auto" and draw.random() < 0.7:
            called = draw.choice(functions)["name"]
            begin += (
                row.opens + row.head.replace("#", "0") + row.called(called) + row.middle.replace("#", "0").rstrip("\n")
            )
        text = walk(told, tools, draw, begin, thinking=thinking)
        if text is None:
            continue
        finished += 1
        found = told.read(tools, text, thinking=thinking)
        assert found.complete == bool(found.calls), text
        if choice != "auto":
            assert found.calls and not found.text, text
        if choice == "plain":
            assert [call[0] for call in found.calls] == ["plain"]
        if not (row.taught if parallel is None else parallel):
            assert len(found.calls) <= 1
        for called, arguments, _ in found.calls:
            (function,) = (one for one in functions if one["name"] == called)
            schema = function.get("parameters", {"additionalProperties": False})
            jsonschema.validate(json.loads(arguments), schema)
    assert finished >= 3
