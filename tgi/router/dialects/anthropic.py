"""Anthropic's messages, and the count of their tokens."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import msgspec

from tgi.core.errors import RequestError
from tgi.router import headers
from tgi.router.call import Call, ErrorStyle, named_event
from tgi.router.conversation import Conversation, converse
from tgi.router.pipeline import Run, Service
from tgi.router.prompt import prompt_of
from tgi.router.segments import Begin, End, Finish, Grow, Kind, Segment, Step, follow, whole
from tgi.router.tools import tools_of
from tgi.router.validate import invalid, refuse
from tgi.router.wire.anthropic import (
    AnthropicMessage,
    Block,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    ErrorDetail,
    ErrorType,
    InputJsonDelta,
    MessageDelta,
    MessageError,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputConfig,
    Ping,
    RedactedThinkingBlock,
    SignatureDelta,
    StopDelta,
    StopReason,
    Text,
    TextBlock,
    TextDelta,
    Thinking,
    ThinkingBlock,
    ThinkingDelta,
    Thought,
    TokenCount,
    ToolDefinition,
    ToolResultBlock,
    ToolUse,
    ToolUseBlock,
    UsageDetails,
)
from tgi.router.wire.base import Unreadable
from tgi.router.wire.grammar import Grammar, JsonSchemaGrammar, NamedSchema
from tgi.router.wire.openai import (
    ChatRequest,
    FinishReason,
    Function,
    FunctionCall,
    ImagePart,
    Message,
    TextPart,
    Tool,
    ToolCall,
    ToolSelection,
)


async def messages(call: Call, service: Service, request: MessagesRequest) -> None:
    async with converse(service, _conversation(request), call.arrived) as conversation:
        compute_type, (run,) = service.settings.compute_type, conversation.runs
        request_id = _new_request_id()
        if request.stream:
            fields = headers.of_stream(compute_type, [run.generation.text]) | request_id
            async with call.stream(fields, _fail_with(service, request_id)) as say:
                await _stream(service, conversation, say)
        else:
            segments, reason = await whole(conversation)
            answer = _message(service, conversation, [_block(segment) for segment in segments], reason)
            await call.json(answer, headers.of_answer(compute_type, [run]) | request_id)


async def count_tokens(call: Call, service: Service, request: CountTokensRequest) -> None:
    chat = _chat(request)
    prompt = await prompt_of(service, chat, tools_of(chat))
    token_ids = await service.validator.encode(prompt.text, add_special_tokens=False)
    await call.json(TokenCount(len(token_ids)), _new_request_id())


# --- Errors ----------------------------------------------------------------------------------------------------------

_ERROR_TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def _new_request_id() -> dict[str, str]:
    """As a header."""
    return {"request-id": f"req_{uuid.uuid4().hex}"}


def _error(status: int, message: str, request_id: dict[str, str]) -> MessageError:
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return MessageError(ErrorDetail(kind, message), request_id["request-id"])


async def _tell(call: Call, error: RequestError | Unreadable) -> None:
    status = ERRORS.status_of(error.status)
    request_id = _new_request_id()
    await call.json(_error(status, error.message, request_id), request_id, status)


def _fail_with(service: Service, request_id: dict[str, str]) -> Callable[[Exception], bytes]:
    """The last event of a stream that fails."""

    def fail(error: Exception) -> bytes:
        judged = service.judge(error)
        return named_event(_error(ERRORS.status_of(judged.status), judged.message, request_id))

    return fail


ERRORS = ErrorStyle(_tell, MessageError, {415: 400, 422: 400, 424: 500, 503: 529})


# --- The answer ------------------------------------------------------------------------------------------------------


def _message(
    service: Service,
    conversation: Conversation,
    content: list[Thought | Text | ToolUse],
    reason: FinishReason | None = None,
) -> AnthropicMessage:
    """``reason``: None at the start of a stream."""
    (run,) = conversation.runs
    return AnthropicMessage(
        id=f"msg_{uuid.uuid4().hex}",
        model=service.settings.model.model_id,
        content=content,
        stop_reason=None if reason is None else _stop_reason(run, reason),
        stop_sequence=None if reason is None else run.stop,
        usage=_usage(conversation),
    )


def _stop_reason(run: Run, reason: FinishReason) -> StopReason:
    match reason:
        case "length":
            return "max_tokens"
        case "tool_calls":
            return "tool_use"
        case "stop":
            return "end_turn" if run.stop is None else "stop_sequence"


def _usage(conversation: Conversation) -> MessageUsage:
    (run,) = conversation.runs
    return MessageUsage(
        input_tokens=len(run.generation.token_ids) - run.cached,
        cache_read_input_tokens=run.cached,
        output_tokens=run.tokens,
        output_tokens_details=UsageDetails(conversation.reasoning_tokens),
    )


def _block(segment: Segment) -> Thought | Text | ToolUse:
    """As far as it has come."""
    match segment.kind:
        case "reasoning":
            return Thought(segment.text)
        case "text":
            return Text(segment.text)
        case "call":
            arguments = {}
            with suppress(msgspec.DecodeError, RecursionError):
                arguments = msgspec.json.decode(segment.text, type=dict[str, Any])
            return ToolUse(segment.call_id, segment.name, arguments)


def _delta(kind: Kind, text: str) -> ThinkingDelta | TextDelta | InputJsonDelta:
    match kind:
        case "reasoning":
            return ThinkingDelta(text)
        case "text":
            return TextDelta(text)
        case "call":
            return InputJsonDelta(text)


async def _stream(service: Service, conversation: Conversation, say: Callable[[bytes], None]) -> None:
    (run,) = conversation.runs
    started = False

    def hear(step: Step) -> None:
        nonlocal started
        if not started:  # not before the first token: only then it is known what of the prompt was cached
            started = True
            say(named_event(MessageStart(_message(service, conversation, []))))
            say(named_event(Ping()))
        match step:
            case Begin(segment):
                say(named_event(ContentBlockStart(segment.index, _block(segment))))
            case Grow(segment, text):
                say(named_event(ContentBlockDelta(segment.index, _delta(segment.kind, text))))
            case End(segment):
                if segment.kind == "reasoning":
                    say(named_event(ContentBlockDelta(segment.index, SignatureDelta(""))))
                say(named_event(ContentBlockStop(segment.index)))
            case Finish(reason):
                say(named_event(MessageDelta(StopDelta(_stop_reason(run, reason), run.stop), _usage(conversation))))
                say(named_event(MessageStop()))

    await follow(conversation, hear)


# --- The request -----------------------------------------------------------------------------------------------------


def _conversation(request: MessagesRequest) -> ChatRequest:
    if request.thinking is not None and (request.thinking.budget_tokens or 0) >= request.max_tokens:
        raise invalid("`thinking.budget_tokens` must be less than `max_tokens`")
    return msgspec.structs.replace(
        _chat(request),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k or None,
        stop=request.stop_sequences,
    )


def _chat(request: CountTokensRequest) -> ChatRequest:
    """What the model is shown, and which tools and form bind its answer."""
    refuse(request)
    if not request.messages:
        raise invalid("`messages` must not be empty")
    messages: list[Message] = []
    if request.system is not None:
        messages.append(Message(role="system", content=_text("system", _blocks(request.system))))
    for role, turn in groupby(request.messages, key=lambda message: message.role):  # successive ones are one turn
        messages += _turn(role, [block for message in turn for block in _blocks(message.content)])
    if messages and messages[-1].tool_calls:
        raise invalid("the last message has a `tool_use` without a `tool_result`")
    not_parallel = None if request.tool_choice is None else request.tool_choice.disable_parallel_tool_use
    return ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool) for tool in request.tools or []] or None,
        tool_choice=_tool_choice(request),
        parallel_tool_calls=None if not_parallel is None else not not_parallel,
        response_format=_response_format(request.output_config),
        reasoning_effort=None if request.output_config is None else request.output_config.effort,
        **_reasoning(request.thinking),
    )


def _reasoning(thinking: Thinking | None) -> dict[str, Any]:
    """The fields of a ChatRequest. Unlike Anthropic's, a budget may be less than 1024 tokens."""
    if thinking is None:
        return {}
    if thinking.type == "between_tools":
        raise invalid("`thinking` of type `between_tools` is not supported")
    if thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise invalid(f"`thinking` of type `{thinking.type}` has no `budget_tokens`")
    if thinking.type == "enabled" and not thinking.budget_tokens:
        raise invalid("`thinking` of type `enabled` needs `budget_tokens` of at least 1")
    return {
        "enable_thinking": {"enabled": True, "adaptive": None, "disabled": False}[thinking.type],
        "thinking_budget": thinking.budget_tokens,
        "include_reasoning": thinking.display != "omitted",
    }


