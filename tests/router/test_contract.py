"""TGI's contract in tables: each of its validation errors, word for word on each route that it is raised on, and each
field of a request, seen to change what the engine is asked for or what the client is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from msgspec.structs import replace

import tgi
from tests import small_tokenizers
from tests.router import serving
from tests.router.serving import LIMITS, Router, events, settings
from tgi.core import errors
from tgi.core.messages import Submit, Thinking
from tgi.router.dialects import native
from tgi.router.routes import ROUTES
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"))) as router:
        yield router


# --- How each route is asked, and how it tells of an error -----------------------------------------------------------

Body = dict[str, Any]


def native_body(fields: Body) -> Body:
    inputs = fields.get("inputs", "hello")
    return {"inputs": inputs, "parameters": {name: value for name, value in fields.items() if name != "inputs"}}


def chat_body(fields: Body) -> Body:
    return {"messages": [{"role": "user", "content": fields.get("inputs", "hello")}]} | {
        name: value for name, value in fields.items() if name != "inputs"
    }


def completion_body(fields: Body) -> Body:
    return {"prompt": fields.get("inputs", "hello")} | {
        name: value for name, value in fields.items() if name != "inputs"
    }


def vertex_body(fields: Body) -> Body:
    return {"instances": [native_body(fields)]}


def infer_body(fields: Body) -> Body:
    inputs = fields.get("inputs", "hello").encode()
    return {
        "id": "1",
        "inputs": [{"name": "i", "shape": [1], "datatype": "BYTES", "data": list(inputs)}],
        "outputs": [{"name": "o"}],
        "parameters": {name: value for name, value in fields.items() if name != "inputs"},
    }


@dataclass(frozen=True)
class Way:
    """One way to ask for a generation."""

    path: str
    body: Callable[[Body], Body]
    stream: bool | None = None
    """As a field; None: the route decides."""

    def ask(self, router: Router, fields: Body) -> httpx.Response:
        stream = {} if self.stream is None else {"stream": self.stream}
        return router.http.post(self.path, json=self.body(fields) | stream)


NATIVE = [
    Way("/generate", native_body),
    Way("/", native_body),
    Way("/", native_body, stream=False),
    Way("/invocations", native_body),
    Way("/vertex", vertex_body),
    Way("/v2/models/m/versions/1/infer", infer_body),
]
NATIVE_STREAMS = [
    Way("/generate_stream", native_body),
    Way("/", native_body, stream=True),
    Way("/invocations", native_body, stream=True),
]
CHAT = [Way(path, chat_body, stream) for path in ("/v1/chat/completions", "/invocations") for stream in (False, True)]
COMPLETIONS = [
    Way(path, completion_body, stream) for path in ("/v1/completions", "/invocations") for stream in (False, True)
]


def told(way: Way, response: httpx.Response) -> tuple[int, Body]:
    """Status and JSON of an error. A native stream begins with 200 and tells of it in its only event."""
    if way in NATIVE_STREAMS:
        assert response.status_code == 200
        (event,) = events(response.content)
        return 200, event
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()


# --- Validation errors -----------------------------------------------------------------------------------------------

LONG = "cat " * 101
SAMPLING = "you must use sampling when `best_of` is > 1"


@dataclass(frozen=True)
class Error:
    """One row of TGI's table of validation errors: what raises it, on native routes and on OpenAI's."""

    row: int
    text: str
    native: Body | None = None
    streams: Body | None = None
    """On native streams, if not as ``native``."""
    chat: Body | None = None
    completions: Body | None = None


def everywhere(row: int, text: str, native: Body, **openai: Any) -> Error:
    """The same fields on all routes, or others on OpenAI's."""
    fields = openai or native
    return Error(row, text, native, native, fields, fields)


