"""OpenAI's chat completions, and TGI's /chat_tokenize."""

from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET

from tgi.router import headers
from tgi.router.call import Call, event
from tgi.router.conversation import CallDelta, Conversation, Reply, converse, prompt_of
from tgi.router.dialects.openai import DONE, fail_with, identity, usage_of, wants_usage
from tgi.router.pipeline import Piece, Service
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
)


async def chat_tokenize(call: Call, service: Service, request: ChatRequest) -> None:
    text = await prompt_of(service, request)
    spans = await service.validator.spans(text, add_special_tokens=False)
    await call.json(ChatTokenizeResponse([SimpleToken(*span) for span in spans], text))


async def chat(call: Call, service: Service, request: ChatRequest) -> None:
    compute_type = service.settings.compute_type
    async with converse(service, request, call.arrived) as conversation:
        runs = conversation.runs
        if request.stream:
            fields = headers.of_stream(compute_type, [runs[0].generation.text])
            await call.stream(_events(service, request, conversation), fields, fail_with(service))
        else:
            replies = await conversation.replies()
            response = ChatCompletion(
                **identity(service, "chatcmpl"),
                choices=[_choice(service, request, index, reply) for index, reply in enumerate(replies)],
                usage=usage_of(runs),
            )
            await call.json(response, headers.of_answer(compute_type, runs))


async def _events(service: Service, request: ChatRequest, conversation: Conversation) -> AsyncGenerator[bytes, None]:
    common = identity(service, "chatcmpl")
    async for said in conversation:
        choice = ChatChunkChoice(
            said.choice,
            ChatDelta("assistant", said.text, [_call_delta(delta) for delta in said.calls] or None),
            _logprobs(service, [said.piece]) if request.logprobs else None,
            said.finish,
        )
        yield event(ChatCompletionChunk(**common, choices=[choice]))
    if wants_usage(request):
        yield event(ChatCompletionChunk(**common, choices=[], usage=usage_of(conversation.runs)))
    yield DONE


def _call_delta(delta: CallDelta) -> ToolCallDelta:
    function = FunctionCallDelta(delta.name, delta.arguments)
    if delta.id is None:
        return ToolCallDelta(index=delta.index, function=function)
    return ToolCallDelta(index=delta.index, id=delta.id, type="function", function=function)


def _choice(service: Service, request: ChatRequest, index: int, reply: Reply) -> ChatChoice:
    calls = [ToolCalled(id=call.id, function=FunctionCalled(call.name, call.arguments)) for call in reply.calls]
    message = AssistantMessage(content=reply.text, tool_calls=calls or UNSET)
    return ChatChoice(index, message, _logprobs(service, reply.pieces) if request.logprobs else None, reply.finish)


def _logprobs(service: Service, pieces: Sequence[Piece]) -> ChatLogprobs:
    def entry(token: Token) -> tuple[str, float, list[int]]:
        data = service.tokenizer.token_bytes(token.id)
        return data.decode(errors="replace"), token.logprob, list(data)

    return ChatLogprobs(
        [
            Logprob(*entry(piece.token), top_logprobs=[TopLogprob(*entry(token)) for token in piece.top])
            for piece in pieces
        ]
    )
