"""Grammars from the wire to the engine: every shape, every refusal, and grammars that would kill a process."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests import schemas, small_tokenizers
from tests.router.serving import Router, settings, until
from tgi.core.errors import RequestError
from tgi.core.grammar import load_tokenizer, spells_all, start
from tgi.core.vocabulary import Vocabulary
from tgi.router.grammar import LONGEST, Grammars, Verdict, Wish, grammar_of, wish_of
from tgi.router.spelling import composed
from tgi.router.stream import Detokenizer
from tgi.router.tokenizer import Tokenizer
from tgi.router.trial import tried
from tgi.router.wire.base import Unreadable, decode
from tgi.router.wire.grammar import ChoiceGrammar, FreeGrammar, JsonGrammar, JsonObjectGrammar, RegexGrammar
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import OpenAIRequest
from tgi.router.worker import LostError

END = 2
VOCABULARY = Vocabulary(small_tokenizers.byte_level(), {})
TOKENIZER = load_tokenizer(VOCABULARY, VOCABULARY.size, [END])
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def accepts(grammar: str, text: str) -> bool:
    matcher = start(TOKENIZER, grammar)
    ids = TOKENIZER.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def native(grammar: Any) -> Any:
    return decode(json.dumps({"grammar": grammar}).encode(), GenerateParameters).grammar


def openai(**fields: Any) -> Any:
    return grammar_of(decode(json.dumps(fields).encode(), OpenAIRequest))


def compiled(grammar: Any) -> str:
    return spelled(wish_of(grammar))


def spelled(wish: Wish, tokens: LLTokenizer = TOKENIZER, *, forcing: bool = True) -> str:
    verdict = tried(tokens, wish, forcing=forcing)
    assert verdict is not None and not verdict.error, verdict
    return verdict.grammar


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": POINT},
        {"type": "json", "value": json.dumps(POINT)},
        {"type": "json_object", "value": POINT},
        {"type": "json_schema", "value": {"schema": POINT}},
        {"type": "json_schema", "value": {"name": "point", "schema": POINT}},
        {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}},
        {"type": "regex", "value": r'\{"x": ?-?[0-9]+\}'},
        {"type": "choice", "value": ['{"x": 1}', '{"x":-20}']},
        {"type": "grammar", "value": 'start: "{" "\\"x\\":" " "? NUMBER "}"\nNUMBER: /-?[0-9]+/'},
        {"type": "grammar", "value": 'root ::= "{\\"x\\":" " "? "-"? [0-9]+ "}"'},
    ],
)
def test_every_shape_says_the_same_on_all_routes(grammar: dict[str, Any]):
    assert native(grammar) == openai(grammar=grammar) == openai(response_format=grammar)
    spelling = compiled(native(grammar))
    for text in ('{"x": 1}', '{"x":-20}'):
        assert accepts(spelling, text), text
    for text in ('{"x": 1', '{"x": 1} ', '{"y": 1}', '{"x": 1, "y": 2}', "1", ""):
        assert not accepts(spelling, text), text


def test_the_extras_of_other_servers():
    assert openai(guided_json=POINT) == JsonGrammar(value=POINT)
    assert openai(guided_regex="a+") == RegexGrammar(value="a+")
    assert openai(guided_choice=["a", "b"]) == ChoiceGrammar(value=["a", "b"])
    assert openai(guided_grammar="root ::= x") == FreeGrammar(value="root ::= x")
    assert openai(structured_outputs={"json": POINT, "disable_fallback": True}) == JsonGrammar(value=POINT)
    assert openai(structured_outputs={"regex": "a+"}) == RegexGrammar(value="a+")
    assert openai(structured_outputs={"choice": ["a", "b"]}) == ChoiceGrammar(value=["a", "b"])
    assert openai(structured_outputs={"grammar": "root ::= x"}) == FreeGrammar(value="root ::= x")
    assert openai(structured_outputs={"json_object": True}) == JsonObjectGrammar()
    assert openai(structured_outputs={"json_object": False}) is openai(structured_outputs={}) is None
    with pytest.raises(Unreadable, match="unknown field `jsn`"):
        openai(structured_outputs={"jsn": POINT})


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": POINT},
        {"guided_json": json.dumps(POINT)},
        {"structured_outputs": {"json": POINT}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
        {"response_format": {"type": "json_object", "value": POINT}},
    ],
)
def test_white_space_of_other_servers(fields: dict[str, Any]):
    assert accepts(compiled(openai(**fields)), '{"x":\n 1}')
    structured = fields.get("structured_outputs", {})
    for layout, good, bad in [
        ({"guided_whitespace_pattern": "[ ]?"}, '{"x": 1}', '{"x":\n 1}'),
        ({"structured_outputs": structured | {"whitespace_pattern": r"\t*"}}, '{"x":\t\t1}', '{"x": 1}'),
        ({"structured_outputs": structured | {"disable_any_whitespace": True}}, '{"x":1}', '{"x": 1}'),
    ]:
        spelling = compiled(openai(**fields | layout))
        assert accepts(spelling, good) and not accepts(spelling, bad)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"guided_json": {}, "structured_outputs": {"json": {}}},
            "`guided_json` and `structured_outputs.json` must not",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "`structured_outputs.regex` and `structured_outputs.choice` must not",
        ),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "`guided_whitespace_pattern` is of no effect"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "`structured_outputs.whitespace_pattern` is of no effect",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "`structured_outputs.disable_any_whitespace` must be all",
        ),
        (
            {"guided_json": {"x-guidance": {"whitespace_flexible": True}}, "guided_whitespace_pattern": " "},
            "`guided_whitespace_pattern` must be all",
        ),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        openai(**fields)


def test_white_space_that_is_none(grammars: Grammars):
    wish = wish_of(openai(guided_json=POINT, guided_whitespace_pattern="x*"))
    assert "`whitespace_pattern` in `x-guidance` must match nothing but white space" in refusal(grammars, wish)


def test_strict_false_leaves_to_the_model_what_cannot_be_enforced(grammars: Grammars):
    schema = POINT | {"not": {}, "format": "unknown"}
    for strict, good in ((False, True), (True, False), (None, False)):
        named = {"name": "point", "schema": schema, "strict": strict}
        for shape in ("json_schema", "value"):
            grammar = openai(response_format={"type": "json_schema", shape: named})
            if good:
                spelling = compiled(grammar)
                assert accepts(spelling, '{"x": 1}') and not accepts(spelling, '{"y": 1}')
            else:
                assert "Unknown format" in refusal(grammars, wish_of(grammar))
    own = {"name": "point", "schema": schema | {"x-guidance": {"lenient": False}}, "strict": False}
    grammar = openai(response_format={"type": "json_schema", "json_schema": own})
    assert "Unknown format" in refusal(grammars, wish_of(grammar))


def test_a_schema_in_a_string_with_a_key_that_comes_twice():
    with pytest.raises(RequestError, match="duplicate field `type`"):
        wish_of(JsonGrammar(value='{"type": "integer", "type": "string"}'))


def test_text_and_nothing_are_no_grammar():
    assert openai() is openai(response_format={"type": "text"}) is openai(response_format=None) is None


def test_json_objects_are_any_object():
    spelling = compiled(openai(response_format={"type": "json_object"}))
    assert accepts(spelling, '{"a": [1, {"b": null}], "é\\n": "\\t😀"}')
    assert accepts(spelling, '{\n  "a": {\n    "b": 1\n  }\n}')
    for text in ("[]", "1", '"a"', "{", '{"a":1}}', "{}\n"):
        assert not accepts(spelling, text)


def test_a_schema_without_a_schema_is_any_json():
    spelling = compiled(openai(response_format={"type": "json_schema", "json_schema": {"name": "any"}}))
    assert all(accepts(spelling, text) for text in ("[]", "1", '"a"', "null", '{"a": 1}'))


def test_a_schema_with_properties_is_of_an_object():
    """TGI's own examples leave the type out."""
    spelling = compiled(
        native({"type": "json", "value": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}})
    )
    assert accepts(spelling, '{"x": 1}')
    assert not accepts(spelling, "5")


