"""Grammars through the whole server with the demo model: whatever it draws, the answer is what was asked for."""

import asyncio
import json
import random
import re
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests import schemas
from tests.serve.conftest import Server

pytestmark = pytest.mark.real

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "capital": {"type": "boolean"},
        "climate": {"enum": ["cold", "mild", "hot"]},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "population", "capital", "climate", "rivers"],
    "additionalProperties": False,
}
PROMPT = "Describe a city as JSON.\n"
HOT = {"do_sample": True, "temperature": 2.0}


def check_city(text: str) -> None:
    city = json.loads(text)
    assert list(city) == CITY["required"]
    assert isinstance(city["name"], str) and 1 <= len(city["name"]) <= 12
    assert type(city["population"]) is int and 0 <= city["population"] <= 99_999_999
    assert type(city["capital"]) is bool
    assert city["climate"] in ("cold", "mild", "hot")
    assert 1 <= len(city["rivers"]) <= 2 and all(len(river) <= 10 for river in city["rivers"])


def generate(server: Server, prompt: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    return server.generate(prompt, details=True, **{"max_new_tokens": 200, **parameters})  # type: ignore[return-value]


def test_a_schema_holds_at_high_temperature(server: Server):
    texts = set()
    for seed in range(4):
        answer = generate(server, grammar={"type": "json", "value": CITY}, seed=seed, **HOT)
        assert answer["details"]["finish_reason"] == "eos_token"
        check_city(answer["generated_text"])
        texts.add(answer["generated_text"])
    assert len(texts) == 4


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 200), marks=pytest.mark.long, id="the others of 200")]
)
def test_schemas_of_varied_features_hold_at_high_temperature(server: Server, seeds: range):
    """Each until an answer comes to its end within 200 tokens, twice at most: the hotter, the longer strings are."""

    async def ask(client: httpx.AsyncClient, turns: asyncio.Semaphore, seed: int) -> str:
        chance = random.Random(seed)
        async with turns:
            while True:
                schema = schemas.made(chance)
                for temperature in (2.0, 1.0):
                    parameters = {
                        "grammar": {"type": "json", "value": schema | {"x-guidance": {"whitespace_flexible": False}}},
                        "max_new_tokens": 200,
                        "details": True,
                        "do_sample": True,
                        "temperature": temperature,
                        "seed": chance.randrange(2**32),
                    }
                    body = {"inputs": PROMPT, "parameters": parameters}
                    response = await client.post(f"{server.url}/generate", json=body)
                    if response.status_code == 422:
                        assert "nsatisfiable" in response.text, response.text
                        break  # a schema may contradict itself
                    answer = response.json()
                    if answer["details"]["finish_reason"] == "eos_token":
                        assert schemas.valid(schema, answer["generated_text"]), (schema, answer["generated_text"])
                        return "valid"
                    assert answer["details"]["finish_reason"] == "length"
                else:
                    return "long"

    async def together() -> list[str]:
        turns = asyncio.Semaphore(16)
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(*(ask(client, turns, seed) for seed in seeds))

    assert asyncio.run(together()).count("valid") > 0.6 * len(seeds)


def test_with_and_without_a_grammar_each_is_as_alone(server: Server):
    asked: list[dict[str, Any]] = [
        {"grammar": {"type": "json", "value": CITY}, "seed": n, **HOT}
        if n % 2
        else {"seed": n, "max_new_tokens": 40, **HOT}
        for n in range(6)
    ]
    alone = [generate(server, **parameters)["generated_text"] for parameters in asked]

    async def ask(client: httpx.AsyncClient, parameters: dict[str, Any]) -> str:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 200, **parameters}}
        return (await client.post(f"{server.url}/generate", json=body)).json()["generated_text"]

    async def together() -> list[str]:
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(ask(client, parameters) for parameters in asked))

    assert asyncio.run(together()) == alone
    for number in range(1, 6, 2):
        check_city(alone[number])


def test_a_regex(server: Server):
    pattern = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
    for seed in range(4):
        answer = generate(
            server, "The server's address is ", grammar={"type": "regex", "value": pattern}, seed=seed, **HOT
        )
        assert re.fullmatch(pattern, answer["generated_text"])


def test_logprobs_are_the_models_own_and_what_is_forced_shows_in_them(server: Server):
    free = generate(server, "The capital of France is", max_new_tokens=1, top_n_tokens=5)
    forced = generate(
        server, "The capital of France is", grammar={"type": "choice", "value": [" Rome"]}, top_n_tokens=5
    )
    assert forced["generated_text"] == " Rome"
    first = forced["details"]["tokens"][0]
    for ours, own in zip(forced["details"]["top_tokens"][0], free["details"]["top_tokens"][0], strict=True):
        assert ours["id"] == own["id"]
        assert ours["logprob"] == pytest.approx(own["logprob"], abs=1e-5)
    assert first["logprob"] < free["details"]["tokens"][0]["logprob"] < 0


