"""JSON schemas against the standard: what llguidance would read otherwise is put right, or refused with its place."""

import json
import random
from typing import Any

import pytest

from tests import schemas, small_tokenizers
from tgi.core.errors import RequestError
from tgi.core.grammar import load_tokenizer, start
from tgi.core.vocabulary import Vocabulary
from tgi.router.grammar import Verdict, Wish
from tgi.router.schema import UNENFORCEABLE, enforced
from tgi.router.trial import tried

VOCABULARY = Vocabulary(small_tokenizers.byte_level(), {})
TOKENIZER = load_tokenizer(VOCABULARY, VOCABULARY.size, [2])
DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
INTEGER, STRING = {"type": "integer"}, {"type": "string"}


ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


def judged(schema: dict[str, Any]) -> Verdict:
    verdict = tried(TOKENIZER, Wish("json_schema", json.dumps(schema)))
    assert verdict is not None
    return verdict


def accepted(schema: dict[str, Any], *texts: str) -> list[str]:
    """Which of the texts the schema's grammar takes."""
    verdict = judged(schema)
    assert not verdict.error, verdict
    found = []
    for text in texts:
        matcher, ids = start(TOKENIZER, verdict.grammar), TOKENIZER.tokenize_str(text)
        if matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting():
            found.append(text)
    return found