def _blocks(content: str | Sequence[Block]) -> Sequence[Block]:
    return [TextBlock(text=content)] if isinstance(content, str) else content


def _turn(role: str, blocks: Sequence[Block]) -> Iterator[Message]:
    match role:
        case "assistant":
            yield _assistant(blocks)
        case "user":
            if not blocks:
                raise invalid("a message of role `user` has no content")
            for is_result, group in groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
                if is_result:
                    yield from (_result(block) for block in group if isinstance(block, ToolResultBlock))
                else:
                    yield Message(role=role, content=_text(role, list(group)))
        case _:
            yield Message(role=role, content=_text(role, blocks))


def _assistant(blocks: Sequence[Block]) -> Message:
    reasoning, calls, rest = "", [], []
    for block in blocks:
        match block:
            case ThinkingBlock():
                reasoning += block.thinking
            case RedactedThinkingBlock():  # nobody but its writer can read it
                pass
            case ToolUseBlock():
                calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=block.input)))
            case _:
                rest.append(block)
    return Message(
        role="assistant",
        content=_text("assistant", rest) if rest or not calls else None,
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )


def _result(block: ToolResultBlock) -> Message:
    content = _text("tool_result", _blocks(block.content))
    if block.is_error:  # templates know no other way to say so
        content = "Error: " + content if isinstance(content, str) else [TextPart("Error: "), *content]
    return Message(role="tool", tool_call_id=block.tool_use_id, content=content)


