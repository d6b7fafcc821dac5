"""From the wire to a grammar that the engine can run, and what is refused. Knows JSON schemas, and the process that
tries grammars; loads neither llguidance nor a tokenizer.
"""

import asyncio
import contextlib
import itertools
import sys
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import PriorityQueue
from threading import Thread
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from tgi.core.errors import VALIDATION, RequestError
from tgi.router.schema import INVALID
from tgi.router.wire.base import Unreadable, check_keys
from tgi.router.wire.grammar import (
    ChoiceGrammar,
    FreeGrammar,
    Grammar,
    JsonGrammar,
    JsonObjectGrammar,
    JsonSchemaGrammar,
    RegexGrammar,
    TextFormat,
)
from tgi.router.wire.openai import OpenAIRequest, StructuredOutputs
from tgi.router.worker import LostError, Worker

LONGEST = 1 << 18
"""Characters of a grammar."""

REMEMBERED = 1 << 24
"""Bytes of the verdicts that are kept."""

EXHAUSTED = "it takes too much time or memory"
UNSUPPORTED = "grammar is not supported"


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """A grammar in one of the formats that llguidance knows."""

    format: Literal["json_schema", "regex", "choice", "grammar", "llguidance"]
    text: str
    frame: str = ""
    """Lark in which ``@answer`` stands for what is wished; without it, that is all."""


class Question(msgspec.Struct, frozen=True, array_like=True):
    """What the process that tries grammars is asked."""

    wish: Wish
    patient: bool
    """It may take long."""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """A grammar as the engine takes it, or what is wrong with it, in one line."""

    grammar: str = ""
    error: str = ""


def grammar_of(request: OpenAIRequest) -> Grammar | None:
    """What an OpenAI request says its answers must spell, in whichever of the fields. RequestError if several do."""
    format, structured = request.response_format, request.structured_outputs or StructuredOutputs()
    fields: dict[str, Grammar | None] = {
        "response_format": None if isinstance(format, TextFormat) else format,
        "grammar": request.grammar,
        **_grammars(
            "guided_", request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar
        ),
        **_grammars("structured_outputs.", structured.json, structured.regex, structured.choice, structured.grammar),
        "structured_outputs.json_object": JsonObjectGrammar() if structured.json_object else None,
    }
    given = {name: grammar for name, grammar in fields.items() if grammar is not None}
    if len(given) > 1:
        first, second, *_ = given
        raise _invalid(f"`{first}` and `{second}` must not both be set")
    grammar = next(iter(given.values()), None)
    layout = {
        "guided_whitespace_pattern": request.guided_whitespace_pattern,
        "structured_outputs.whitespace_pattern": structured.whitespace_pattern,
        "structured_outputs.disable_any_whitespace": structured.disable_any_whitespace or None,
    }
    for name, value in layout.items():
        if value is not None:
            grammar = _laid_out(grammar, name, value)
    return grammar


def _grammars(
    where: str, json: Any, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Grammar | None]:
    """Other servers' four fields; ``where`` is what their names begin with."""
    return {
        f"{where}json": None if json is None else JsonGrammar(value=json),
        f"{where}regex": None if regex is None else RegexGrammar(value=regex),
        f"{where}choice": None if choice is None else ChoiceGrammar(value=choice),
        f"{where}grammar": None if grammar is None else FreeGrammar(value=grammar),
    }


def _laid_out(grammar: Grammar | None, field: str, value: str | bool) -> JsonGrammar:
    """The same with white space as a field has it. Raises RequestError where there is no JSON to lay out."""
    if not isinstance(grammar, JsonGrammar | JsonObjectGrammar | JsonSchemaGrammar):
        raise _invalid(f"`{field}` is of no effect without a JSON schema")
    schema = _schema(grammar)
    before = schema.get("x-guidance", {})
    if not isinstance(before, dict) or before.keys() & {"whitespace_flexible", "whitespace_pattern"}:
        raise _invalid(f"`{field}` must be all that is said of white space")
    guidance = {"whitespace_flexible": False} if value is True else {"whitespace_pattern": value}
    return JsonGrammar(value=schema | {"x-guidance": before | guidance})


def wish_of(grammar: Grammar) -> Wish:
    """Raises RequestError for what can be seen to be wrong without llguidance."""
    match grammar:
        case JsonGrammar() | JsonObjectGrammar() | JsonSchemaGrammar():
            try:
                return Wish("json_schema", msgspec.json.encode(_schema(grammar)).decode())
            except RecursionError:
                raise _invalid(f"{INVALID}it is nested too deeply") from None
        case RegexGrammar(value=value):
            return Wish("regex", value)
        case ChoiceGrammar(value=value):
            if not value:
                raise _invalid(f"{INVALID}a choice needs something to choose from")
            return Wish("choice", msgspec.json.encode(value).decode())
        case FreeGrammar(value=value):
            return Wish("grammar", value)