def object_(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # A name has one spelling, or it would pass for another property.
        (
            object_(a=INTEGER, é=INTEGER) | {"additionalProperties": STRING},
            ['{"a":1}', '{"b":"x"}', '{"é":1}'],
            [r'{"\u0061":"x"}', r'{"\u00e9":"x"}', '{"a":"x"}'],
        ),
        (
            {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": STRING},
            ['{"ab":1}', '{"b":"x"}'],
            [r'{"\u0061":"x"}', '{"a":"x"}'],
        ),
        (STRING, [r'"\n\"\\"', '"é😀/"'], [r'"\u0041"', r'"\ud800"', r'"\/"']),
        # A property that comes twice is one.
        ({"type": "object", "minProperties": 1}, ['{"a":1}', '{"a":1,"b":2}'], ["{}"]),
        (
            object_(a=INTEGER) | {"required": ["a"], "minProperties": 2},
            ['{"a":1,"b":2}'],
            ['{"a":1}', '{"a":1,"a":2}'],
        ),
        # Keywords of other drafts, whatever the schema says it is written in.
        ({"$schema": DRAFT_4, "const": 5}, ["5"], ["6"]),
        ({"$schema": DRAFT_7, "type": "array", "prefixItems": [INTEGER]}, ["[1]"], ['["a"]']),
        ({"$schema": "http://127.0.0.1/mine", "type": "integer"}, ["5"], ['"a"']),
        ({"$schema": DRAFT_4, "maximum": 5, "exclusiveMaximum": True, "type": "integer"}, ["4"], ["5"]),
        ({"minimum": 5, "allOf": [{}], "exclusiveMinimum": True, "type": "integer"}, ["6"], ["5"]),
        ({"minimum": 5, "exclusiveMinimum": False, "type": "integer"}, ["5"], ["4"]),
        ({"type": "array", "items": [INTEGER], "allOf": [{}], "additionalItems": False}, ["[]", "[1]"], ["[1,2]"]),
        ({"type": "array", "prefixItems": [INTEGER], "additionalItems": False}, ["[1]", "[1,2]"], ['["a"]']),
        ({"type": "array", "items": INTEGER, "additionalItems": STRING}, ["[1,2]"], ['[1,"a"]', '["a"]']),
        ({"$ref": "#/definitions/a", "definitions": {"a": INTEGER}, "minimum": 3}, ["3"], ["2"]),
        # Formats.
        (
            STRING | {"format": "date"},
            ['"2024-02-29"', '"2000-02-29"'],
            ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"'],
        ),
        (STRING | {"format": "time"}, ['"23:59:59.5Z"', '"12:00:00+01:00"'], ['"22:59:60Z"', '"12:00:00"']),
        (STRING | {"format": "date-time"}, ['"2024-02-29T00:00:00Z"'], ['"2023-02-29T00:00:00Z"', '"2024-02-29"']),
        (
            STRING | {"format": "hostname"},
            ['"a"', '"a-b.c1"', f'"{"a" * 63}.b"'],
            [f'"{"a" * 64}"', '"a--b"', '"-a"', '"a-"', '""', f'"{"abcdefg." * 40}a"'],
        ),
        (
            STRING | {"format": "email"},
            ['"a@b"', '"a.b+c@d-e.fg"'],
            ['"a"', '"@b"', '"a..b@c"', '".a@b"', f'"{"a" * 65}@b"', f'"a@{"b" * 64}"', '"a@-b"'],
        ),
        (
            STRING | {"format": "date", "pattern": "^2", "allOf": [{"maxLength": 20}]},
            ['"2024-01-01"'],
            ['"1999-01-01"'],
        ),
        (INTEGER | {"format": "int32"}, ["5"], ['"5"']),
        # Regexes are JavaScript's.
        (STRING | {"pattern": r"^\S$"}, ['"a"'], ['"\ufeff"', '"\x85"', '" "']),
        (STRING | {"pattern": r"^[^\s]$"}, ['"a"'], ['"\ufeff"', '"\x85"', '" "']),
        (STRING | {"pattern": r"^\s[\s\d]$"}, ['" \u3000"', r'"\n1"'], ['"\x85 "', '" \x85"']),
        (STRING | {"pattern": r"^.$"}, ['"a"', '"é"'], [r'"\r"', r'"\n"']),
        (STRING | {"pattern": r"^(?s:.)\.[.]$"}, [r'"\n.."'], [r'"a.a"', r'"aa."']),
        (STRING | {"pattern": "b"}, ['"abc"', '"b"'], ['"a"', '""']),
        (STRING | {"pattern": r"^[\[\]]\\$"}, [r'"[\\"', r'"]\\"'], ['"["']),
        (STRING | {"pattern": r"^\d\w$"}, ['"1a"'], ['"٣a"', '"1é"']),
        # What says nothing.
        ({"type": "array", "items": INTEGER, "uniqueItems": False, "unevaluatedItems": True}, ["[1,1]"], ['["a"]']),
        (object_(a=INTEGER) | {"propertyNames": {}, "dependentRequired": {}}, ['{"a":1}'], ['{"a":"x"}']),
        (object_(a=INTEGER) | {"propertyNames": STRING, "required": ["a"]}, ['{"a":1}'], ['{"a":"x"}']),
        (STRING | {"format": "password", "required": False}, ['"a"'], ["1"]),
        # Told apart behind references, by a property that has a default.
        (
            {
                "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
                "discriminator": {"propertyName": "k", "mapping": {"a": "#/$defs/a"}},
                "$defs": {
                    kind: object_(k={"const": kind, "default": kind}, n=kinds) | {"required": ["n"]}
                    for kind, kinds in (("a", INTEGER), ("b", STRING))
                },
            },
            ['{"k":"a","n":1}', '{"k":"b","n":"x"}'],
            ['{"n":1}', '{"k":"a","n":"x"}', '{"k":"c","n":1}'],
        ),
        (
            STRING | {"pattern": ZOD_EMAIL},
            ['"a.b\'c@d-e.fg"', '"_@a.b.cd"'],
            ['"a..b@c.de"', '".a@b.cd"', '"a.@b.cd"', '"a\'@b.cd"', '"a@b"'],
        ),
        # Definitions only matter if something refers to them.
        (INTEGER | {"$defs": {"unused": {"not": {}, "minProperties": 5}}}, ["1"], ['"a"']),
    ],
)
def test_what_llguidance_would_read_otherwise(schema: dict[str, Any], good: list[str], bad: list[str]):
    assert accepted(schema, *good, *bad) == good


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_drawn_is_valid(seed: int):
    chance = random.Random(seed)
    verdict = Verdict(error="to be made")
    while verdict.error:  # a schema may contradict itself
        schema = schemas.made(chance)
        verdict = judged(schema)
        assert not verdict.error or "nsatisfiable" in verdict.error, verdict
    drawn = [schemas.draw(TOKENIZER, verdict.grammar, chance) for _ in range(5)]
    texts = [TOKENIZER.decode_str(ids) for ids in drawn if ids is not None]
    assert texts
    for text in texts:
        assert schemas.valid(schema, text), text