def test_schemas_of_scalars_and_arrays():
    assert accepts(
        compiled(native({"type": "json", "value": {"type": "array", "items": {"type": "integer"}}})), "[1, 2]"
    )
    assert accepts(compiled(native({"type": "json", "value": "true"})), "null")


def test_white_space_comes_to_an_end():
    """Else a weak model writes nothing but it."""
    spelling = compiled(native({"type": "json", "value": POINT}))
    assert not accepts(spelling, '{"x":' + " " * 10 + "1}")
    flexible = POINT | {"x-guidance": {"whitespace_flexible": True}}
    assert accepts(compiled(native({"type": "json", "value": flexible})), '{"x":' + " " * 10 + "1}")
    compact = POINT | {"x-guidance": {"whitespace_flexible": False}}
    assert not accepts(compiled(native({"type": "json", "value": compact})), '{"x": 1}')


def test_choices_are_taken_as_they_are():
    options = [
        "a",
        "é",
        "😀",
        'x"y\n',
        "a/b",
        r"\d",
        "",
        " a",
        "(",
        "a|b",
        "a",
        "\0\x7f\u2028",
        "\t",
        "{}",
        "//",
        "#",
        "<s>",
    ]
    spelling = compiled(native({"type": "choice", "value": options}))
    assert all(accepts(spelling, option) for option in options)
    assert not any(accepts(spelling, text) for text in ("b", "1", "aa", "a ", "x", "<"))