ERRORS = [
    Error(1, "`best_of` must be > 0 and <= 2. Given: 3", {"best_of": 3, "do_sample": True}),
    Error(3, SAMPLING, {"best_of": 2}),
    Error(4, "`seed` must not be set when `best_of` > 1", {"best_of": 2, "do_sample": True, "seed": 1}),
    Error(5, "`best_of` != 1 is not supported when streaming tokens", streams={"best_of": 2, "do_sample": True}),
    Error(5, "`best_of` != 1 is not supported when streaming tokens", streams={"best_of": 0}),
    Error(
        6,
        "`top_n_tokens` must be >= 0 and <= 5. Given: 6",
        {"top_n_tokens": 6},
        {"top_n_tokens": 6},
        {"top_logprobs": 6},
        {"logprobs": 6},
    ),
    Error(
        8,
        "`decoder_input_details` == true is not supported when streaming tokens",
        streams={"decoder_input_details": True},
    ),
    Error(9, "`temperature` must be strictly positive", {"temperature": 0.0}, {"temperature": 0.0}),
    everywhere(9, "`temperature` must be strictly positive", {"temperature": -0.1}),
    everywhere(10, "`repetition_penalty` must be strictly positive", {"repetition_penalty": 0.0}),
    everywhere(11, "`frequency_penalty` must be >= -2.0 and <= 2.0", {"frequency_penalty": 2.1}),
    everywhere(11, "`frequency_penalty` must be >= -2.0 and <= 2.0", {"frequency_penalty": -2.1}),
    Error(12, "`top_p` must be > 0.0 and < 1.0", {"top_p": 1.0}, {"top_p": 1.0}),
    Error(12, "`top_p` must be > 0.0 and < 1.0", {"top_p": 0.0}, {"top_p": 0.0}),
    everywhere(13, "`top_k` must be strictly positive", {"top_k": 0}),
    Error(
        14,
        "`truncate` must be strictly positive and less than 100. Given: 101",
        {"truncate": 101},
        {"truncate": 101},
    ),
    Error(14, "`truncate` must be strictly positive and less than 100. Given: 0", {"truncate": 0}, {"truncate": 0}),
    Error(15, "`typical_p` must be > 0.0 and < 1.0", {"typical_p": 1.0}, {"typical_p": 1.0}),
    everywhere(17, "`max_new_tokens` must be strictly positive", {"max_new_tokens": 0}, max_tokens=0),
    everywhere(
        19,
        "`inputs` tokens + `max_new_tokens` must be <= 200. Given: {given} `inputs` tokens and 5000 `max_new_tokens`",
        {"max_new_tokens": 5000},
        max_tokens=5000,
    ),
    everywhere(20, "`inputs` must have less than 100 tokens. Given: {given}", {"inputs": LONG}),
    Error(21, "`inputs` cannot be empty", {"inputs": ""}, {"inputs": ""}, None, {"inputs": ""}),
    everywhere(22, "`stop` supports up to 4 stop sequences. Given: 5", {"stop": list("abcde")}),
    everywhere(24, "grammar is not supported", {"grammar": {"type": "json", "value": 3}}),
    everywhere(
        25, "grammar is not valid: Input data was truncated", {"grammar": {"type": "json", "value": '{"properties"'}}
    ),
    everywhere(
        26,
        "cannot compile regex from schema: regex parse error: (?=a) ^^^ error: look-around, including look-ahead and "
        "look-behind, is not supported at `$.properties.a`",
        {"grammar": {"type": "json", "value": {"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}}},
    ),
]

SOLO = {2: "`best_of` != 1 is not allowed for this endpoint"}
"""Needs a server of its own, as does row 23."""
OF_IMAGES = set(range(27, 34))
NEVER = {7, 16, 18, 34}
"""Nothing raises them, in TGI neither."""


def test_no_row_is_forgotten() -> None:
    assert {error.row for error in ERRORS} | SOLO.keys() | {23} | OF_IMAGES | NEVER == set(range(1, 35))


def raised() -> Iterator[Any]:
    for error in ERRORS:
        for ways, fields in (
            (NATIVE, error.native),
            (NATIVE_STREAMS, error.streams),
            (CHAT, error.chat),
            (COMPLETIONS, error.completions),
        ):
            if fields is not None:
                for way in ways:
                    streamed = " stream" if way.stream else ""
                    yield pytest.param(way, fields, error.text, id=f"{error.row} {way.path}{streamed} {fields}"[:80])


@pytest.mark.parametrize(("way", "fields", "text"), list(raised()))
def test_validation_errors(router: Router, way: Way, fields: Body, text: str) -> None:
    before = len(router.engine.submits)
    text = text.replace("{given}", str(tokens_of(router, way, fields)))
    status, error = told(way, way.ask(router, fields))
    assert error == {"error": f"Input validation error: {text}", "error_type": "validation"}
    assert status == (200 if way in NATIVE_STREAMS else 422)
    assert len(router.engine.submits) == before


def tokens_of(router: Router, way: Way, fields: Body) -> int:
    """How many the prompt has."""
    inputs = fields.get("inputs", "hello")
    text = f"<user>{inputs};<assistant>" if way in CHAT else inputs
    return len(router.service.tokenizer.encode(text, add_special_tokens=way not in CHAT))


@pytest.mark.parametrize("way", [*NATIVE, *COMPLETIONS], ids=lambda way: f"{way.path} {way.stream}")
def test_best_of_where_it_is_turned_off(tmp_path: Path, way: Way) -> None:
    with Router(settings(tmp_path, replace(LIMITS, max_best_of=1))) as router:
        _, error = told(way, way.ask(router, {"best_of": 2, "temperature": 0.5}))
        assert error == {"error": f"Input validation error: {SOLO[2]}", "error_type": "validation"}


def test_grammars_where_they_are_turned_off(tmp_path: Path) -> None:
    """Row 24 again."""
    with Router(settings(tmp_path, grammars=False)) as router:
        for way in (*NATIVE, *NATIVE_STREAMS, *CHAT, *COMPLETIONS):
            _, error = told(way, way.ask(router, {"grammar": {"type": "regex", "value": "a"}}))
            assert error == {"error": "Input validation error: grammar is not supported", "error_type": "validation"}


def test_a_tokenizer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23: this one knows two words, and no token for others."""
    narrow = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    monkeypatch.setattr(small_tokenizers, "serialized", lambda kind: narrow.to_str())
    with Router(settings(tmp_path)) as router:
        for way in (*NATIVE, *NATIVE_STREAMS, *CHAT, *COMPLETIONS):
            _, error = told(way, way.ask(router, {}))
            assert error["error"].startswith("Input validation error: tokenizer error ")
            assert error["error_type"] == "validation"
        response = router.http.post("/tokenize", json={"inputs": "hello"})
        assert response.json()["error"].startswith("Input validation error: tokenizer error ")


def test_every_kind_of_error_is_raised_somewhere() -> None:
    """TGI's table has some that nothing raises."""
    kinds = {name for name, value in vars(errors).items() if isinstance(value, errors.Kind)}
    sources = "".join(path.read_text() for path in Path(tgi.__file__).parent.rglob("*.py"))
    assert kinds == kinds & set(re.findall(r"RequestError\((\w+)", sources))


# --- Bodies that are no request --------------------------------------------------------------------------------------

BODIES = [row for row in ROUTES if row.body is not None and row.errors is native.ERRORS]


@pytest.mark.parametrize("row", BODIES, ids=lambda row: row.path)
def test_unreadable_bodies(router: Router, row: Any) -> None:
    path = row.path.replace("{model_name:path}", "m").replace("{model_version}", "1")
    json = {"content-type": "application/json"}
    for headers, content, status, text in (
        ({}, b"{}", 415, "Expected request with `Content-Type: application/json`"),
        (json, b"{", 400, "Failed to parse the request body as JSON: "),
        (json, b"[]", 422, "Failed to deserialize the JSON body into the target type: "),
        (json, b"{}", 422, "Failed to deserialize the JSON body into the target type: "),
        (json, b" " * 100_001, 413, "Failed to buffer the request body: length limit exceeded"),
    ):
        response = router.http.post(path, content=content, headers=headers)
        assert response.status_code == status
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        assert response.text.startswith(text)


def test_null_is_only_for_fields_that_may_be_absent(router: Router) -> None:
    for way, name in (
        *(
            (NATIVE[0], name)
            for name in ("inputs", "do_sample", "watermark", "details", "decoder_input_details", "stop")
        ),
        (NATIVE[0], "ignore_eos"),
        (COMPLETIONS[0], "prompt"),
        (CHAT[0], "messages"),
    ):
        response = way.ask(router, {name: None})
        assert (response.status_code, response.text[:6]) == (422, "Failed")
    assert router.http.post("/generate", json={"inputs": "a", "parameters": None}).status_code == 422
    assert router.http.post("/", json={"inputs": "a", "stream": None}).status_code == 422


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, "0.5", "NaN"])
@pytest.mark.parametrize("name", ["seed", "max_tokens", "n", "top_k", "priority", "stop_token_ids", "prompt"])
def test_numbers_that_no_integer_field_can_hold(router: Router, name: str, number: str) -> None:
    value = f"[{number}]" if name in ("stop_token_ids", "prompt") else number
    content = ("{" + ("" if name == "prompt" else '"prompt":"hello",') + f'"{name}":{value}' + "}").encode()
    before = len(router.engine.submits)
    response = router.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == (400 if number == "NaN" else 422)
    assert len(router.engine.submits) == before


# --- Every field has its effect --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a request came to."""

    router: Router
    response: httpx.Response
    submits: list[Submit]

    @property
    def submit(self) -> Submit:
        return self.submits[0]

    @property
    def prompt(self) -> str:
        """As the model reads it."""
        return self.router.service.tokenizer.decode(self.submit.token_ids, skip_special_tokens=False)

    @property
    def text(self) -> str:
        answer = self.answer
        if "generated_text" in answer:
            return str(answer["generated_text"])
        choice = answer["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])

    @property
    def answer(self) -> Any:
        return self.response.json()

    @property
    def choice(self) -> Any:
        return self.answer["choices"][0]

    @property
    def usages(self) -> list[bool]:
        """Whether each chunk of a stream tells the usage."""
        return [bool(chunk.get("usage")) for chunk in events(self.response.content)[:-1]]


@dataclass(frozen=True)
class Field:
    """With the value ``observe`` sees ``expected`` (``...`` for anything), and without it something else."""

    name: str
    value: Any
    observe: Callable[[Seen], Any]
    expected: Any
    beside: Body = field(default_factory=dict)
    """Sent in both cases."""

    def __str__(self) -> str:
        return self.name


def sampled(name: str, value: Any, expected: Any = None, **beside: Any) -> Field:
    """A field that reaches the engine under its own name."""
    return Field(name, value, lambda seen: getattr(seen.submit.sampling, name), expected or value, beside)


def enforced(name: str, value: Any, **beside: Any) -> Field:
    """A field that makes a grammar."""
    return Field(name, value, lambda seen: seen.submit.sampling.grammar != "", True, beside)


SAID = " the lazy dog</s>"
"""What the model says to everything; the end token is the fourth."""

REGEX = {"type": "regex", "value": "a+"}

COMMON = [
    sampled("temperature", 0.5),
    sampled("top_k", 7),
    sampled("top_p", 0.5),
    sampled("min_p", 0.25),
    sampled("repetition_penalty", 1.5),
    sampled("frequency_penalty", -0.5),
    sampled("presence_penalty", 0.5),
    sampled("seed", 2**64 - 1, temperature=0.5),
    sampled("logit_bias", {"5": 1.5}, {5: 1.5}),
    sampled("min_tokens", 2),
    sampled("watermark", True, (0.5, 2.0)),
    enforced("grammar", REGEX),
    Field("ignore_eos", True, lambda seen: seen.submit.stop_token_ids, []),
    Field("stop_token_ids", [7], lambda seen: seen.submit.stop_token_ids, [2, 7]),
    Field("stop", ["azy"], lambda seen: "dog" in seen.text, False),
    Field("skip_special_tokens", False, lambda seen: seen.text, f"{SAID}", {"include_stop_str_in_output": True}),
    Field("priority", -5, lambda seen: seen.submit.priority, -5),
    Field("cache_salt", "mine", lambda seen: len(seen.submit.cache_salt), 32),
]

NATIVE_FIELDS = [
    *COMMON,
    sampled("typical_p", 0.5),
    Field("do_sample", True, lambda seen: seen.submit.sampling.greedy, False),
    Field("top_n_tokens", 2, lambda seen: len(seen.answer["details"].get("top_tokens", [[]])[0]), 2, {"details": True}),
    Field("max_new_tokens", 2, lambda seen: seen.submit.max_new_tokens, 2),
    Field("best_of", 2, lambda seen: len(seen.submits), 2, {"do_sample": True}),
    Field("return_full_text", True, lambda seen: seen.text, "hello the lazy dog"),
    Field("include_stop_str_in_output", False, lambda seen: seen.text, " the l", {"stop": ["azy"]}),
    Field("add_special_tokens", False, lambda seen: seen.prompt, "hello"),
    Field("truncate", 1, lambda seen: len(seen.submit.token_ids), 1),
    Field("details", True, lambda seen: "details" in seen.answer, True),
    Field("decoder_input_details", True, lambda seen: len(seen.answer["details"]["prefill"]), 2, {"details": True}),
]

OPENAI_FIELDS = [
    *COMMON,
    enforced("response_format", {"type": "json_object"}),
    enforced("guided_json", {"type": "object"}),
    enforced("guided_regex", "a+"),
    enforced("guided_choice", ["a", "b"]),
    enforced("guided_grammar", 'root ::= "a"'),
    enforced("structured_outputs", {"regex": "a+"}),
    Field(
        "guided_whitespace_pattern", " ", lambda seen: '" "' in seen.submit.sampling.grammar, True, {"guided_json": {}}
    ),
    Field("max_tokens", 2, lambda seen: seen.submit.max_new_tokens, 2),
    Field("include_stop_str_in_output", True, lambda seen: seen.text, " the lazy", {"stop": ["azy"]}),
    Field("n", 2, lambda seen: len(seen.answer["choices"]), 2),
    Field("stream", True, lambda seen: seen.response.headers["content-type"], "text/event-stream"),
    Field(
        "stream_options",
        {"continuous_usage_stats": True},
        lambda seen: all(seen.usages),
        True,
        {"stream": True},
    ),
]

COMPLETION_FIELDS = [
    *OPENAI_FIELDS,
    Field("prompt", "the cat", lambda seen: seen.prompt, "<s> the cat"),
    Field("add_special_tokens", False, lambda seen: seen.prompt, "hello"),
    Field("best_of", 2, lambda seen: (len(seen.submits), len(seen.answer["choices"])), (2, 1)),
    Field("echo", True, lambda seen: seen.text, "hello the lazy dog"),
    Field(
        "logprobs",
        1,
        lambda seen: (seen.choice["logprobs"] or {}).get("token_logprobs"),
        [-n / 8 for n in (1, 2, 3, 4)],
    ),
]

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the cat"}]

CHAT_FIELDS = [
    *OPENAI_FIELDS,
    Field("messages", TALK[:1], lambda seen: "<user>a;" in seen.prompt, True),
    Field("max_completion_tokens", 2, lambda seen: seen.submit.max_new_tokens, 2),
    Field("add_special_tokens", True, lambda seen: seen.submit.token_ids[0], 1),
    Field("logprobs", True, lambda seen: len((seen.choice["logprobs"] or {"content": []})["content"]), 4),
    Field(
        "top_logprobs",
        2,
        lambda seen: [len(token["top_logprobs"]) for token in seen.choice["logprobs"]["content"]],
        [2, 2, 2, 2],
        {"logprobs": True},
    ),
    Field("tools", TOOLS, lambda seen: "weather" in seen.prompt, True),
    Field("tool_choice", "required", lambda seen: seen.submit.sampling.grammar, ..., {"tools": TOOLS}),
    Field("tool_prompt", "the fox", lambda seen: "the fox" in seen.prompt, True, {"tools": TOOLS}),
    Field("parallel_tool_calls", True, lambda seen: seen.submit.sampling.grammar, ..., {"tools": TOOLS}),
    Field("documents", [{"text": "of cats"}], lambda seen: "of cats" in seen.prompt, True),
    Field("add_generation_prompt", False, lambda seen: "<assistant>" in seen.prompt, False),
    Field("continue_final_message", False, lambda seen: "the cat;" in seen.prompt, True, {"messages": TALK}),
    Field("chat_template_kwargs", {"suffix": "!"}, lambda seen: seen.prompt[-1], "!"),
    Field("reasoning_effort", "high", lambda seen: "high" in seen.prompt, True),
    Field("enable_thinking", True, lambda seen: "True" in seen.prompt, True),
    Field("thinking_budget", 7, lambda seen: seen.submit.sampling.thinking, Thinking(7, "<think>", "</think>")),
]

REFUSED: dict[str, Any] = {"adapter_id": "x"}
REFUSED_BY_OPENAIS_ROUTES = REFUSED | {
    "guided_decoding_backend": "outlines",
    "structural_tag": {"type": "structural_tag"},
}
REFUSED_IN_CHAT = REFUSED_BY_OPENAIS_ROUTES | {
    "best_of": 2,
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "chat_template": "x",
    "audio": {"voice": "x", "format": "wav"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "x"},
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
ANY: dict[str, Any] = {
    "model": "any",
    "user": "me",
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "safety_identifier": "x",
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "x",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
}
"""Of these nobody looks at any but the model: and there is only one."""


@dataclass(frozen=True)
class Family:
    """The fields of one kind of request."""

    way: Way
    kinds: tuple[Any, ...]
    fields: list[Field]
    refused: Body
    without_effect: Body = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    """Shown by other tests."""


FAMILIES = [
    Family(NATIVE[0], (GenerateParameters,), NATIVE_FIELDS, REFUSED),
    Family(COMPLETIONS[0], (CompletionRequest,), COMPLETION_FIELDS, REFUSED_BY_OPENAIS_ROUTES, ANY, ("suffix",)),
    Family(CHAT[0], (ChatRequest,), CHAT_FIELDS, REFUSED_IN_CHAT, ANY, ("include_reasoning", "separate_reasoning")),
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Of a model whose tokenizer adds a token in front, and whose template reads all there is."""
    template = (
        serving.TEMPLATE + "{# </think> #}{{ reasoning_effort }}{{ enable_thinking }}"
        "{% for document in documents or [] %}{{ document.text }}{% endfor %}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "TEMPLATE", template)
        limits = replace(LIMITS, max_input_tokens=1000, max_total_tokens=2000)
        own = settings(tmp_path_factory.mktemp("model"), limits)
    small_tokenizers.write(Path(own.model.folder), "llama")
    with Router(own) as router:
        router.says(SAID.lstrip())
        yield router


def ask(router: Router, way: Way, fields: Body) -> Seen:
    before = len(router.engine.submits)
    response = router.http.post(way.path, json=way.body({}) | way.body(fields))
    return Seen(router, response, router.engine.submits[before:])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.way.path)
def test_no_field_is_forgotten(family: Family) -> None:
    fields = {name for kind in family.kinds for name in kind.__struct_fields__}
    shown = {field.name for field in family.fields}
    assert shown | family.refused.keys() | family.without_effect.keys() | set(family.elsewhere) == fields


@pytest.mark.parametrize(
    ("way", "shown"),
    [
        pytest.param(family.way, field, id=f"{family.way.path} {field.name}")
        for family in FAMILIES
        for field in family.fields
    ],
)
def test_a_field_has_its_effect(talker: Router, way: Way, shown: Field) -> None:
    without = ask(talker, way, shown.beside)
    assert without.response.status_code == 200, without.response.text
    given = ask(talker, way, shown.beside | {shown.name: shown.value})
    assert given.response.status_code == 200, given.response.text
    assert shown.expected in (shown.observe(given), ...)
    assert shown.observe(given) != shown.observe(without)


@pytest.mark.parametrize(
    ("way", "name", "value"),
    [
        pytest.param(family.way, name, value, id=f"{family.way.path} {name}")
        for family in FAMILIES
        for name, value in family.refused.items()
    ],
)
def test_a_field_is_refused_by_its_name(talker: Router, way: Way, name: str, value: Any) -> None:
    seen = ask(talker, way, {name: value})
    assert seen.response.status_code == 422
    assert seen.answer == {"error": f"Input validation error: `{name}` is not supported", "error_type": "validation"}
    assert not seen.submits


@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.way.path)
def test_a_field_without_effect(talker: Router, family: Family) -> None:
    for name, value in family.without_effect.items():
        plain, given = (ask(talker, family.way, fields | {"seed": 1}) for fields in ({}, {name: value}))
        (one,), (other,) = plain.submits, given.submits
        assert replace(one, id=0, arrived=0) == replace(other, id=0, arrived=0)
        assert given.answer["choices"] == plain.answer["choices"]
        assert given.answer["model"] == "a/model"
