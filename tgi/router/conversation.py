"""What every chat dialect shares: a conversation becomes generations, and their pieces what the assistant says.

A dialect translates its request into a ChatRequest, which is the router's own term for a conversation, and what is said
into its own events or its own answer. Knows no event and no answer of any dialect.
"""

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tgi.core.messages import Thinking
from tgi.router.formats import Format
from tgi.router.pipeline import Piece, Run, Service, follow_all
from tgi.router.prompt import Prompt, is_greedy, prompt_of, to_parameters
from tgi.router.reply import CallDelta, ReplyParser
from tgi.router.tools import ReplyGrammar, Tools, tools_of
from tgi.router.validate import Generation, invalid, refuse
from tgi.router.wire.native import FinishReason as NativeFinishReason
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import ChatRequest, FinishReason

FINISH: dict[NativeFinishReason, FinishReason] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


class Said(NamedTuple):
    """What one token adds to one answer."""

    choice: int
    piece: Piece
    reasoning: str
    text: str
    calls: list[CallDelta]
    finish: FinishReason | None
    hidden: bool = False
    """The token is of reasoning that isn't told."""


@dataclass(slots=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """One whole answer."""

    run: Run
    reasoning: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    """But for hidden ones."""
    finish: FinishReason = "stop"


class Conversation:
    """The answers on their way: ``follow`` them as they come, or take the ``replies`` at the end.

    A whole answer is the sum of what is said, so that streams and whole answers agree.
    """

    def __init__(self, runs: list[Run], parsers: list[ReplyParser], *, silent: bool = False) -> None:
        """``silent``: reasoning isn't told."""
        self.runs = runs
        self.reasoning_tokens = 0
        """So far, of all answers."""
        self._parsers = parsers
        self._silent = silent

    async def follow(self, hear: Callable[[Said], None]) -> None:
        """Call ``hear`` with all that is said, as Run.follow does with pieces."""
        await follow_all(self.runs, lambda choice, piece: hear(self._said(choice, piece)))

    def _said(self, choice: int, piece: Piece) -> Said:
        parser = self._parsers[choice]
        thinking = parser.thinking
        parsed = parser.push(piece.text)
        finish = FINISH[piece.finish] if piece.finish else None
        if finish is not None:
            rest = parser.finish()
            parsed.reasoning += rest.reasoning
            parsed.text += rest.text
            if finish == "stop" and parser.complete:
                finish = "tool_calls"
        thinking = thinking or parser.thinking
        self.reasoning_tokens += thinking
        reasoning = "" if self._silent else parsed.reasoning
        return Said(choice, piece, reasoning, parsed.text, parsed.calls, finish, thinking and self._silent)

    async def replies(self) -> list[Reply]:
        replies = [Reply(run) for run in self.runs]

        def hear(said: Said) -> None:
            reply = replies[said.choice]
            if not said.hidden:
                reply.pieces.append(said.piece)
            reply.reasoning += said.reasoning
            reply.text += said.text
            for delta in said.calls:
                if delta.id is not None:
                    reply.calls.append(Call(delta.id, delta.name or ""))
                reply.calls[delta.index].arguments += delta.arguments
            if said.finish is not None:
                reply.finish = said.finish

        await self.follow(hear)
        return replies


@asynccontextmanager
async def converse(service: Service, request: ChatRequest, arrived: float) -> AsyncIterator[Conversation]:
    """Judge the request, put it before the model and hand it to the engine; leaving cancels what is unfinished."""
    choices = 1 if request.n is None else request.n
    service.metrics.arrived()
    tools = tools_of(request)
    refuse(request)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("`max_tokens` and `max_completion_tokens` must not both be set")
    service.validator.check_choices(request.n)
    service.metrics.arrived(choices - 1)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    parameters = to_parameters(request, max_tokens, request.top_logprobs, add_special_tokens=False)
    async with AsyncExitStack() as stack:
        stack.enter_context(service.permits.take(choices))
        prompt = await prompt_of(service, request, tools)
        format = _read(request, prompt, tools)
        generation = await _generation(service, request, prompt, tools, parameters)
        runs = [Run(service, generation.choice(index), arrived) for index in range(choices)]
        for run in runs:
            await stack.enter_async_context(run)
        schemas = {} if tools is None else tools.schemas
        parsers = [ReplyParser(format, schemas, thinking=prompt.thinking and bool(format.reasoning)) for _ in runs]
        yield Conversation(runs, parsers, silent=request.include_reasoning is False)


def _read(request: ChatRequest, prompt: Prompt, tools: Tools | None) -> Format:
    """What of the reply is told apart."""
    if request.separate_reasoning is not False:
        return prompt.format
    if request.include_reasoning is False:
        raise invalid("`include_reasoning` and `separate_reasoning` must not both be false")
    if tools is not None and prompt.format.reasoning is not None:
        raise invalid("`separate_reasoning: false` is not supported with `tools`: calls are found behind reasoning")
    return dataclasses.replace(prompt.format, reasoning=None)


async def _generation(
    service: Service, request: ChatRequest, prompt: Prompt, tools: Tools | None, parameters: GenerateParameters
) -> Generation:
    validator, tokenizer, format = service.validator, service.tokenizer, prompt.format
    grammar = ReplyGrammar(format, prompt.thinking, tokenizer.eos_ids, tokenizer.special_ids - tokenizer.eos_ids)
    own = ""
    # Without grammars a model that was taught to call tools may still do so, as often as it likes.
    free = format.calls.taught and not (tools is None or tools.required or tools.parallel is False)
    if tools is not None and (validator.has_grammars or not free):
        own = await tools.enforced(grammar, validator.compile)
    return await validator.validate(
        prompt.text,
        parameters,
        greedy=is_greedy(request),
        grammar=own,
        frame=grammar.framing() if parameters.grammar is not None and format.reasoning is not None else "",
        shown=frozenset(format.special.values()),
        thinking=_budget(request, prompt),
    )


def _budget(request: ChatRequest, prompt: Prompt) -> Thinking | None:
    """How long the reply may reason; at once brought to an end, it has not."""
    budget = 0 if prompt.thoughtless else request.thinking_budget
    if budget is None:
        return None
    if (reasoning := prompt.format.reasoning) is None:
        raise invalid("`thinking_budget` is not supported: the model doesn't reason")
    return Thinking(budget, "" if prompt.thinking else reasoning.opens, reasoning.closes)