def test_what_is_forced_takes_no_steps_and_has_the_models_own_logprobs(server: Server):
    names = ["the_first_name_of_the_person", "whether_the_person_lives_in_town", "the_person's_favourite_colour"]
    kinds: list[Any] = [{"type": "string", "maxLength": 8}, {"type": "boolean"}, {"enum": ["red", "green", "blue"]}]
    schema = {
        "type": "object",
        "properties": dict(zip(names, kinds, strict=True)),
        "required": names,
        "additionalProperties": False,
    }

    def counted() -> tuple[int, int]:
        lines = (line.rpartition(" ") for line in httpx.get(f"{server.url}/metrics").text.splitlines())
        found = {name: float(value) for name, _, value in lines if not name.startswith("#")}
        steps = sum(found[f'tgi_batch_inference_count{{method="{method}"}}'] for method in ("prefill", "decode"))
        return int(steps), int(found["tgi_grammar_forced_tokens"])

    steps, forced = counted()
    asked: dict[str, Any] = {"grammar": {"type": "json", "value": schema}, "top_n_tokens": 2, "seed": 3, **HOT}
    details = generate(server, decoder_input_details=True, **asked)["details"]
    tokens = details["tokens"]
    after = counted()
    steps, forced = after[0] - steps, after[1] - forced
    assert steps < len(tokens) / 2
    assert steps + forced - len(tokens) in (0, 1), "a step for each token, and one where the last is forced"
    ids = [token["id"] for token in details["prefill"] + tokens]
    body = {"model": "tgi", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 2}
    choice = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()["choices"][0]
    own = choice["logprobs"]["token_logprobs"][-len(tokens) :]
    assert [token["logprob"] for token in tokens] == pytest.approx(own, abs=1e-3)
    for ours, likely in zip(details["top_tokens"], choice["logprobs"]["top_logprobs"][-len(tokens) :], strict=True):
        best = sorted(likely.values(), reverse=True)[:2]
        assert [token["logprob"] for token in ours] == pytest.approx(best, abs=1e-3)


def test_a_cut_answer_says_length(server: Server):
    answer = generate(server, grammar={"type": "json", "value": CITY}, max_new_tokens=5)
    assert answer["details"]["finish_reason"] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer["generated_text"])


def test_stop_strings_min_tokens_and_ignored_end_tokens(server: Server):
    words = {"type": "regex", "value": "([a-z]{1,8} ){1,12}END"}
    answer = generate(server, "Some words: ", grammar=words, stop=[" "], seed=1, **HOT)
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert re.fullmatch("[a-z]{1,8} ", answer["generated_text"])
    for more in ({"ignore_eos": True}, {"min_tokens": 150}):
        answer = generate(server, "Some words: ", grammar=words, seed=1, **more, **HOT)
        assert answer["details"]["finish_reason"] == "eos_token"
        assert re.fullmatch(words["value"], answer["generated_text"])


def test_best_of(server: Server):
    answer = generate(server, grammar={"type": "json", "value": CITY}, best_of=2, **HOT)
    check_city(answer["generated_text"])
    check_city(answer["details"]["best_of_sequences"][0]["generated_text"])


def test_a_stream_equals_the_whole(server: Server):
    parameters = {"grammar": {"type": "json", "value": CITY}, "seed": 3, "max_new_tokens": 200, **HOT}
    whole = generate(server, **parameters)
    with httpx.stream(
        "POST", f"{server.url}/generate_stream", json={"inputs": PROMPT, "parameters": parameters}, timeout=120
    ) as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    pieces = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(pieces) == events[-1]["generated_text"] == whole["generated_text"]


class City(BaseModel):
    name: Literal["Oslo", "Bergen"]
    climate: Literal["cold", "mild", "hot"]
    population: int | None


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_openais_client_parses_what_it_asked_for(client: openai.OpenAI):
    answer = client.chat.completions.parse(
        model="tgi", messages=ask("Tell me of Oslo."), response_format=City, max_tokens=100, temperature=0
    )
    city = answer.choices[0].message.parsed
    assert isinstance(city, City) and city.name == "Oslo"
    assert answer.choices[0].finish_reason == "stop"


def test_openais_json_objects_and_the_extras(client: openai.OpenAI):
    def content(**fields: Any) -> str:
        answer = client.chat.completions.create(
            model="tgi", messages=ask("Is the sky blue?"), max_tokens=200, seed=2, **fields
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    options = ["yes", "no", "perhaps"]
    assert content(extra_body={"guided_choice": options}) in options
    assert re.fullmatch("[A-Z]{4}", content(extra_body={"guided_regex": "[A-Z]{4}"}, temperature=2))
    number = content(extra_body={"guided_grammar": 'root ::= "-"? [1-9] [0-9]{2}'}, temperature=2)
    assert re.fullmatch("-?[1-9][0-9]{2}", number)
    check_city(content(extra_body={"response_format": {"type": "json", "value": CITY}}, temperature=2))
    streamed = client.chat.completions.create(
        model="tgi",
        messages=ask("Any JSON?"),
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_object"},
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text.startswith("{")


def test_refused_grammars_harm_nobody_else(server: Server):
    good = {"grammar": {"type": "json", "value": CITY}, "seed": 5, **HOT}
    expected = generate(server, **good)["generated_text"]
    bad: list[Any] = [
        {"type": "json", "value": {"not": {}}},
        {"type": "regex", "value": "("},
        {"type": "json", "value": {"multipleOf": 9_999_991}},
        {"type": "grammar", "value": "start: " + "r" * 100},
    ]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120) as client:
            parameters = [good, *({"grammar": grammar} for grammar in bad), good]
            bodies = [{"inputs": PROMPT, "parameters": {"max_new_tokens": 200, **fields}} for fields in parameters]
            return await asyncio.gather(*(client.post(f"{server.url}/generate", json=body) for body in bodies))

    first, *refused, last = asyncio.run(together())
    assert [response.status_code for response in refused] == [422] * len(bad)
    assert first.json()["generated_text"] == last.json()["generated_text"] == expected
