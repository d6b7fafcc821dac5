"""Tools: how a request's tools are told to the model, what its reply must spell, and the calls found in the reply.

One format so far, TGI's: a reply is text, or calls, each a line ``{"name": …, "parameters": {…}}``, and the model
chooses with its first character. Knows tools and text; knows no token, template or dialect.
"""

import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import msgspec

from tgi.core.errors import TOOL, VALIDATION, RequestError
from tgi.router.grammar import UNSUPPORTED, Wish, grammar_of
from tgi.router.wire.openai import ChatRequest, Function, NamedTool

MOST_CALLS = 16
"""Calls in one reply: a weak model left to itself would go on calling."""

TOOL_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper arguments that "
    "best answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument "
    "name and its value}.Do not use variables.\n"
)
"""TGI's words, for a model whose template has none of its own."""

_SPACE = " \t\r\n"

_OR_TEXT = "If no function helps, respond in plain text.\n"

_CLOSED_WITH = frozenset(
    "$defs $id $schema default definitions description examples properties required title type".split()
)
"""Keywords that leave it to us whether an object has more properties than those named."""


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
    named: str | None
    """The one function to be called, once."""
    parallel: bool
    """The reply may have more calls than one."""

    @property
    def usable(self) -> list[Function]:
        """Those that may be called."""
        return [function for function in self.functions if self.named in (None, function.name)]

    def instructions(self, tool_prompt: str | None, *, shown: bool) -> str:
        """What the last message must say of the tools, which the template shows or not."""
        if shown:
            return f"\n---\n{tool_prompt}" if tool_prompt else ""
        prompt = tool_prompt or (TOOL_PROMPT if self.required else TOOL_PROMPT + _OR_TEXT)
        return f"\n---\n{self.text}\n{prompt}"

    def parser(self) -> "ReplyParser":
        return ReplyParser([function.name for function in self.usable])

    async def enforced(self, special_ids: Collection[int], compile: Callable[[Wish], Awaitable[str]]) -> str:
        """The grammar, when it has been tried. Raises RequestError naming the tool whose parameters can't be enforced.

        ``compile`` raises RequestError for what the engine can't take.
        """
        try:
            return await compile(Wish("llguidance", self.grammar(special_ids)))
        except RequestError as error:
            if error.detail == UNSUPPORTED:
                raise
        for function in self.usable:
            try:
                await compile(Wish("json_schema", _schema(function)))
            except RequestError as error:
                raise RequestError(error.kind, f"the parameters of tool `{function.name}`: {error.detail}") from None
        raise RequestError(VALIDATION, "`tools` are too complex together")

    def grammar(self, special_ids: Collection[int]) -> str:
        """What the reply must spell, in llguidance's Lark.

        ``special_ids``: tokens that may stand in plain text and have no text themselves.
        """
        calls = "call" if not self.parallel else f'call ("\\n" call){{0,{MOST_CALLS - 1}}}'
        lines = [f"start: {calls}"]
        if not self.required:
            lines = [
                f"start: text | SPACE {calls}",
                r"SPACE: /[ \t\r\n]*/",
                r"HEAD: /[ \t\r\n]*([^{ \t\r\n](.|\n)*)?/",
                r"TEXT: /(.|\n)+/",
                f"text: HEAD (<[{_ranges(special_ids)}]> TEXT?)*" if special_ids else "text: HEAD",
            ]
        lines.append("call: " + " | ".join(f"call_{n}" for n in range(len(self.usable))))
        for n, function in enumerate(self.usable):
            head = f'{{"name": {_quoted(function.name)}, "parameters": '
            lines += [
                f'call_{n}: {json.dumps(head)} parameters_{n} "}}"',
                f"parameters_{n}: %json {_schema(function)}",
            ]
        return "\n".join(lines)


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
    named = choice.chosen if isinstance(choice, NamedTool) else None if choice in ("auto", "required") else choice
    if named is not None and all(function.name != named for function in functions):
        raise RequestError(TOOL, f"Tool with name {named} not found")
    definitions = [_definition(function) for function in functions]
    try:
        text = msgspec.json.encode(definitions).decode()
    except RecursionError:
        raise RequestError(VALIDATION, "`tools` is nested too deeply") from None
    parallel = named is None and request.parallel_tool_calls is True
    return Tools(functions, definitions, text, choice != "auto", named, parallel)


def spelled(calls: Iterable[Mapping[str, Any]]) -> str:
    """Calls, each of a name and arguments, as the model would have written them."""
    return "\n".join(
        f'{{"name": {_quoted(call["name"])}, "parameters": {json.dumps(call["arguments"], ensure_ascii=False)}}}'
        for call in calls
    )