def _text(where: str, blocks: Sequence[Block]) -> str | list[TextPart | ImagePart]:
    """One text as a string, several as parts."""
    texts = []
    for block in blocks:
        if not isinstance(block, TextBlock):
            raise invalid(f"`{block.__struct_config__.tag}` is not supported in `{where}`")
        texts.append(block.text)
    return "".join(texts) if len(texts) < 2 else [TextPart(text) for text in texts]


def _tool(tool: ToolDefinition) -> Tool:
    if tool.type not in (None, "custom"):
        raise invalid(f"tools of type `{tool.type}` are not supported")
    if tool.input_schema is None:
        raise invalid(f"tool `{tool.name}` needs an `input_schema`")
    refuse(tool, "tools.")
    return Tool(
        function=Function(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    )


def _tool_choice(request: CountTokensRequest) -> str | ToolSelection | None:
    choice = request.tool_choice
    if choice is None:
        return None
    if choice.type in ("any", "tool") and not request.tools:
        raise invalid(f"`tool_choice` of type `{choice.type}` needs `tools`")
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise invalid("`tool_choice` of type `tool` needs a `name`")
    return ToolSelection(name=choice.name)


def _response_format(output: OutputConfig | None) -> Grammar | None:
    if output is None:
        return None
    if output.format is None:
        return None
    return JsonSchemaGrammar(json_schema=NamedSchema(name="output", schema=output.format.schema))