def test_choices_of_nothing_and_of_many(grammars: Grammars):
    assert accepts(compiled(ChoiceGrammar(value=[""])), "") and not accepts(compiled(ChoiceGrammar(value=[""])), "a")
    many = [f"choice {number}" for number in range(10_000)]
    (spelling,) = compile_by(grammars, wish_of(ChoiceGrammar(value=many)))
    assert isinstance(spelling, str)
    assert accepts(spelling, many[7777]) and not accepts(spelling, "choice 10000") and not accepts(spelling, "choice ")


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('start: expr\nexpr: NUM ("+" NUM)*\nNUM: /[0-9]+/', ["1", "1+23"], ["1+", ""]),
        ('start: WORD "!"\nWORD: /[a-z]+/ & ~/no/\n%ignore / +/', ["yes!", "yes !"], ["no!", "!"]),
        ('start[lazy]: /[a-z]*b/  // "stop=" and temperature= in a comment', ["ab"], ["a"]),
        ('start: "temperature=" /stop=[0-9]/', ["temperature=stop=1"], ["stop=1"]),
        ('%llguidance {"no_forcing": true}\nstart: %json {"type": "integer", "maximum": 5} "!"', ["5!"], ["6!", "5"]),
        ('start: a | %json true\na: "x"', ["x", "[1]"], ["y"]),
        (
            'start: %json {"properties": {"a": {"format": "date"}}, "type": "object"}',
            ['{"a": "2024-02-29"}'],
            ['{"a": "x"}'],
        ),
        ('?start: "a" -> b', ["a"], ["b"]),
        ('root ::= expr\nexpr ::= num ("+" num)*  # comment "\nnum ::= [0-9]+', ["1", "1+23"], ["1+", ""]),
        ('root ::= "\\x41\\u00e9\\U0001F600\\"\\\\\\n" [\\u00e9\\x5d]{2}', ['Aé😀"\\\né]'], ["Aé😀"]),
        ('root ::= (\n  "a" |\n  "b"?\n) [^a-c"/]{1,2}', ["ad", "b😀", "xy"], ["aa", '"']),
        ('root ::= "(" root ")" | ""', ["", "(())"], ["(", ")"]),
    ],
)
def test_grammars_of_the_clients_own(text: str, good: list[str], bad: list[str]):
    spelling = compiled(FreeGrammar(value=text))
    assert [text for text in good + bad if accepts(spelling, text)] == good


@pytest.mark.parametrize(
    ("grammar", "answer"),
    [
        ({"type": "json", "value": POINT}, '{"x": 1}'),
        ({"type": "regex", "value": r"a/b|c\n"}, "a/b"),
        ({"type": "choice", "value": ["a/b", '"']}, '"'),
        ({"type": "grammar", "value": 'start: "(" start ")" | "x"'}, "((x))"),
        ({"type": "grammar", "value": 'root ::= "x" y\ny ::= "z"'}, "xz"),
    ],
)
def test_a_frame_around_an_answer(grammar: dict[str, Any], answer: str):
    frame = 'start: THOUGHT "</think>" @answer\nTHOUGHT: /[a-z ]*/'
    spelling = spelled(msgspec.structs.replace(wish_of(native(grammar)), frame=frame))
    for thought in ("", "so be it"):
        assert accepts(spelling, f"{thought}</think>{answer}")
        for text in (answer, thought, f"{thought}</think>", f"{thought}</think>{answer}!", f"8</think>{answer}"):
            assert not accepts(spelling, text)


@pytest.mark.parametrize(
    "text",
    [
        'start: "a" b\nb: "c"',
        '{"grammars": [{"lark_grammar": "start: \\"a\\" @b"}, {"name": "b", "lark_grammar": "start: \\"c\\""}]}',
    ],
)
def test_a_frame_around_a_grammar_of_our_own(text: str):
    spelling = spelled(Wish("llguidance", text, 'start: "<" @answer ">"'))
    assert accepts(spelling, "<ac>") and not accepts(spelling, "ac")


def test_what_is_wrong_in_a_frame(grammars: Grammars):
    assert "unclosed group" in refusal(grammars, Wish("regex", "(a", 'start: "<" @answer'))
    assert "unknown grammar @nobody" in refusal(grammars, Wish("regex", "a", "start: @nobody"))


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "jsonschema", "value": {}},
        {"type": "json"},
        {"type": "regex"},
        {"type": "regex", "value": {}},
        {"type": "choice", "value": "a"},
        {"type": "choice", "value": [1]},
        {"type": "json_schema"},
        {"type": "json_schema", "value": {"schema": {}}, "json_schema": {"schema": {}}},
        {"value": {}},
        "a+",
        ["a"],
    ],
)
def test_other_shapes_are_no_requests(grammar: Any):
    with pytest.raises(Unreadable, match="Failed to deserialize the JSON body"):
        native(grammar)
    with pytest.raises(Unreadable, match="response_format"):
        openai(response_format=grammar)


