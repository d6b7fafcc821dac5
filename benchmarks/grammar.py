"""What grammars cost: compiling them, masks, the steps that forced tokens save, and what hostile ones do to others.

    python benchmarks/grammar.py                                   # compile and mask, one core, no model
    python benchmarks/grammar.py --batch 1 8 32                    # also the engine's loop, with the model
    python benchmarks/grammar.py --url http://127.0.0.1:3000       # a running stream beside hostile grammars

The documents that the grammars are walked along are in this file. Medians, unless it says otherwise.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy
from llguidance import LLTokenizer, grammar_from
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tgi.core.config import BLOCK_SIZE, KVPool, Limits, ModelFiles, Settings
from tgi.core.grammar import load_tokenizer, start
from tgi.core.messages import Delta, Sampling, Submit
from tgi.core.vocabulary import Vocabulary
from tgi.engine.grammar import Grammars
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store
from tgi.router.formats import CALLS, TGI, Format
from tgi.router.grammar import Wish, wish_of
from tgi.router.spelling import composed
from tgi.router.tools import ReplyGrammar, Tools
from tgi.router.wire.grammar import ChoiceGrammar, FreeGrammar, JsonGrammar, RegexGrammar
from tgi.router.wire.openai import Function
from tgi.runtime.runner import Runner

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "active": {"type": "boolean"},
        "role": {"enum": ["admin", "editor", "viewer"]},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "note": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "role", "address"],
    "additionalProperties": False,
}
SOMEBODY = {
    "name": "Ada Lovelace",
    "age": 36,
    "email": "ada@example.org",
    "active": True,
    "role": "admin",
    "score": 9.75,
    "tags": ["mathematics", "poetry"],
    "address": {"street": "12 St James's Square", "city": "London", "zip": "10001"},
    "note": "wrote the first program",
}
WEATHER = Function(
    name="get_current_weather",
    parameters={
        "type": "object",
        "properties": {"location": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["location", "unit"],
    },
)
OPTIONAL = {
    "type": "object",
    "properties": {f"field_{n}": {"type": "string", "maxLength": 20} for n in range(40)},
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


def tools(required: bool) -> Tools:
    return Tools([WEATHER], [], "", required, None, False, True)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


HERMES = next(row for row in CALLS if row.name == "hermes")
CALLED = [("get_current_weather", {"location": "Paris, France", "unit": "celsius"})]


def grammars() -> dict[str, tuple[str, str]]:
    """Name → (grammar as the engine takes it, a document)."""
    asked: dict[str, tuple[JsonGrammar | RegexGrammar | ChoiceGrammar | FreeGrammar, str]] = {
        "nine fields, nested": (JsonGrammar(value=PERSON), compact(SOMEBODY)),
        "forty optional fields": (JsonGrammar(value=OPTIONAL), compact({f"field_{n}": "abc" for n in range(0, 40, 3)})),
        "recursive": (
            JsonGrammar(value=TREE),
            compact({"value": 1, "children": [{"value": 2, "children": []}, {"value": 3, "children": []}]}),
        ),
        "any JSON object": (JsonGrammar(value={"type": "object"}), compact(SOMEBODY)),
        "regex, a date and words": (
            RegexGrammar(value=r"\d{4}-\d{2}-\d{2}: (\w+ ){1,9}\w+"),
            "2026-11-22: one two six",
        ),
        "words": (RegexGrammar(value=r"(\w+ ){50,200}"), "one two six " * 20),
        "choice of 100": (ChoiceGrammar(value=[f"option number {n}" for n in range(100)]), "option number 42"),
        "arithmetic, GBNF": (
            FreeGrammar(value='root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'),
            "1+(22+3)+4",
        ),
    }
    found = {}
    for name, (form, document) in asked.items():
        wish = wish_of(form)
        found[name] = grammar_from(wish.format, wish.text), document
    for name, row, required, before in (
        ("call, JSON", TGI, True, ""),
        ("call, Hermes, after text", HERMES, False, "I shall look that up for you.\n"),
    ):
        grammar = ReplyGrammar(Format(row), thinking=False, ends=[2], free=[]).of(tools(required))
        found[name] = grammar, before + row.spelled(CALLED)
    return found


def walk(tokenizer: LLTokenizer, grammar: str, document: str) -> tuple[list[float], int, int]:
    """Along a document: (seconds of each mask, tokens, of these forced). Masks are filled where a model would run."""
    matcher, times, forced = start(tokenizer, grammar), list[float](), 0
    bits = allocate_token_bitmask(1, tokenizer.vocab_size)
    text, tokens = document.encode(), 0
    while text:
        if run := matcher.compute_ff_tokens():
            forced += len(run)
        else:
            begin = time.perf_counter()
            fill_next_token_bitmask(matcher, bits)
            times.append(time.perf_counter() - begin)
            run = tokenizer.tokenize_bytes(text)[:1]
        assert matcher.try_consume_tokens(run) == len(run), (text, matcher.get_error())
        tokens += len(run)
        text = text[len(tokenizer.decode_bytes(run)) :]
    return times, tokens, forced


def costs(tokenizer: LLTokenizer, rounds: int) -> None:
    print("| grammar | compile, ms | mask, mean µs | p99 | largest | tokens | forced |\n|---|---|---|---|---|---|---|")
    every: list[float] = []
    for name, (grammar, document) in grammars().items():
        compiled, times = list[float](), list[float]()
        for _ in range(rounds):
            begin = time.perf_counter()
            start(tokenizer, grammar)
            compiled.append(time.perf_counter() - begin)
            masks, tokens, forced = walk(tokenizer, grammar, document)
            times += masks
        every += times
        print(
            f"| {name} | {1e3 * statistics.median(compiled):.2f} | {1e6 * statistics.mean(times):.0f} | "
            f"{1e6 * numpy.percentile(times, 99):.0f} | {1e6 * max(times):.0f} | {tokens} | {forced / tokens:.0%} |",
            flush=True,
        )
    print(f"\nAll masks: mean {1e6 * statistics.mean(every):.0f} µs, p99 {1e6 * numpy.percentile(every, 99):.0f} µs")


def loop(files: ModelFiles, vocabulary: Callable[[], Vocabulary], batches: Sequence[int]) -> None:
    """The engine's step loop without sockets: each request fills in the nested schema, at temperature 1."""
    most = 200
    limits = Limits(
        max_input_tokens=64,
        max_total_tokens=64 + most,
        max_batch_prefill_tokens=4096,
        max_batch_total_tokens=max(batches) * -(-(64 + most) // BLOCK_SIZE) * BLOCK_SIZE,
        max_batch_size=max(batches),
    )
    with tempfile.TemporaryDirectory() as folder:
        pools = [KVPool(limits.max_batch_total_tokens // BLOCK_SIZE)]
        settings = Settings(model=files, limits=limits, pools=pools, run_dir=folder)
        runner = Runner.load(settings, lambda done, total: None)
    print("\n| requests | forcing | tokens/s | tokens a row and step | step, ms | forward | masks | waiting |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in batches:
        for name in ("nine fields, nested", "call, JSON", "forty optional fields", "words"):
            for forcing in (False, True):
                print(fill(runner, vocabulary, limits, batch, most, name, forcing), flush=True)


def fill(
    runner: Runner,
    vocabulary: Callable[[], Vocabulary],
    limits: Limits,
    batch: int,
    most: int,
    name: str,
    forcing: bool,
) -> str:
    """Tokens per second of all steps, times of those in which all requests take part. ``forcing``: tokens about which
    there is no choice cost no step each."""
    grammar = composed(Wish("llguidance", grammars()[name][0]), forcing=forcing)
    watch = Grammars(vocabulary, runner.vocab_size, lambda: None)
    scheduler = Scheduler(
        pools=[KVPool(limits.max_batch_total_tokens // BLOCK_SIZE)],
        step_tokens=limits.max_batch_prefill_tokens,
        max_running=batch,
    )
    prompt = list(range(1000, 1032))
    for number in range(batch):
        sampling = Sampling(greedy=False, seed=number, temperature=1.0, grammar=grammar, end_token_ids=[2])
        request = Request(0, Submit(number, [*prompt, number + 100], len(prompt) + 1, most, [2], sampling, 0.0))
        watch.prepare(request)
    waiting = batch
    while waiting:
        for request, error in watch.ready():
            assert error is None, error
            scheduler.add(request)
            waiting -= 1
        time.sleep(0.001)
    parts, rows, tokens, begin = list[tuple[float, ...]](), 0, 0, time.perf_counter()
    while not scheduler.idle:
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        works = [chunk.work() for chunk in plan.chunks]
        times.append(time.perf_counter())
        launched = runner.launch(works)
        times.append(time.perf_counter())
        masks = watch.masks([chunk.request for chunk in plan.chunks], works)
        times.append(time.perf_counter())
        results = runner.sample(launched, masks)
        times.append(time.perf_counter())
        for _, delta in scheduler.commit(plan, results):
            assert isinstance(delta, Delta), delta
            tokens += len(delta.tokens)
        times.append(time.perf_counter())
        rows += len(works)
        if len(works) == batch and not any(chunk.prefills for chunk in plan.chunks):
            parts.append((*(after - before for before, after in pairwise(times)), times[-1] - times[0]))
    rate = tokens / (time.perf_counter() - begin)
    _, forward, masked, _, _, step = (1e3 * statistics.mean(column) for column in zip(*parts, strict=True))
    return (
        f"| {batch}, {name} | {'yes' if forcing else 'no'} | {rate:.0f} | {tokens / rows:.2f} | {step:.1f} | "
        f"{forward:.1f} | {masked:.2f} | {masked / step:.1%} |"
    )


async def beside(url: str, seconds: float) -> None:
    """Time between a running stream's tokens: alone, and while hostile grammars arrive, one after the other."""
    hostile: list[dict[str, Any]] = [
        {"type": "regex", "value": "(a+)+b"},
        {"type": "regex", "value": r"(\w{1,500}){1,500}"},
        {"type": "regex", "value": "(?=a)b"},
        {"type": "regex", "value": "[a-z]{0,9999}" * 20},
        {"type": "json", "value": {"properties": {f"p{n}": {"type": "string"} for n in range(5000)}}},
        {"type": "json", "value": {"properties": {f"p{n}": {"pattern": f"^(a|b)*{n}$"} for n in range(500)}}},
        {"type": "json", "value": {"properties": {"a": {"description": "x" * 1_000_000}}}},
        {"type": "json", "value": {"$ref": "#"}},
        {"type": "json", "value": {"anyOf": [{"properties": {"a": {"$ref": "#"}}}] * 200}},
        {"type": "json", "value": {"enum": [f"value {n}" for n in range(20_000)]}},
        {"type": "json", "value": {"properties": {"a": {"type": "array", "minItems": 10_000}}}},
        {"type": "json", "value": {"properties": {"a": {"not": {}}}}},
    ]
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 800}, "stream": True}
    refused: dict[int, int] = {}
    done = asyncio.Event()

    async def attack(client: httpx.AsyncClient, number: int) -> None:
        while not done.is_set():
            for grammar in hostile[number::2]:
                parameters = {"grammar": grammar, "max_new_tokens": 20}
                answer = await client.post(f"{url}/generate", json={"inputs": "x", "parameters": parameters})
                refused[answer.status_code] = refused.get(answer.status_code, 0) + 1

    async def stream(client: httpx.AsyncClient) -> list[float]:
        stamps = []
        begin = time.perf_counter()
        async with client.stream("POST", f"{url}/generate_stream", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    stamps.append(time.perf_counter())
                    if stamps[-1] - begin > seconds:
                        break
        return [after - before for before, after in pairwise(stamps[5:])]

    print("| a stream | tokens | median, ms | p99 | largest |\n|---|---|---|---|---|")
    async with httpx.AsyncClient(timeout=300) as client:
        for name in ("alone", "beside hostile grammars", "alone"):
            done.clear()
            attacks = [asyncio.create_task(attack(client, n)) for n in range(2 * (name != "alone"))]
            gaps = [1e3 * gap for gap in await stream(client)]
            done.set()
            await asyncio.gather(*attacks)
            median, late = numpy.percentile(gaps, [50, 99])
            print(f"| {name} | {len(gaps)} | {median:.1f} | {late:.1f} | {max(gaps):.1f} |", flush=True)
    print(f"\nThe hostile requests' answers by status: {refused}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-id", default=flags.DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="*", default=[])
    parser.add_argument("--url")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    if arguments.url is not None:
        asyncio.run(beside(arguments.url, arguments.seconds))
        return
    files = resolve_model(arguments.model_id, None, store(flags.cache_options()))
    load = partial(Vocabulary.load, Path(files.folder))
    known = load()
    costs(load_tokenizer(known, known.size, [2]), arguments.rounds)
    if arguments.batch:
        loop(files, load, arguments.batch)


if __name__ == "__main__":
    main()
