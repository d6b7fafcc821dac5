"""Tools: how a request's tools are told to the model, and what its reply must spell.

Knows tools, formats and grammars; knows no token, template or dialect.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tgi.core.errors import TOOL, VALIDATION, RequestError
from tgi.router.arguments import UnenforceableError
from tgi.router.formats import PLACE, TGI, Calls, Format, words
from tgi.router.grammar import UNSUPPORTED, Wish, grammar_of
from tgi.router.lark import Lark
from tgi.router.reply import MOST_CALLS
from tgi.router.tokenizer import SHORT
from tgi.router.wire.openai import ChatRequest, Function, ToolSelection

TOOL_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper arguments that "
    "best answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument "
    "name and its value}.Do not use variables.\n"
)
"""TGI's words, for a model whose template has none of its own."""

_IN_FORMAT = "\nTo call functions, write:\n{}\n"
"""For one whose replies are read in a format of their own even so."""

_OR_TEXT = "If no function helps, respond in plain text.\n"


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request, and which calls its reply may make."""

    functions: Sequence[Function]
    definitions: list[dict[str, Any]]
    """As templates read them."""
    text: str
    """The definitions, for a template that doesn't."""
    required: bool
    """The reply is calls, never text."""
    allowed: Collection[str] | None
    """The functions that may be called, if not all."""
    named: bool
    """One function is to be called, once."""
    parallel: bool | None
    """Whether the reply may have more calls than one; None: as the model was taught."""

    @property
    def usable(self) -> list[Function]:
        """Those that may be called."""
        return [function for function in self.functions if self.allowed is None or function.name in self.allowed]

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The parameters of those that may be called, by their names."""
        return {function.name: function.schema or {} for function in self.usable}

    def instructions(self, tool_prompt: str | None, calls: Calls, *, shown: bool) -> str:
        """What the last message must say of the tools, which the template shows or not."""
        if shown:
            return f"\n---\n{tool_prompt}" if tool_prompt else ""
        own = TOOL_PROMPT if calls is TGI else _IN_FORMAT.format(calls.spelled([("function", {"argument": "value"})]))
        prompt = tool_prompt or (own if self.required else own + _OR_TEXT)
        return f"\n---\n{self.text}\n{prompt}"

    async def enforced(self, grammar: "ReplyGrammar", compile: Callable[[Wish], Awaitable[str]]) -> str:
        """The grammar of the reply, when it has been tried. Raises RequestError naming the tool whose parameters can't
        be enforced.

        ``compile`` raises RequestError for what the engine can't take.
        """
        short = len(self.text) <= SHORT
        text = grammar.of(self) if short else await asyncio.to_thread(grammar.of, self)
        try:
            return await compile(Wish("llguidance", text))
        except RequestError as error:
            if error.detail == UNSUPPORTED:
                raise
        for function in self.usable:
            try:
                schema = _schema(function) | {"x-guidance": {"lenient": function.strict is False}}
                await compile(Wish("json_schema", msgspec.json.encode(schema).decode()))
                await compile(Wish("llguidance", grammar.of(replace(self, allowed=[function.name]))))
            except RequestError as error:
                raise _about(function, error.detail) from None
        raise RequestError(VALIDATION, "`tools` are too complex together")


@dataclass(frozen=True, slots=True)
class ReplyGrammar:
    """What replies of a model must spell. Reasoning comes first and is free."""

    format: Format
    thinking: bool
    """The prompt has opened the reasoning already."""
    ends: Collection[int]
    """Tokens that end a reply."""
    free: Collection[int]
    """Special tokens that may stand in any text."""

    def of(self, tools: Tools) -> str:
        """In llguidance's Lark: calls, or, unless they are required, text or calls."""
        lark = self._lark()
        return self._behind_reasoning(lark, _reply(lark, self.format.calls, tools), "")

    def framing(self) -> str:
        """Reasoning, and then what the rule ``@answer`` says."""
        reasoning = self.format.reasoning
        return self._behind_reasoning(self._lark(), "@answer", reasoning.answers if reasoning else "")

    def _lark(self) -> Lark:
        """Marks that tell where reasoning ends and a call begins are no text."""
        calls, reasoning = self.format.calls, self.format.reasoning
        telling = {words(calls.opens + calls.head)[0]} if calls.trigger == "word" else set()
        if reasoning is not None:
            telling |= {reasoning.opens, reasoning.closes}
        special = self.format.special
        return Lark(special, self.ends, set(self.free) - {special[mark] for mark in telling & special.keys()})

    def _behind_reasoning(self, lark: Lark, body: str, answers: str) -> str:
        """``answers``: how the body is opened."""
        if (reasoning := self.format.reasoning) is not None:
            thought = f"{lark.upto([reasoning.closes])} {_SPACE} {lark.spelled(reasoning.joint)}"
            if not self.thinking:
                thought = f"({lark.upto(words(reasoning.opens), anchored=True)} {thought})?"
            body = f"{thought} {lark.spelled(answers)} {body}"
        lark.rule(body, "start")
        return str(lark)


_SPACE = r"/[ \n]{0,4}/"
"""Behind reasoning. Unbounded, weak models write nothing else."""