def test_text_is_a_format_and_no_grammar():
    with pytest.raises(Unreadable, match="type"):
        native({"type": "text"})


def test_one_grammar_at_a_time():
    with pytest.raises(
        RequestError, match=r"^Input validation error: `response_format` and `guided_regex` must not both"
    ):
        openai(response_format={"type": "json_object"}, guided_regex="a")
    assert openai(response_format={"type": "text"}, guided_regex="a") == RegexGrammar(value="a")


# --- What is refused -------------------------------------------------------------------------------------------------

NOT_VALID = "grammar is not valid: "
CANNOT = "cannot compile regex from schema: "


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (5, "grammar is not supported"),
        (True, "grammar is not supported"),
        (["a"], "grammar is not supported"),
        (None, "grammar is not supported"),
        ("{", NOT_VALID),
        ("5", NOT_VALID),
        ("[]", NOT_VALID),
        ("false", NOT_VALID),
    ],
)
def test_what_is_no_schema(value: Any, detail: str):
    with pytest.raises(RequestError) as refused:
        wish_of(native({"type": "json", "value": value}))
    assert refused.value.message.startswith(f"Input validation error: {detail}")


def test_a_schema_nested_too_deeply():
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested too deeply"):
        wish_of(JsonGrammar(value=schema))


def test_no_choice():
    with pytest.raises(RequestError, match="something to choose from"):
        wish_of(ChoiceGrammar(value=[]))


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    folder = small_tokenizers.write(tmp_path_factory.mktemp("grammars"))
    grammars = Grammars(folder, None, [2])
    yield grammars
    grammars.close()


def compile_by(grammars: Grammars, *wishes: Wish) -> list[str | RequestError]:
    """What becomes of wishes that are made at once."""

    async def all_() -> list[Any]:
        return await asyncio.gather(*map(grammars.compile, wishes), return_exceptions=True)

    return asyncio.run(all_())


def refusal(grammars: Grammars, wish: Wish) -> str:
    (outcome,) = compile_by(grammars, wish)
    assert isinstance(outcome, RequestError), outcome
    assert outcome.kind.status == 422
    assert "\n" not in outcome.detail
    return outcome.detail


def schema(value: dict[str, Any]) -> Wish:
    return wish_of(JsonGrammar(value=value))


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ({"not": {}}, f'{CANNOT}Unimplemented keys: ["not"] at `$`'),
        (
            {"properties": {"a": {"items": {"anyOf": [{}, {"type": "array", "uniqueItems": True}]}}}},
            f'{CANNOT}Unimplemented keys: ["uniqueItems"] at `$.properties.a.items.anyOf[1]`',
        ),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"if": {}, "then": {"not": {}}}}},
            f'{CANNOT}Unimplemented keys: ["if", "then"] at `$.$defs.a`',
        ),
        (
            {"properties": {"not": {"type": "string", "format": "color"}}},
            f"{CANNOT}Unknown format: color at `$.properties.not`",
        ),
        ({"items": [{"patternProperties": {"^a": {"contains": {}}}}]}, "at `$.items[0].patternProperties.^a`"),
        ({"additionalProperties": {"contains": {}}}, "at `$.additionalProperties`"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, f"{CANNOT}oneOf constraints are not supported"),
        ({"$ref": "http://127.0.0.1/schema"}, f"{CANNOT}Resource"),
        ({"$ref": "#/nowhere"}, f"{CANNOT}Pointer '/nowhere' does not exist"),
        ({"$ref": "#"}, f"{CANNOT}no text satisfies it"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, f"{CANNOT}Unsatisfiable schema"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"pattern": "("}, f"{CANNOT}regex parse error"),
        ({"minProperties": 1, "properties": {"a": {}}}, f"{CANNOT}min/maxProperties"),
        ({"type": "text"}, f"{NOT_VALID}Invalid type: text"),
        ({"minLength": "2"}, f"{NOT_VALID}Expected"),
        ({"properties": []}, f"{NOT_VALID}properties must be an object"),
        ({"properties": {"a": 5}}, f"{NOT_VALID}schema must be an object"),
    ],
)
def test_no_keyword_is_passed_over(grammars: Grammars, value: dict[str, Any], detail: str):
    assert detail in refusal(grammars, schema(value))