def nested(schema: dict[str, Any]) -> dict[str, Any]:
    """Each part of it three levels down, in three ways."""
    return object_(a={"type": "array", "items": {"anyOf": [INTEGER, {"$ref": "#/$defs/x"}]}}) | {"$defs": {"x": schema}}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"minProperties": 2}, "`minProperties` is more than one above"),
        ({"minProperties": 3, "required": ["a"]}, "`minProperties` is more than one above"),
        ({"const": 2**53 + 1}, "`const` has an integer beyond 2^53"),
        ({"enum": [1, [{"a": -(2**63)}]]}, "`enum` has an integer beyond 2^53"),
        ({"type": "integer", "minimum": 2**53 + 1}, "`minimum` has an integer beyond 2^53"),
        ({"type": "integer", "exclusiveMaximum": 10**30}, "`exclusiveMaximum` has an integer beyond 2^53"),
        ({"const": "a\x00"}, "`const` has a control character"),
        ({"enum": ["a", ["\x7f"]]}, "`enum` has a control character"),
        ({"format": "unknown"}, "Unknown format: unknown"),
        ({"type": "array", "items": [{}], "prefixItems": [{}]}, "`items` is a list beside `prefixItems`"),
        ({"extends": {}, "divisibleBy": 3}, 'Unimplemented keys: ["divisibleBy", "extends"]'),
        ({"x-guidance": {"lenient": True}}, "`x-guidance` is of the whole schema"),
        ({"$id": "a", "$ref": "#/$defs/b", "$defs": {"b": {}}}, "`$id` beside `$ref`"),
        *(
            ({"pattern": f"^{pattern}$"}, "inside brackets needs a backslash")
            for pattern in ("[a-z&&[aeiou]]", "[+--]", "[a~~b]", "[[:alpha:]]", "[]a]", "[^]", r"\[[[]")
        ),
        ({"patternProperties": {"[[]": {}}}, "inside brackets needs a backslash"),
    ],
)
def test_what_nobody_would_enforce(schema: dict[str, Any], problem: str):
    for whole, path in ((schema, "$"), (nested(schema), "$.$defs.x")):
        if "x-guidance" in whole:
            continue
        if not (whole is schema and "$id" in schema):
            with pytest.raises(RequestError) as refused:
                enforced(whole)
            assert refused.value.detail.startswith(UNENFORCEABLE + problem) or problem in refused.value.detail
            assert refused.value.detail.endswith(f" at `{path}`")
        assert enforced(whole | {"x-guidance": {"lenient": True}})


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (
            {"properties": {"a": {"items": {"prefixItems": [{}, {"format": "unknown"}]}}}},
            "$.properties.a.items.prefixItems[1]",
        ),
        ({"$ref": "#/stuff/0", "stuff": [{"format": "unknown"}]}, "$.stuff[0]"),
        ({"$ref": "#/$defs/a~1b~0%20%25", "$defs": {"a/b~ %": {"format": "unknown"}}}, "$.$defs.a/b~ %"),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name", "format": "unknown"}}}, "$.$defs.a"),
        ({"$ref": "x", "$defs": {"a": {"$id": "x", "$ref": "#/z", "z": {"format": "unknown"}}}}, "$.$defs.a"),
        (
            {"$ref": "x", "$defs": {"a": {"$id": "x", "items": {"$ref": "#/z"}, "z": {"format": "unknown"}}}},
            "$.$defs.a.z",
        ),
    ],
)
def test_whatever_has_a_say_is_looked_at(schema: dict[str, Any], path: str):
    with pytest.raises(RequestError) as refused:
        enforced(schema)
    assert refused.value.detail.endswith(f" at `{path}`")


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"not": {}}, "$"),
        (nested({"not": {}}), "$.$defs.x"),
        (object_(a={"pattern": "(?=a)b"}), "$.properties.a"),
        (object_(a={"items": {"type": "text"}}), "$.properties.a.items"),
        (object_(a={"items": {"minLength": "2"}}), "$.properties.a.items"),
        (object_(a={"items": {"$ref": "#/nowhere"}}), "$.properties.a.items"),
        (object_(a={"anyOf": [STRING, {"oneOf": [INTEGER, INTEGER]}]}), "$.properties.a.anyOf[1]"),
        ({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": object_(a=INTEGER)}}, "$"),
        (object_(a=STRING | {"required": True}), "$.properties.a"),
        ({"items": {"minimum": 5, "maximum": 3, "type": "integer"}, "minItems": 1, "type": "array"}, "$"),
        ({"allOf": [{"minimum": 5}, {"maximum": 3}], "type": "integer"}, "$"),
        ({"allOf": [INTEGER, {"minimum": 5, "maximum": 3, "type": "integer"}]}, "$.allOf[1]"),
        # Of several the one that is meant.
        (object_(a={"enum": []}, b={"pattern": "("}), "$.properties.b"),
        ({"$id": "http://127.0.0.1/x", **object_(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"not": {}}}}, "$.$defs.b"),
        (object_(**{"a/b~c%": {"not": {}}}), "$.properties.a/b~c%"),
    ],
)
def test_where_llguidance_finds_fault(schema: dict[str, Any], path: str):
    verdict = judged(schema)
    assert verdict.error.endswith(f" at `{path}`")


