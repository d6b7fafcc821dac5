"""What every chat dialect shares: a conversation becomes generations, and their pieces what the assistant says.

A dialect translates its request into a ChatRequest, which is the router's own term for a conversation, and what is said
into its own events or its own answer. Knows no event and no answer of any dialect.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tgi.router.grammar import grammar_of
from tgi.router.pipeline import Piece, Run, Service, interleave
from tgi.router.tools import CallDelta as CallDelta
from tgi.router.tools import ReplyParser, Tools, spelled, tools_of
from tgi.router.validate import invalid, refuse
from tgi.router.wire.native import FinishReason as NativeFinishReason
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import ChatRequest, FinishReason, ImagePart, Message, OpenAIRequest

FINISH: dict[NativeFinishReason, FinishReason] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@dataclass(frozen=True, slots=True)
class Said:
    """What one token adds to one answer."""

    choice: int
    piece: Piece
    text: str
    calls: list[CallDelta]
    finish: FinishReason | None


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
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    finish: FinishReason = "stop"


class Conversation:
    """The answers on their way; ``async for said in conversation`` as they come, or ``replies`` at the end.

    A whole answer is the sum of what is said, so that streams and whole answers agree.
    """

    def __init__(self, runs: list[Run], tools: Tools | None) -> None:
        self.runs = runs
        self._parsers = [tools.parser() if tools else ReplyParser([]) for _ in runs]

    async def __aiter__(self) -> AsyncIterator[Said]:
        async for choice, piece in interleave(self.runs):
            parser = self._parsers[choice]
            text, calls = parser.push(piece.text)
            finish = FINISH[piece.finish] if piece.finish else None
            if finish is not None:
                rest, more = parser.finish()
                text, calls = text + rest, calls + more
                if finish == "stop" and parser.complete:
                    finish = "tool_calls"
            yield Said(choice, piece, text, calls, finish)

    async def replies(self) -> list[Reply]:
        replies = [Reply(run) for run in self.runs]
        async for said in self:
            reply = replies[said.choice]
            reply.pieces.append(said.piece)
            reply.text += said.text
            for delta in said.calls:
                if delta.id is not None:
                    reply.calls.append(Call(delta.id, delta.name or ""))
                reply.calls[delta.index].arguments += delta.arguments
            if said.finish is not None:
                reply.finish = said.finish
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
        prompt = await _prompt_of(service, request, tools)
        grammar = ""
        if tools is not None:
            # A token that ends the generation ends it in the grammar, too.
            special_ids = service.tokenizer.special_ids - service.tokenizer.eos_ids
            grammar = await tools.enforced(special_ids, service.validator.compile)
        generation = await service.validator.validate(prompt, parameters, greedy=is_greedy(request), grammar=grammar)
        runs = [Run(service, generation.choice(index), arrived) for index in range(choices)]
        for run in runs:
            await stack.enter_async_context(run)
        yield Conversation(runs, tools)


async def prompt_of(service: Service, request: ChatRequest) -> str:
    """The conversation and its tools as the model's template writes them. A last message by the assistant is gone on
    with."""
    return await _prompt_of(service, request, tools_of(request))


async def _prompt_of(service: Service, request: ChatRequest, tools: Tools | None) -> str:
    template = await service.templates.choose(tools=tools is not None, documents=bool(request.documents))
    last = request.messages[-1] if request.messages else None
    goes_on = request.continue_final_message
    if goes_on and request.add_generation_prompt:
        raise invalid("`continue_final_message` and `add_generation_prompt` must not both be true")
    if goes_on is None and not request.add_generation_prompt:
        goes_on = last is not None and last.role == "assistant" and last.content is not None and not last.tool_calls
    messages = [_as_template_reads(message, template.takes_calls) for message in request.messages]
    if tools is not None:
        told = tools.instructions(request.tool_prompt, shown=template.takes_tools)
        for message in reversed(messages):
            if message["role"] != "assistant" and message["content"] is not None:
                message["content"] = _with_text(message["content"], told)
                break
    options = request.chat_template_kwargs or {}
    if request.reasoning_effort is not None:
        if "reasoning_effort" not in template.options:
            raise invalid("`reasoning_effort` is not supported: the model's chat template doesn't read it")
        options = {"reasoning_effort": request.reasoning_effort} | options
    prompt = await service.templates.render(
        template,
        messages=messages,
        tools=tools.definitions if tools and template.takes_tools else None,
        add_generation_prompt=not goes_on if request.add_generation_prompt is None else request.add_generation_prompt,
        continue_final_message=goes_on or False,
        documents=request.documents or None,
        options=options,
    )
    # Where nobody asks for the continuation by its name it is TGI's, which ends without white space.
    return prompt.rstrip() if goes_on and request.continue_final_message is None else prompt


def is_greedy(request: OpenAIRequest) -> bool:
    return request.temperature == 0 or request.top_p == 0


def to_parameters(
    request: OpenAIRequest, max_tokens: int | None, top_logprobs: int | None = None, *, add_special_tokens: bool = True
) -> GenerateParameters:
    """In TGI's terms. OpenAI samples unless told not to; its ``top_p`` includes both ends: 0 is greedy, 1 is off; its
    seeds have a sign. ``add_special_tokens``: what the route does unless told otherwise."""
    if request.top_p is not None and not 0 <= request.top_p <= 1:
        raise invalid("`top_p` must be >= 0.0 and <= 1.0")
    logit_bias = request.logit_bias or None
    if isinstance(logit_bias, list):
        raise invalid("`logit_bias` as a list is not supported: send an object of token ids and biases")
    return GenerateParameters(
        do_sample=True,
        temperature=request.temperature or None,
        top_p=None if request.top_p in (0, 1) else request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=logit_bias,
        max_new_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos or False,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        stop_token_ids=request.stop_token_ids or [],
        include_stop_str_in_output=request.include_stop_str_in_output or False,
        skip_special_tokens=request.skip_special_tokens is not False,
        add_special_tokens=add_special_tokens if request.add_special_tokens is None else request.add_special_tokens,
        watermark=request.watermark or False,
        seed=request.seed if request.seed is None or request.seed >= 0 else request.seed % 2**64,
        top_n_tokens=top_logprobs,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        grammar=grammar_of(request),
    )


def _as_template_reads(message: Message, takes_calls: bool) -> dict[str, Any]:
    """``takes_calls``: the template writes out tool calls; for another they are text."""
    if not isinstance(message.content, str) and any(isinstance(part, ImagePart) for part in message.content or []):
        raise invalid("`image_url` content is not supported")
    try:
        plain: dict[str, Any] = msgspec.to_builtins(message)
        for call in plain["tool_calls"] or []:
            call["function"] = _as_called(call["function"])
        if plain["tool_calls"] and not takes_calls:
            calls = spelled(call["function"] for call in plain["tool_calls"])
            plain["content"] = _with_text(plain["content"], "\n" + calls) if plain["content"] else calls
    except RecursionError:
        raise invalid("the arguments of `tool_calls` are nested too deeply") from None
    return plain


def _with_text(content: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    return content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]


def _as_called(function: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends arguments as JSON in a string; templates write the object out themselves."""
    arguments = function["parameters"] if function["arguments"] is None else function["arguments"]
    if isinstance(arguments, str):
        with suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments or "{}")
    return {"name": function["name"], "arguments": {} if arguments is None else arguments}