def test_keywords_are_passed_over_for_who_says_so(grammars: Grammars):
    (spelling,) = compile_by(grammars, schema({"type": "integer", "not": {}, "x-guidance": {"lenient": True}}))
    assert isinstance(spelling, str) and accepts(spelling, "5")


@pytest.mark.parametrize(
    ("wish", "detail"),
    [
        (Wish("regex", "(a"), "unclosed group"),
        (Wish("regex", r"(a)\1"), "backreferences are not supported"),
        (Wish("grammar", "start: ("), NOT_VALID),
        (Wish("grammar", "nothing"), NOT_VALID),
        (Wish("grammar", ""), "no start rule"),
        (Wish("grammar", 'root ::= "a'), "Unexpected end of input"),
        (Wish("grammar", "root ::= undefined"), "Rule 'undefined' not found"),
        (Wish("grammar", 'root ::= "a" root'), "Too many items"),
        (Wish("grammar", 'root ::= a-b a_b\na-b ::= "x"\na_b ::= "y"'), "already exists"),
        (Wish("grammar", 'start: "a" b'), 'unknown name: "b"'),
        (Wish("grammar", 'start[stop="x"]: /a*/'), "`stop` is not supported"),
        (Wish("grammar", "start: a\na[temperature=0.5]: /a*/"), "`temperature` is not supported"),
        (Wish("grammar", '%llguidance {"test_trace": true}\nstart: "a"'), "`test_trace` is not supported"),
        (Wish("grammar", 'start: %json {"minProperties": 3}'), "`minProperties` is more than"),
        (Wish("grammar", "start: %json {"), NOT_VALID),
        (Wish("grammar", "start: %json " + "[" * 5000), NOT_VALID),
        (Wish("grammar", '{"grammars": [{"json_schema": {"not": {}}}]}'), NOT_VALID),
        (Wish("grammar", 'start: %json {"not": {}}'), 'Unimplemented keys: ["not"]'),
        (Wish("grammar", "start: <nobody>"), "unknown special token"),
        (Wish("grammar", "start: start"), "no text satisfies it"),
        (Wish("regex", "a" * (LONGEST + 1)), f"{LONGEST} are allowed"),
    ],
)
def test_other_grammars(grammars: Grammars, wish: Wish, detail: str):
    assert refusal(grammars, wish).startswith((NOT_VALID, CANNOT))
    assert detail in refusal(grammars, wish)


def chain(length: int) -> dict[str, Any]:
    """Each definition leads to the next."""
    links = {f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {"type": "integer"}}}