def _reply(lark: Lark, calls: Calls, tools: Tools) -> str:
    """Calls, or, unless they are required, text or calls."""
    arguments = {function.name: _arguments(lark, calls, function) for function in tools.usable}

    def rest(name: str, middle: str) -> str:
        return f"{_numbered(lark, middle)} {arguments[name]} {lark.spelled(calls.tail)}"

    def call(before: str, way: Calls = calls) -> str:
        begin = _numbered(lark, before)
        return lark.either(f"{begin} {lark.spelled(way.called(name))} {rest(name, way.middle)}" for name in arguments)

    parallel = not tools.named and (calls.taught if tools.parallel is None else tools.parallel)
    more = f"{call(calls.between + calls.head)}{{0,{MOST_CALLS - 1}}}" if parallel else ""
    behind = lark.either([f"{more} {lark.spelled(calls.closes)}"])

    def begun(way: Calls) -> str:
        """Calls behind what the model writes before the first by itself."""
        opening = way.opens + way.head
        if way.trigger == "word":
            word = words(opening)[0]
            return f"{lark.upto([word], anchored=way.anchored)} {call(opening[len(word) :])} {behind}"
        before = lark.upto(words(opening), anchored=way.anchored)
        if way.trigger == "head":
            return f"{before} {call(opening[len(opening.rstrip()) :], way)} {behind}"
        ends, middle = ([], way.middle) if way.quoted else (words(way.middle), "")
        named = lark.either(
            f"{lark.closed([way.called(name), *ends], anchored=True)} {rest(name, middle)}" for name in arguments
        )
        again = lark.name()
        others = lark.text() if way.anchored else f"{again} | {lark.text()}"
        return lark.rule(f"{before} ({named} {behind} | {others})", again)

    if tools.required:
        return f"{call(calls.opens + calls.head)} {behind}"
    return lark.either([*map(begun, (calls, *calls.also)), lark.text()])


def _numbered(lark: Lark, spelling: str) -> str:
    return f" {_PLACES} ".join(lark.spelled(part) if part else "" for part in spelling.split(PLACE)) or '""'


_PLACES = r"/0|[1-9][0-9]{0,2}/"


def _arguments(lark: Lark, calls: Calls, function: Function) -> str:
    if not (calls.quoted or _PLAIN.fullmatch(function.name)):
        raise RequestError(VALIDATION, f"the name of tool `{function.name}` can't be told as this model writes calls")
    try:
        return lark.either([calls.style.rule(lark, _schema(function), function.strict is False)])
    except UnenforceableError as error:
        raise _about(function, str(error)) from None


_PLAIN = re.compile(r"[\w.:/+-]+")
"""A name that needs no quotation marks."""


def _about(function: Function, detail: str) -> RequestError:
    return RequestError(VALIDATION, f"the parameters of tool `{function.name}`: {detail}")


def tools_of(request: ChatRequest) -> Tools | None:
    """None: the model is shown no tools and replies in text.

    Raises RequestError(TOOL) for tools beside a grammar, and for the choice of a tool that isn't there.
    """
    if request.tools is not None and grammar_of(request) is not None:
        raise RequestError(TOOL, "Grammar and tools are mutually exclusive")
    choice = request.tool_choice or "auto"
    if not request.tools or choice == "none":
        return None
    functions = [tool.function for tool in request.tools]
    required, allowed, named = True, None, False
    match choice:
        case "auto" | "required":
            required = choice == "required"
        case ToolSelection():
            some, allowed = choice.allowed, choice.names
            required, named = some is None or some.mode == "required", some is None
        case _:
            named, allowed = True, [choice]
    for name in allowed or []:
        if all(function.name != name for function in functions):
            raise RequestError(TOOL, f"Tool with name {name} not found")
    definitions = [_definition(function) for function in functions]
    try:
        text = msgspec.json.encode(definitions).decode()
    except RecursionError:
        raise RequestError(VALIDATION, "`tools` is nested too deeply") from None
    return Tools(functions, definitions, text, required, allowed, named, request.parallel_tool_calls)


def _definition(function: Function) -> dict[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    # Templates read the properties without asking whether there are any.
    return {
        "type": "function",
        "function": told | {"parameters": function.schema or {"type": "object", "properties": {}}},
    }


_CLOSED_WITH = frozenset(
    "$defs $id $schema default definitions description examples properties required title type".split()
)
"""Keywords that leave it to us whether an object has more properties than those named."""


def _schema(function: Function) -> dict[str, Any]:
    """The parameters' JSON schema as the grammar takes it: of an object.

    The object has no other properties than those named, unless the schema says more of them: TGI's way, and a weak
    model would go on adding. ``strict: false`` leaves to the model what can't be enforced.
    """
    schema = {"type": "object"} | (function.schema or {})
    if isinstance(schema["type"], list) and "object" in schema["type"]:
        schema["type"] = "object"
    if schema["type"] != "object":
        raise _about(function, 'the type of all together must be "object"')
    properties, required = schema.get("properties", {}), schema.get("required", [])
    named = isinstance(properties, dict) and isinstance(required, list) and set(map(str, required)) <= properties.keys()
    if named and schema.keys() <= _CLOSED_WITH:
        schema["additionalProperties"] = False
    return schema