def _definition(function: Function) -> dict[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    # Templates read the properties without asking whether there are any.
    return {
        "type": "function",
        "function": told | {"parameters": function.schema or {"type": "object", "properties": {}}},
    }


def _schema(function: Function) -> str:
    """The parameters' JSON schema as the grammar takes it: of an object, in one fixed layout.

    The object has no other properties than those named, unless the schema says more of them: TGI's way, and a weak
    model would go on adding. ``strict: false`` leaves to the model what can't be enforced.
    """
    schema = {"type": "object"} | (function.schema or {})
    if isinstance(schema["type"], list) and "object" in schema["type"]:
        schema["type"] = "object"
    if schema["type"] != "object":
        raise RequestError(VALIDATION, 'the type of all together must be "object"')
    properties, required = schema.get("properties", {}), schema.get("required", [])
    named = isinstance(properties, dict) and isinstance(required, list) and set(map(str, required)) <= properties.keys()
    if named and schema.keys() <= _CLOSED_WITH:
        schema["additionalProperties"] = False
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps(schema | {"x-guidance": layout | {"lenient": function.strict is False}})


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _ranges(ids: Iterable[int]) -> str:
    """1, 2, 3, 7 → "1-3,7"."""
    runs = (list(run) for _, run in groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0]))
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


# --- The reply -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a tool call grows by. The first delta of a call has its id and name."""

    index: int
    """Of the call among the calls of its answer."""
    arguments: str
    """JSON, or a part of it."""
    id: str | None = None
    name: str | None = None


class Parsed(NamedTuple):
    """What a reply grows by."""

    text: str
    calls: list[CallDelta]


class ReplyParser:
    """A reply, pushed piece by piece: what in it is text, and what are calls.

    However the reply is cut into pieces, the results add up to the same. Takes any text: what is no call of a known
    tool is text, and so is all that follows it. Arguments are the model's own characters, as they come.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """``names`` of the tools; without any, the reply is text."""
        quoted = tuple(_quoted(name) for name in names)
        self._head = (("{",), ('"name"',), (":",), quoted, (",",), ('"parameters"', '"arguments"'), (":",), ("{",))
        self._reading: Literal["text", "head", "arguments", "tail"] = "head" if quoted else "text"
        self._held = ""
        """Read, and not yet known to be text or a call."""
        self._calls = 0
        self._opening: tuple[str, str] | tuple[None, None] = None, None
        """Id and name for the next delta."""
        self._object = _ObjectEnd()

    @property
    def complete(self) -> bool:
        """Whether there are calls, and all of them whole."""
        return self._calls > 0 and self._reading != "arguments"

    def push(self, piece: str) -> Parsed:
        self._held += piece
        text, calls = "", list[CallDelta]()
        while self._held:
            match self._reading:
                case "text":
                    text += self._take(len(self._held))
                case "head":
                    words, end, possible = _match(self._held, self._head)
                    if not possible:
                        self._reading = "text"
                    elif len(words) < len(self._head):
                        break
                    else:
                        self._take(end - 1)  # the last brace opens the arguments
                        self._opening = _new_id(), json.loads(words[3])
                        self._calls += 1
                        self._object = _ObjectEnd()
                        self._reading = "arguments"
                case "arguments":
                    ended = self._object.find(self._held)
                    calls.append(CallDelta(self._calls - 1, self._take(ended or len(self._held)), *self._opening))
                    self._opening = None, None
                    if ended:
                        self._reading = "tail"
                case "tail":
                    words, end, possible = _match(self._held, (("}",),))
                    if words:
                        self._take(end)
                        self._reading = "head"
                    elif possible:
                        break
                    else:
                        self._reading = "text"
        return Parsed(text, calls)

    def finish(self) -> Parsed:
        """The reply is at its end. What was held back is text; behind calls it is space or the beginning of another,
        and nothing."""
        rest = self._take(len(self._held))
        return Parsed("" if self._calls else rest, [])

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """Where in the next piece the object ends, if it ends there."""
        for at, character in enumerate(piece, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at
        return None


def _match(text: str, forms: Sequence[tuple[str, ...]]) -> tuple[list[str], int, bool]:
    """The words at the beginning of a text, each one of its form, with JSON's space around them.

    Returns (words found, where the last ends, whether the text is or may become all of them).
    """
    words: list[str] = []
    end = 0
    for form in forms:
        at = len(text) - len(text[end:].lstrip(_SPACE))
        word = next((word for word in form if text.startswith(word, at)), None)
        if word is None:
            return words, end, any(word.startswith(text[at:]) for word in form)
        words.append(word)
        end = at + len(word)
    return words, end, True


def _new_id() -> str:
    return "call_" + secrets.token_hex(12)