def doubling(steps: int, join: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Each definition has the one before twice."""
    links = {f"d{n + 1}": join({"$ref": f"#/$defs/d{n}"}) for n in range(steps)}
    return {"$ref": f"#/$defs/d{steps}", "$defs": links | {"d0": {"type": "integer"}}}


WIDE = json.dumps({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}})
"""More at once than llguidance follows, from the first brace on."""


@pytest.mark.parametrize(
    ("wish", "detail"),
    [
        (schema(chain(3000)), "too much time or memory"),  # overflows the stack
        (schema({"type": "integer", "multipleOf": 9_999_991}), "too much time or memory"),  # as many states
        (Wish("regex", "a" * LONGEST), "too long"),  # each step of the engine would take a tenth of a second
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}), "no text"),
        (schema({"enum": ["x" * 1000 + str(n) for n in range(1000)]}), f"{LONGEST} are allowed"),
        (
            schema({"anyOf": [{"$id": str(n), "items": {"$ref": "#/x"}} for n in range(4000)]}),
            "too much time or memory",
        ),
        (schema(json.loads('{"items": ' * 200 + "{}" + "}" * 200)), "recursion limit"),
        (Wish("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000), "recursion"),
        (Wish("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000), "too deeply nested"),
        # Some ways lead out of a grammar at once, others to where it harms.
        (Wish("grammar", f'start: "a" | "b" %json {WIDE}'), "Too many items"),
        (Wish("grammar", f'start: "b" | "a" %json {WIDE}'), "Too many items"),
    ],
)
def test_grammars_that_would_harm_are_refused_and_others_go_on(grammars: Grammars, wish: Wish, detail: str):
    before, harmful, after = compile_by(grammars, Wish("regex", "a+"), wish, Wish("regex", "b+"))
    assert isinstance(harmful, RequestError) and detail in harmful.detail
    assert isinstance(before, str) and accepts(before, "aa")
    assert isinstance(after, str) and accepts(after, "bb")


@pytest.mark.parametrize(
    "value",
    [
        chain(100),
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(400)}},
        {"type": "object", "properties": {"child": {"$ref": "#"}, "value": {"type": "string"}}},
        {"enum": [f"value {n}" for n in range(5000)]},
        {"type": "string", "pattern": "^(a+)+b$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1000, "maxItems": 100_000},
        {"type": "string", "minLength": 10_000, "maxLength": 20_000},
        {},
        {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"type": "array", "items": {"$ref": "#"}}}},
        doubling(25, lambda half: {"anyOf": [half, {"type": "array", "items": half}]}),
        doubling(20, lambda half: {"allOf": [half, half]}),
        {"oneOf": [{"const": str(number)} for number in range(2000)]},
    ],
)
def test_large_and_odd_schemas_are_served(grammars: Grammars, value: dict[str, Any]):
    (spelling,) = compile_by(grammars, schema(value))
    assert isinstance(spelling, str)
    LLMatcher.validate_grammar(spelling)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        r"(\w{1,500}){1,500}",
        "(a?){100}a{100}",
        r"(?i)[a-z]{1,500}\p{L}*",
        "(x+x+)+y",
        "|".join(map(str, range(9999))),
    ],
)
def test_odd_regexes_are_served(grammars: Grammars, pattern: str):
    (spelling,) = compile_by(grammars, Wish("regex", pattern))
    assert isinstance(spelling, str)


def test_what_was_judged_before_needs_no_process(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    good, bad = Wish("regex", "once"), Wish("regex", "(once")
    first = compile_by(grammars, good, bad)
    monkeypatch.setattr(grammars, "_try", lambda wish, patient: Verdict(error="tried again"))
    again = compile_by(grammars, good, bad)
    assert again[0] == first[0]
    assert str(again[1]) == str(first[1]) != "tried again"
    assert "tried again" in refusal(grammars, Wish("regex", "twice"))


def test_verdicts_are_forgotten_by_their_size(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    grammars._verdicts.clear()
    grammars._remembered = 0
    monkeypatch.setattr("tgi.router.grammar.REMEMBERED", 10_000)
    tried = []
    monkeypatch.setattr(grammars, "_try", lambda wish, patient: tried.append(wish) or Verdict("x"))
    small, large = Wish("regex", "z"), [Wish("regex", letter * 3000) for letter in "pqr"]
    compile_by(grammars, small)
    compile_by(grammars, large[0])
    compile_by(grammars, small)  # used, so the others go first
    compile_by(grammars, large[1])
    compile_by(grammars, large[2])
    compile_by(grammars, small, large[2])
    assert tried == [small, *large]
    compile_by(grammars, large[0])
    assert tried == [small, *large, large[0]]
    many = [Wish("regex", str(number)) for number in range(50)]  # small ones take memory, too
    compile_by(grammars, *many)
    assert len(grammars._verdicts) < 9
    grammars._verdicts.clear()
    grammars._remembered = 0


def test_who_wishes_the_same_at_once_waits_for_one_trial(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    tried = []
    real = grammars._try
    monkeypatch.setattr(grammars, "_try", lambda wish, patient: tried.append(wish) or real(wish, patient=patient))
    wish = Wish("regex", "same")
    first, *others = compile_by(grammars, *[wish] * 20)
    assert isinstance(first, str) and others == [first] * 19
    assert tried == [wish]


def test_who_leaves_does_not_keep_others_from_the_verdict(grammars: Grammars):
    async def leave_one() -> str:
        tasks = [asyncio.ensure_future(grammars.compile(Wish("regex", "shared"))) for _ in range(2)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await tasks[1]

    assert accepts(asyncio.run(leave_one()), "shared")


def test_a_fault_of_ours_is_heard(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    def fail(wish: Wish, patient: bool) -> Verdict:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(grammars, "_try", fail)
        (outcome,) = compile_by(grammars, Wish("regex", "fault"))
        assert isinstance(outcome, ZeroDivisionError)
    (found,) = compile_by(grammars, Wish("regex", "fault"))
    assert isinstance(found, str)


def test_what_takes_long_lets_others_go_first(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    order = []
    real = grammars._try

    def note(wish: Wish, patient: bool) -> Verdict | None:
        order.append((wish, patient))
        return real(wish, patient=patient)

    monkeypatch.setattr(grammars, "_try", note)
    hostile = [schema({"type": "integer", "multipleOf": 9_999_991 + number}) for number in range(2)]
    small = [Wish("regex", f"small {number}") for number in range(3)]
    outcomes = compile_by(grammars, *hostile, *small)
    assert all(isinstance(outcome, RequestError) for outcome in outcomes[:2])
    assert all(isinstance(outcome, str) for outcome in outcomes[2:])
    assert order == [(wish, False) for wish in hostile + small] + [(wish, True) for wish in hostile]


def test_a_process_that_is_lost_is_started_again(grammars: Grammars):
    compile_by(grammars, Wish("regex", "first"))
    assert grammars._worker._process is not None
    grammars._worker._process.kill()
    (found,) = compile_by(grammars, Wish("regex", "second"))
    assert isinstance(found, str)


def test_a_process_that_is_lost_again_refuses_that_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch):
    def lose(question: bytes) -> bytes:
        raise LostError

    with monkeypatch.context() as patch:
        patch.setattr(grammars._worker, "ask", lose)
        assert "too much time or memory" in refusal(grammars, Wish("regex", "third"))
    (found,) = compile_by(grammars, Wish("regex", "third"))
    assert isinstance(found, str)


def test_a_model_without_an_end_token(tmp_path: Path):
    grammars = Grammars(small_tokenizers.write(tmp_path), None, [])
    try:
        assert "this model has no end token" in refusal(grammars, Wish("regex", "a"))
    finally:
        grammars.close()


# --- Every tokenizer -------------------------------------------------------------------------------------------------


def loaded(folder: Path, kind: str, width: int | None = None, ends: Sequence[int] = (END,)) -> LLTokenizer:
    vocabulary = Vocabulary.load(small_tokenizers.write(folder, kind))
    return load_tokenizer(vocabulary, width or vocabulary.size, ends)


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_what_is_drawn_reads_as_the_grammar_says_with_every_tokenizer(tmp_path: Path, kind: str):
    tokens = loaded(tmp_path, kind)
    tokenizer = Tokenizer.load(tmp_path)
    whole = spells_all(tokens)
    assert whole == (kind.startswith(("byte", "llama", "gemma")) or kind == "unigram_bytes")
    assert tokens.is_canonical
    patterns = ["( ?[a-z]+){1,6}", " the( cat| dog)* sat", "( [a-z]{1,5}){3}"]
    if whole:
        patterns += [
            r"\{\"name\": \"[^\"\\\x00-\x1f]{0,9}\"\}",
            r"(é|你好|\n|😀){1,4}",
            "<think>[a-c]*</think>",
            "  a{3} +b",
        ]
    chance, drawn = random.Random(kind), 0
    for pattern in patterns:
        verdict = tried(tokens, Wish("regex", pattern), forcing=whole)
        assert verdict is not None
        if not whole and "satisfies" in verdict.error:
            continue  # no word begins with a space, or all do
        assert not verdict.error
        for prompt in (tokenizer.encode("the cat", add_special_tokens=True), [1], []):
            ids = schemas.draw(tokens, verdict.grammar, chance, most=2000)
            assert ids is not None
            detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True, spelled=True)
            text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
            assert re.fullmatch(pattern, text), (pattern, text)
            drawn += 1
    assert drawn == 21 if whole else drawn >= 3


@pytest.mark.parametrize(
    "kind", ["byte_level", "byte_level_prefix", "byte_level_added", "llama", "gemma", "unigram_bytes"]
)
def test_forced_tokens_spell_what_is_forced(tmp_path: Path, kind: str):
    tokens = loaded(tmp_path, kind)
    text = '{"the name": "größe 你好 </s> <think>"}'
    matcher = start(tokens, composed(Wish("choice", json.dumps([text + "a", text + "b"]))))
    spelled = b""
    while forced := matcher.compute_ff_tokens():
        assert not any(map(tokens.is_special_token, forced))
        spelled += tokens.decode_bytes(forced)
        assert matcher.consume_tokens(forced)
    assert text.encode().startswith(spelled)
    assert len(spelled) > len(text.encode()) - 12


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_added", "llama"])
@pytest.mark.parametrize("more", [-40, 0, 40])
def test_fewer_and_more_logits_than_tokens(tmp_path: Path, kind: str, more: int):
    vocabulary = Vocabulary.load(small_tokenizers.write(tmp_path, kind))
    size = vocabulary.size
    tokens = loaded(tmp_path, kind, size + more, [END, size - 50, size + 30])
    assert tokens.vocab_size == size + more
    assert tokens.eos_tokens == [END, size - 50] + [size + 30] * (more > 30)
    matcher = start(tokens, composed(Wish("regex", "(.|\n)*")))
    for text in ("", "the cat", "größe 你好"):
        ids = tokens.tokenize_str(text)
        assert max(ids, default=0) < min(size, size + more)
        assert matcher.consume_tokens(ids)
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = {token for token in range(tokens.vocab_size) if mask >> token & 1}
        ends = {token for token in allowed if token >= size or tokens.is_special_token(token)}
        assert ends == set(tokens.eos_tokens) - ({size - 50} - vocabulary.special_ids)


def test_marks_that_are_not_special_are_text(tmp_path: Path):
    tokens = loaded(tmp_path, "byte_level_added")
    vocabulary = Vocabulary.load(tmp_path)
    matcher = start(tokens, composed(Wish("regex", "<think>x|</s>")))
    assert matcher.validate_tokens([vocabulary.added["<think>"]]) == 1
    assert matcher.validate_tokens([vocabulary.added["</s>"]]) == 0
    assert matcher.validate_tokens(tokens.tokenize_str("</s>")) == 4
    special = start(tokens, composed(Wish("grammar", 'start: <|im_end|> "a"')))
    assert special.validate_tokens([vocabulary.added["<|im_end|>"]]) == 1


def test_what_only_the_config_calls_special_is_special(tmp_path: Path):
    folder = small_tokenizers.write(tmp_path, "byte_level", tokenizer_config={"pad_token": "<think>"})
    grammars = Grammars(folder, None, [END])
    own = tmp_path / "own.json"
    own.write_text('{"pad_token": null}')
    others = Grammars(folder, str(own), [END])
    try:
        (found,) = compile_by(grammars, Wish("grammar", 'start: <think> "a"'))
        assert isinstance(found, str)
        assert "unknown special token" in refusal(others, Wish("grammar", 'start: <think> "a"'))
    finally:
        grammars.close()
        others.close()


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("router"))) as router:
        router.says("a</s>")
        yield router


def test_the_engine_is_told(router: Router):
    until(lambda: router.generate(grammar={"type": "regex", "value": "a/b"}).status_code == 200)
    sampling = router.engine.submits[-1].sampling
    assert accepts(sampling.grammar, "a/b")
    assert sampling.end_token_ids == sorted(router.service.tokenizer.eos_ids) != []
    router.generate()
    sampling = router.engine.submits[-1].sampling
    assert (sampling.grammar, sampling.end_token_ids) == ("", [])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
        {"response_format": {"type": "json", "value": POINT}},
        {"grammar": {"type": "json", "value": POINT}},
        {"guided_json": POINT},
        {"guided_json": json.dumps(POINT)},
        {"guided_choice": ['{"x": 1}', '{"x": 2}']},
        {"guided_regex": r'\{"x": [0-9]+\}'},
        {"guided_grammar": 'root ::= "{\\"x\\": " [0-9] "}"'},
        {"guided_json": POINT, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "guidance"},
        {"structured_outputs": {"json": POINT}},
    ],
)
def test_openais_routes(router: Router, fields: dict[str, Any]):
    for ask in (router.chat, router.complete):
        for stream in (False, True):
            assert ask(**fields, stream=stream).status_code == 200
            grammar = router.engine.submits[-1].sampling.grammar
            assert accepts(grammar, '{"x": 1}') and not accepts(grammar, "1")


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"guided_regex": "("}, "grammar is not valid"),
        ({"guided_choice": []}, "something to choose from"),
        ({"guided_json": "{"}, "grammar is not valid"),
        ({"response_format": {"type": "json", "value": {"not": {}}}}, CANNOT),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "must not both be set"),
        ({"grammar": {"type": "json", "value": 1}}, "grammar is not supported"),
        ({"guided_decoding_backend": "outlines"}, "`guided_decoding_backend` is not supported"),
        ({"structural_tag": {}}, "`structural_tag` is not supported"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "`structured_outputs.structural_tag` is not supported"),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "`structured_outputs.disable_additional_properties` is not supported",
        ),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "structural_tag"),
    ],
)
def test_refusals_on_openais_routes(router: Router, fields: dict[str, Any], detail: str):
    for ask in (router.chat, router.complete):
        for stream in (False, True):
            response = ask(**fields, stream=stream)
            assert response.status_code == 422
            assert detail in response.text


def test_refusals_on_native_routes(router: Router):
    response = router.generate(grammar={"type": "json", "value": {"not": {}}})
    assert response.status_code == 422
    assert response.json() == {
        "error": f'Input validation error: {CANNOT}Unimplemented keys: ["not"] at `$`',
        "error_type": "validation",
    }


def test_a_grammar_and_one_of_the_callers_own(router: Router):
    parameters = GenerateParameters(grammar=RegexGrammar(value="a"))
    with pytest.raises(RequestError, match=r"^Tool error: Grammar and tools are mutually exclusive$"):
        asyncio.run(router.service.validator.validate("hello", parameters, grammar='start: "a"'))


def test_without_grammar_support(tmp_path: Path):
    with Router(settings(tmp_path, grammars=False)) as router:
        router.says("a</s>")
        for response in (
            router.generate(grammar={"type": "regex", "value": "a"}),
            router.chat(response_format={"type": "json_object"}),
            router.complete(guided_regex="a"),
        ):
            assert response.status_code == 422
            assert "Input validation error: grammar is not supported" in response.text
        assert router.chat(response_format={"type": "text"}).status_code == 200