def test_alternatives_that_lead_back_to_themselves_come_to_an_end():
    """Without a process around it that could be killed: what tools hold is looked through in the router."""
    loop = {"oneOf": [{"$ref": "#/$defs/b"}, STRING]}, {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    enforced({"$ref": "#/$defs/a", "$defs": dict(zip("ab", loop, strict=True))})
    tree = {"oneOf": [STRING, {"$ref": "#/$defs/b"}]}, {"type": "array", "items": {"$ref": "#/$defs/a"}}
    whole = {"$ref": "#/$defs/a", "$defs": dict(zip("ab", tree, strict=True))}
    assert accepted(whole, '["x",["y"]]', "[1]") == ['["x",["y"]]']


def test_schemas_that_only_a_search_would_find_fault_with_are_refused_in_time():
    """The search for the place ends when its time is up."""
    wide = object_(
        **{f"p{n}": object_(**{f"q{n}": {"pattern": "^[a-z]{1,900}$"} for n in range(30)}) for n in range(60)}
    )
    verdict = judged(wide | {"required": ["z"], "additionalProperties": {"not": {}}})
    assert 'Unimplemented keys: ["not"]' in verdict.error


@pytest.mark.parametrize(
    ("guidance", "good", "bad"),
    [
        ({"whitespace_flexible": False}, ['{"a":[1,2]}'], ['{"a": [1,2]}']),
        ({"whitespace_flexible": True}, ['{"a":[1,2]}', '{ "a" :\t[1,\n\n2]}'], []),
        ({"whitespace_pattern": r"[ \n]{0,2}"}, ['{"a":  [1,\n2]}'], ['{"a":   [1,2]}', '{"a":\t[1,2]}']),
        ({"whitespace_pattern": r"\s?"}, ['{"a":\t[1,2]}'], ['{"a":\x0b[1,2]}', '{"a":\u00a0[1,2]}']),
        (
            {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": "},
            ['{"a": [1, 2]}'],
            ['{"a":[1,2]}'],
        ),
    ],
)
def test_layouts(guidance: dict[str, Any], good: list[str], bad: list[str]):
    schema = object_(a={"type": "array", "items": INTEGER}) | {"x-guidance": guidance}
    assert accepted(schema, *good, *bad) == good


@pytest.mark.parametrize(
    "guidance",
    [
        5,
        {"strict": True},
        {"json_allowed_escapes": "u"},
        {"json_allow_general_unicode_escapes": True},
        {"lenient": 1},
        {"whitespace_pattern": "x"},
        {"whitespace_pattern": "[^a]"},
        {"whitespace_pattern": "."},
        {"whitespace_pattern": r"\S"},
        {"whitespace_pattern": 5},
        {"item_separator": ";"},
        {"key_separator": "=>"},
    ],
)
def test_layouts_that_would_be_no_json(guidance: Any):
    with pytest.raises(RequestError, match="x-guidance"):
        enforced({"type": "object", "x-guidance": guidance})


def test_a_schema_stays_as_it_is():
    schema = object_(a={"format": "date", "uniqueItems": False}) | {"$schema": DRAFT_7, "x-guidance": {}}
    before = json.dumps(schema)
    enforced(schema)
    assert json.dumps(schema) == before