def _schema(grammar: JsonGrammar | JsonObjectGrammar | JsonSchemaGrammar) -> dict[str, Any]:
    schema: Any
    lenient = False
    match grammar:
        case JsonGrammar(value=value):
            schema = _parsed(value)
        case JsonObjectGrammar(value=value):
            schema = {"type": "object"} if value is UNSET else _parsed(value)
        case JsonSchemaGrammar(value=value, json_schema=named):
            given = value or named
            assert given is not None
            schema, lenient = given.schema, given.strict is False
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _invalid(f"{INVALID}a schema is an object or `true`")
    if "properties" in schema and "type" not in schema:
        # TGI takes only schemas with properties, and means objects; the standard would let other values pass.
        schema = {"type": "object"} | schema
    if lenient and isinstance(guidance := schema.get("x-guidance", {}), dict):
        schema = schema | {"x-guidance": {"lenient": True} | guidance}
    return dict(schema)


def _parsed(value: Any) -> Any:
    """TGI takes schemas also in strings."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise _invalid(UNSUPPORTED)
    try:
        parsed = msgspec.json.decode(value)
        check_keys(value.encode())
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(INVALID + str(error)) from None
    except Unreadable as error:
        raise _invalid(INVALID + error.message.rpartition(": ")[2]) from None
    return parsed


class Grammars:
    """Judges the grammars for one model: at once those judged before, the others one by one, off the event loop, in a
    process that is started for the first. What takes long goes behind all that may not."""

    def __init__(self, folder: Path, config_path: str | None, end_ids: Collection[int]) -> None:
        """``folder`` and ``config_path`` of the vocabulary; ``end_ids``: the model's end tokens."""
        self._worker = Worker("tgi.router.trial", str(folder), config_path or "", *map(str, sorted(end_ids)))
        self._trials: PriorityQueue[_Trial] = PriorityQueue()
        self._thread: Thread | None = None
        self._numbers = itertools.count()
        self._awaited: dict[Wish, asyncio.Future[Verdict]] = {}
        """What is being tried, or will be."""
        self._verdicts: OrderedDict[Wish, Verdict] = OrderedDict()
        """Least recently used first."""
        self._remembered = 0

    async def compile(self, wish: Wish) -> str:
        """The grammar as the engine takes it. Raises RequestError for one that can't be enforced, in full."""
        if (length := len(wish.text) + len(wish.frame)) > LONGEST:
            raise _invalid(f"{INVALID}it has {length} characters, and {LONGEST} are allowed")
        verdict = self._verdicts.get(wish)
        if verdict is None:
            awaited = self._awaited.get(wish) or self._begin(wish)
            try:
                verdict = await asyncio.shield(awaited)  # others may wait for it, too
            except LostError:  # for the second time; that is no verdict to remember
                raise _invalid(INVALID + EXHAUSTED) from None
        else:
            self._verdicts.move_to_end(wish)
        if verdict.error:
            raise _invalid(verdict.error)
        return verdict.grammar

    def close(self) -> None:
        if self._thread is not None:
            self._trials.put(_Trial(_END, 0))
            self._thread.join()
        self._worker.end()

    def _begin(self, wish: Wish) -> "asyncio.Future[Verdict]":
        loop = asyncio.get_running_loop()
        awaited = self._awaited[wish] = loop.create_future()
        self._trials.put(_Trial(_QUICK, next(self._numbers), wish, loop))
        if self._thread is None:
            self._thread = Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        return awaited

    def _run(self) -> None:
        """The thread: try what waits."""
        while (trial := self._trials.get()).wish is not None and trial.loop is not None:
            outcome: Verdict | Exception | None
            try:
                outcome = self._try(trial.wish, patient=trial.turn == _SLOW)
            except Exception as error:  # whoever waits is to hear of it
                outcome = error
            if outcome is None:
                self._trials.put(replace(trial, turn=_SLOW))
                continue
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                trial.loop.call_soon_threadsafe(self._settle, trial.wish, outcome)

    def _try(self, wish: Wish, *, patient: bool) -> Verdict | None:
        answer = self._worker.ask(msgspec.msgpack.encode(Question(wish, patient)))
        return msgspec.msgpack.decode(answer, type=Verdict | None)

    def _settle(self, wish: Wish, outcome: Verdict | Exception) -> None:
        awaited = self._awaited.pop(wish)
        if isinstance(outcome, Exception):
            awaited.set_exception(outcome)
            return
        awaited.set_result(outcome)
        self._verdicts[wish] = outcome
        self._remembered += _size(wish, outcome)
        while self._remembered > REMEMBERED:
            self._remembered -= _size(*self._verdicts.popitem(last=False))


_END, _QUICK, _SLOW = range(3)


@dataclass(frozen=True, slots=True, order=True)
class _Trial:
    """A grammar that waits to be tried."""

    turn: int
    number: int
    wish: Wish | None = field(default=None, compare=False)
    loop: asyncio.AbstractEventLoop | None = field(default=None, compare=False)


def _size(wish: Wish, verdict: Verdict) -> int:
    """Bytes that a verdict takes to remember, roughly."""
    return 1000 + sum(map(sys.getsizeof, (wish.text, wish.frame, verdict.grammar, verdict.error)))


def _invalid(detail: str) -> RequestError:
    return RequestError(VALIDATION, detail)
