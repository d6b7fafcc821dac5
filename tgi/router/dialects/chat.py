"""OpenAI's chat completions, and TGI's /chat_tokenize."""

from collections.abc import Callable, Sequence

from msgspec import UNSET

from tgi.router import headers
from tgi.router.call import Call, event
from tgi.router.conversation import Conversation, Reply, Said, converse
from tgi.router.dialects.openai import (
    DONE,
    fail_with,
    identity,
    is_openais,
    usage_of,
    wants_continuous_usage,
    wants_usage,
)
from tgi.router.pipeline import Piece, Service
from tgi.router.prompt import prompt_of
from tgi.router.reply import CallDelta
from tgi.router.tools import tools_of
from tgi.router.wire.native import ChatTokenizeResponse, SimpleToken, Token
from tgi.router.wire.openai import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    FunctionCallDelta,
    FunctionCalled,
    Logprob,
    ToolCallDelta,
    ToolCalled,
    TopLogprob,
    Usage,
)


async def chat_tokenize(call: Call, service: Service, request: ChatRequest) -> None:
    text = (await prompt_of(service, request, tools_of(request))).text
    spans = await service.validator.spans(text, add_special_tokens=False)
    await call.json(ChatTokenizeResponse([SimpleToken(*span) for span in spans], text))


async def chat(call: Call, service: Service, request: ChatRequest) -> None:
    compute_type = service.settings.compute_type
    async with converse(service, request, call.arrived) as conversation:
        runs = conversation.runs
        if request.stream:
            fields = headers.of_stream(compute_type, [runs[0].generation.text])
            # text-generation reads no delta without a role; OpenAI's Python library strings all roles together.
            every_role = not is_openais(call)
            async with call.stream(fields, fail_with(service)) as say:
                await _stream(service, request, conversation, every_role, say)
        else:
            replies = await conversation.replies()
            response = ChatCompletion(
                **identity(service, "chatcmpl"),
                choices=[_choice(service, request, index, reply) for index, reply in enumerate(replies)],
                usage=_usage(conversation),
            )
            await call.json(response, headers.of_answer(compute_type, runs, len(runs)))


async def _stream(
    service: Service,
    request: ChatRequest,
    conversation: Conversation,
    every_role: bool,
    say: Callable[[bytes], None],
) -> None:
    """``every_role``: each delta says whose it is, as TGI's do; otherwise the first of each choice, as OpenAI's."""
    common, runs = identity(service, "chatcmpl"), conversation.runs
    continuous = wants_continuous_usage(request)
    silent = set(range(len(runs)))

    def hear(said: Said) -> None:
        role = "assistant" if every_role or said.choice in silent else UNSET
        silent.discard(said.choice)
        choice = ChatChunkChoice(
            said.choice,
            ChatDelta(
                role,
                _content(said),
                [_call_delta(delta) for delta in said.calls] or None,
                reasoning_content=said.reasoning or UNSET,
            ),
            logprobs_of(service, [] if said.hidden else [said.piece]) if request.logprobs else None,
            said.finish,
        )
        usage = _usage(conversation) if continuous else None
        say(event(ChatCompletionChunk(**common, choices=[choice], usage=usage)))

    await conversation.follow(hear)
    if wants_usage(request):
        say(event(ChatCompletionChunk(**common, choices=[], usage=_usage(conversation))))
    say(DONE)


def _usage(conversation: Conversation) -> Usage:
    return usage_of(conversation.runs, len(conversation.runs), conversation.reasoning_tokens)


def _content(said: Said | Reply) -> str | None:
    """Null is for calls and reasoning without a word."""
    return None if (said.calls or said.reasoning) and not said.text else said.text


def _call_delta(delta: CallDelta) -> ToolCallDelta:
    function = FunctionCallDelta(delta.name, delta.arguments)
    if delta.id is None:
        return ToolCallDelta(index=delta.index, function=function)
    return ToolCallDelta(index=delta.index, id=delta.id, type="function", function=function)


def _choice(service: Service, request: ChatRequest, index: int, reply: Reply) -> ChatChoice:
    calls = [ToolCalled(id=call.id, function=FunctionCalled(call.name, call.arguments)) for call in reply.calls]
    message = AssistantMessage(
        content=_content(reply), reasoning_content=reply.reasoning or UNSET, tool_calls=calls or UNSET
    )
    return ChatChoice(index, message, logprobs_of(service, reply.pieces) if request.logprobs else None, reply.finish)


def logprobs_of(service: Service, pieces: Sequence[Piece]) -> ChatLogprobs:
    def entry(token: Token) -> tuple[str, float, list[int]]:
        data = service.tokenizer.token_bytes(token.id)
        return data.decode(errors="replace"), token.logprob, list(data)

    return ChatLogprobs(
        [
            Logprob(*entry(piece.token), top_logprobs=[TopLogprob(*entry(token)) for token in piece.top])
            for piece in pieces
        ]
    )
