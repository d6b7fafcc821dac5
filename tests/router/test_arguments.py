"""Arguments of calls in each style: what a schema makes of them, and what is read of them."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from tests.router.test_tools import model, offered
from tgi.core.errors import RequestError
from tgi.router.arguments import GEMMA, GEMMA4, GLM, JSON, PYTHON, QWEN, Reader, Style
from tgi.router.readers import spelled
from tgi.router.schema import BINDING

STYLES: Mapping[str, Style] = {
    "hermes": JSON,
    "pythonic": PYTHON,
    "functiongemma": GEMMA,
    "gemma4": GEMMA4,
    "qwen3_coder": QWEN,
    "glm45": GLM,
}
"""Format → the style of its arguments."""
KEYED = [name for name, style in STYLES.items() if style is not JSON]


def allowed(name: str, schema: dict[str, Any], *arguments: dict[str, Any], **fields: Any) -> list[bool]:
    """Which of these arguments the grammar lets a model write."""
    told, tools = model(name), offered({"name": "f", "parameters": schema, **fields}, tool_choice="required")
    return [told.accepts(tools, told.format.calls.spelled([("f", one)])) for one in arguments]


def refused(name: str, schema: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(RequestError) as error:
        model(name).grammar().of(offered({"name": "f", "parameters": schema, **fields}))
    return error.value.detail


def of(schema: Any, *, required: bool = True) -> dict[str, Any]:
    """One argument."""
    return {"properties": {"a": schema}, "required": ["a"] if required else []}


TAGGED = {
    kind: {
        "type": "object",
        "properties": {"kind": {"const": kind, "type": "string"}, name: {"type": type}},
        "required": ["kind", name],
        "additionalProperties": False,
    }
    for kind, name, type in (("cat", "n", "integer"), ("dog", "m", "string"))
}
CHAIN = {
    "type": "object",
    "properties": {"next": {"oneOf": [{"$ref": "#/$defs/chain"}, {"type": "integer"}]}},
    "required": ["next"],
}
LETTERS = {"type": "string", "pattern": "^[a-z]+(-[a-z]+|/x)*$"}


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer", "minimum": 3}, [3, 40], [2, "x", 3.5]),
        ({"type": "number"}, [-1.5, 0, 1e30], ["x", None]),
        ({"type": "boolean"}, [True, False], [None, 1]),
        ({"type": "string"}, ["", "a 'b' \"c\"", "\n☃\\", "null", "1"], []),
        ({"enum": ["a", 'b"', 3, None, False]}, ["a", 'b"', 3, None, False], ["b", 4, True]),
        ({"const": "x"}, ["x"], ["y"]),
        ({"type": "string", "maxLength": 3}, ["", "ab☃", "\n\n\n"], ["abcd"]),
        ({"type": "string", "maxLength": 65_535}, ["value", "a</b>\n</parameter\nb", "<</<escape<|"], []),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", ""]),
        (LETTERS, ["abc", "a-b-c", "a/x"], ["", "a-", "A", "a b", "abc\n"]),
        ({"type": "string", "pattern": "b+"}, ["b", "abba"], ["", "aa"]),
        ({"type": "string", "pattern": "^(a|b)$"}, ["a", "b"], ["ab", "c"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "today"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ({"type": "string", "format": "uri"}, ["https://a.b:80/c%20/?d=e/#f", "mailto:a@b.c"], ["a", "a b:c"]),
        ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0.256", "1.2.3"]),
        ({"type": "string", "format": "ipv6"}, ["1:2:3:4:5:6:7:8", "1::8", "::"], ["1:2", "1::2::3"]),
        ({"type": "string", "format": "duration"}, ["P1DT2H", "P3W", "PT5M"], ["P", "PT", "1D"]),
        ({"type": "integer", "x-order": 1, "markdownDescription": "*", "readOnly": False}, [1], ["x"]),
        ({"$ref": "#/$defs/digits"}, ["1", "null"], ["2", 3]),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, [7, None], [True]),
        (
            {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}},
            [{"kind": "cat", "n": 1}, {"kind": "dog", "m": "x"}],
            [{"kind": "cat", "m": "x"}, {"kind": "cow"}, {}],
        ),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [7, None], [True]),
        ({"$ref": "#/$defs/chain"}, [{"next": 1}, {"next": {"next": 2}}], [{"next": "x"}, {"next": {}}]),
        ({"type": ["boolean", "null"]}, [True, None], [7]),
        ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["x"], [None], 3]),
        ({"type": "array", "items": {"type": "string"}}, [[], ["a, b"], ["]", ""]], [[1]]),
        ({"$ref": "#/$defs/d"}, [{"n": 1}, {"n": 2, "d": {"n": 3, "d": {"n": 4}}}], [{}, {"d": {"n": 1}}, {"n": "x"}]),
        (of({"type": "integer"}), [{"a": 1}], [{}, {"a": "1"}, {"b": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{}, {"x": 1}, {"x": 1, "y_2": 3}], [{"x": "1"}]),
        ({"type": "object"}, [{}, {"x": [1, {"y": 2.5, "z": "w"}]}], [1]),
    ],
)  # fmt: skip
def test_schemas_hold(name: str, schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    node = {"type": "object", "properties": {"n": {"type": "integer"}, "d": {"$ref": "#/$defs/d"}}, "required": ["n"]}
    whole = of(schema) | {"$defs": {"d": node, "chain": CHAIN, "digits": {"enum": ["1", "null"]}, **TAGGED}}
    assert allowed(name, whole, *({"a": value} for value in right)) == [True] * len(right)
    assert allowed(name, whole, *({"a": value} for value in wrong)) == [False] * len(wrong)
    told, tools = model(name), offered({"name": "f", "parameters": whole})
    for value in right:
        jsonschema.validate({"a": value}, whole)
        ((_, arguments, _),) = told.read(tools, told.format.calls.spelled([("f", {"a": value})])).calls
        assert json.loads(arguments) == {"a": value}


@pytest.mark.parametrize("name", STYLES)
def test_properties(name: str) -> None:
    """In the schema's order, those that aren't required with or without."""
    schema = {"properties": {key: {"type": "integer"} for key in "abcd"}, "required": ["b", "d"]}
    right = [{"b": 1, "d": 2}, {"a": 0, "b": 1, "d": 2}, {"b": 1, "c": 3, "d": 2}, dict.fromkeys("abcd", 1)]
    wrong = [{}, {"b": 1}, {"d": 2, "b": 1}, {"a": 1, "d": 1}, {"b": 1, "d": 2, "e": 3}]
    assert allowed(name, schema, *right) == [True] * 4
    assert allowed(name, schema, *wrong) == [False] * 5
    optional = {"properties": {key: {"type": "integer"} for key in "ab"}}
    assert allowed(name, optional, {}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}) == [True] * 4
    for none in ({}, {"type": "object", "properties": {}}, {"additionalProperties": False}):
        assert allowed(name, none, {}, {"a": 1}) == [True, False]
    for any in ({"additionalProperties": True}, {"additionalProperties": {"type": "integer"}}):
        assert allowed(name, any, {}, {"a": 1}, {"a": 1, "b-c": 2}) == [True] * 3


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (of({"not": {"type": "null"}}), "$.properties.a"),
        (of({"$ref": "#/$defs/none"}), "$.properties.a"),
        (of({"type": "array", "uniqueItems": True}), "$.properties.a"),
        (of({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "$.properties.a"),
        ({"properties": {"a": {}}, "minProperties": 1}, "$.minProperties"),
        ({"properties": {"a": {}}, "required": ["b"]}, "$.required"),
        ({"anyOf": [{"required": ["a"]}]}, "$.anyOf"),
    ],
)
def test_what_cannot_be_enforced_is_refused(name: str, schema: dict[str, Any], where: str) -> None:
    """Here, with its place, or by llguidance, which has the last word on parts that are written as JSON."""
    tools = offered({"name": "f", "parameters": schema}, tool_choice="required")
    try:
        grammar = model(name).grammar().of(tools)
    except RequestError as error:
        assert "the parameters of tool `f`" in error.detail
        assert where in error.detail
    else:
        assert STYLES[name] in (PYTHON, GLM, QWEN) and "." in where
        assert LLMatcher(model(name).vocabulary, grammar, log_level=0).is_error()


@pytest.mark.parametrize("name", STYLES)
def test_a_schema_that_refers_to_itself_at_the_top(name: str) -> None:
    """As pydantic writes them."""
    item = {"type": "object", "properties": {"text": {"type": "string"}, "more": {"$ref": "#/$defs/I"}}}
    whole = {"$defs": {"I": item | {"required": ["text"]}}, "$ref": "#/$defs/I"}
    assert allowed(name, whole, {"text": "1", "more": {"text": "2"}}, {}) == [True, False]
    told, tools = model(name), offered({"name": "f", "parameters": whole})
    ((_, arguments, _),) = told.read(tools, told.format.calls.spelled([("f", {"text": "1"})])).calls
    assert json.loads(arguments) == {"text": "1"}


ODD: Any = (None, True, 5, -1, "x", "(", "#", [], [5], ["x"], [["x"]], [None], {}, {"x": 5}, {"a": {"$ref": "#"}})


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("keyword", sorted(BINDING | {"discriminator", "$defs", "$id"}))
def test_schemas_that_are_none_are_no_error_of_ours(name: str, keyword: str) -> None:
    """What is made of them is for llguidance to judge."""
    whole = of({"type": "object", **of({"type": "string"})})
    one = {"oneOf": [of({"const": "x"}), of({"const": "y"})], "discriminator": {"propertyName": "a"}}
    for value in ODD:
        odd = {keyword: value}
        for schema in (whole | odd, of(odd), of({"type": "string", **odd}), of({"type": "object"} | odd), of(one | odd),
                       of({**one, "oneOf": [odd, {"type": "object", **of(odd), **odd}]}),
                       of({"type": "array", **odd}), of({"anyOf": [odd, {}]}), odd):  # fmt: skip
            with suppress(RequestError):
                model(name).grammar().of(offered({"name": "f", "parameters": {"type": "object"} | schema}))


@pytest.mark.parametrize("name", KEYED)
def test_references_that_lead_nowhere_at_the_top(name: str) -> None:
    for schema in ({"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}):
        assert "$.$ref" in refused(name, schema)
    assert "$.$ref" in refused(name, of({"type": "string"}) | {"$ref": "#/$defs/a", "$defs": {"a": {}}})


@pytest.mark.parametrize("name", KEYED)
def test_lenience_leaves_out_what_cannot_be_enforced(name: str) -> None:
    schema = of({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}) | {"minProperties": 1}
    assert allowed(name, schema, {"a": [1, 1]}, {"a": ["x"]}, {}, strict=False) == [True, False, False]
    for strict in (True, None):
        assert "minProperties" in refused(name, schema, strict=strict)


@pytest.mark.parametrize("name", KEYED)
def test_names_that_cannot_be_spelled(name: str) -> None:
    for key in ("", "a>\nb</arg_key>(=:"):
        assert "$.properties" in refused(name, {"properties": {key: {}}}, strict=False)
    schema = {"properties": {"größe_2": {"type": "integer"}, "a-b.c": {"type": "integer"}}}
    assert allowed(name, schema, {"größe_2": 1, "a-b.c": 2}) == [True]


@pytest.mark.parametrize("name", ["functiongemma", "gemma4", "qwen3_coder", "glm45"])
def test_patterns_that_take_more_than_a_look(name: str) -> None:
    for pattern in ("^a|b$", "a^", "(?=a)b", "a$b", "(^a)"):
        assert "$.properties.a.pattern" in refused(name, of({"type": "string", "pattern": pattern}))
    assert "$.properties.a.format" in refused(name, of({"type": "string", "format": "regex"}))
    assert allowed(name, of({"type": "string", "format": "regex"}), {"a": "x"}, strict=False) == [True]


def test_references_that_lead_to_references_cost_no_more() -> None:
    definitions: dict[str, Any] = {
        f"d{at}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{at + 1}"} for key in "ab"}}
        for at in range(60)
    }
    schema = of({"$ref": "#/$defs/d0"}) | {"$defs": definitions | {"d60": {"type": "null"}}}
    for name in KEYED:
        grammar = model(name).grammar().of(offered({"name": "f", "parameters": schema}))
        assert len(grammar) < 100_000


# --- Reading ---------------------------------------------------------------------------------------------------------


def read(style: Style, text: str, schema: dict[str, Any] | None = None) -> tuple[str, str]:
    """The JSON, and what stands behind it, which must be what pieces of it give."""
    whole = Reader(style, schema or {}).push(text)
    reader, grown, length = Reader(style, schema or {}), "", 0
    for character in text:
        part = reader.push(character)
        grown, length = grown + part.grown, length + part.length
        if part.ended or part.odd:
            assert (part.ended, part.odd) == (whole.ended, whole.odd)
            break
    assert (grown, length) == (whole.grown, whole.length)
    return whole.grown, text[whole.length :]


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        (JSON, '{"a": [1, {"b": "}"}]} x', ('{"a": [1, {"b": "}"}]}', " x")),
        (JSON, '{"a": "b\nc\t\\"d\\\\"}', ('{"a": "b\\nc\\t\\"d\\\\"}', "")),
        (JSON, '{\n\t"a": 1\n}', ('{\n\t"a": 1\n}', "")),
        (PYTHON, ")", ("{}", "")),
        (PYTHON, "a=1, b='x', c=[True, None, {'k': -2}],)y", ('{"a": 1, "b": "x", "c": [true, null, {"k": -2}]}', "y")),
        (PYTHON, "a='\\n\\'\\\"\\\\\\x41\\u00e9\\U0001F600\\q')", ('{"a": "\\n\'\\"\\\\Aé😀q"}', "")),
        (PYTHON, "a={'x\\'\"': 1, \"\": 2})", ('{"a": {"x\'\\"": 1, "": 2}}', "")),
        (PYTHON, "a = Paris , b=true)", ('{"a": "Paris", "b": true}', "")),
        (PYTHON, "a=f(1))", ('{"a": ', "(1))")),
        (PYTHON, "a=1 b=2)", ('{"a": 1', "b=2)")),
        (PYTHON, "'x', 2)", ("{", ", 2)")),
        (GEMMA, "{a:<escape>b, {c}<escape>,n:[1,true]}z", ('{"a": "b, {c}", "n": [1, true]}', "z")),
        (GEMMA, "{a:<escape><<escape>,b:{c:null}}", ('{"a": "<", "b": {"c": null}}', "")),
        (GEMMA4, '{a:<|"|>"<|"|>,b:x}', ('{"a": "\\"", "b": "x"}', "")),
        (QWEN, "<parameter=a>\n1\n</parameter>\n</function>z", ('{"a": 1}', "z")),
        (QWEN, "<parameter=a>\nx\n</parameter><parameter=b>y</parameter></function>", ('{"a": "x", "b": "y"}', "")),
        (QWEN, '<parameter=a>\n{"k": "</parameter>"}\n</parameter>\n</function>', ('{"a": {"k": "</parameter>"}}', "")),
        (QWEN, "<parameter=a>\nNone\n</parameter>\n</function>", ('{"a": null}', "")),
        (QWEN, "<parameter=a>\n1e999\n</parameter>\n</function>", ('{"a": 1e999}', "")),
        (QWEN, "<param=a>", ("{", "=a>")),
        (GLM, "<arg_key>a</arg_key><arg_value>\nx </arg_value></tool_call>", ('{"a": "\\nx "}', "")),
        (GLM, "<arg_key>a</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>", ('{"a": [1]}', "")),
    ],
)  # fmt: skip
def test_reading(style: Style, text: str, expected: tuple[str, str]) -> None:
    assert read(style, text) == expected


def test_the_schema_tells_what_is_text() -> None:
    text = "<parameter=a>\n12\n</parameter>\n</function>"
    for schema, value in (
        ({"type": "string"}, "12"),
        ({"enum": ["12", "13"]}, "12"),
        ({"const": "12"}, "12"),
        ({"type": "integer"}, 12),
        ({"type": ["string", "null"]}, 12),
        ({}, 12),
        (True, 12),
    ):
        assert json.loads(read(QWEN, text, {"properties": {"a": schema}})[0]) == {"a": value}
    assert read(QWEN, text, {"properties": 3})[0] == '{"a": 12}'


def test_nothing_is_too_deep() -> None:
    deep = "[" * 100_000
    assert read(PYTHON, f"a={deep}")[0] == '{"a": ' + "[" * 65
    assert read(QWEN, f"<parameter=a>\n{deep}\n</parameter>\n</function>") == ('{"a": ' + spelled(deep) + "}", "")
    assert len(read(JSON, '{"a": ' + deep)[0]) == 100_006


def test_long_words() -> None:
    assert read(PYTHON, "a=" + "1" * 400 + ")")[1] == ""
    assert read(PYTHON, "a=" + "1" * 500 + ")")[1] != ""
