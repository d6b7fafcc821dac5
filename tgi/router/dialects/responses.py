"""OpenAI's responses, and those of them that are stored."""

import itertools
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec

from tgi.core.errors import NOT_FOUND, RequestError
from tgi.router import headers
from tgi.router.call import Call, ErrorStyle, named_event
from tgi.router.conversation import Conversation, converse
from tgi.router.dialects.chat import logprobs_of
from tgi.router.dialects.openai import error_of
from tgi.router.pipeline import Piece, Service
from tgi.router.segments import Begin, End, Finish, Grow, Kind, Segment, Step, follow, whole
from tgi.router.store import Stored
from tgi.router.validate import invalid, refuse
from tgi.router.wire.base import Unreadable
from tgi.router.wire.grammar import Grammar, JsonObjectGrammar, JsonSchemaGrammar, NamedSchema
from tgi.router.wire.openai import (
    ChatRequest,
    FinishReason,
    Function,
    FunctionCall,
    ImagePart,
    Logprob,
    Message,
    OpenAIError,
    Sampled,
    TextPart,
    Tool,
    ToolCall,
    ToolSelection,
)
from tgi.router.wire.responses import (
    Completed,
    ContentPartAdded,
    ContentPartDone,
    Created,
    DeletedResponse,
    ErrorEvent,
    Event,
    Failed,
    FunctionCallArgumentsDelta,
    FunctionCallArgumentsDone,
    FunctionCallItem,
    FunctionTool,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputItem,
    InputText,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    OutputTokensDetails,
    Part,
    Reasoning,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    Refusal,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
    TextConfig,
    TextFormat,
    ToolChoice,
    WrittenText,
)

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"

_OURS = "tgi:"
"""What encrypted reasoning begins with that we can read."""


async def responses(call: Call, service: Service, request: ResponsesRequest) -> None:
    if request.store and service.settings.router_workers > 1:
        # Each router has a store of its own, and the next request may come to another.
        raise invalid("`store: true` is not supported by a server with `--router-workers` above 1")
    context = _context(service, request)
    async with converse(service, _chat(request, context), call.arrived) as conversation:
        compute_type, (run,) = service.settings.compute_type, conversation.runs
        answer = _Answer(service, request, context, conversation)
        if request.stream:
            fields = headers.of_stream(compute_type, [run.generation.text])
            async with call.stream(fields, answer.fail) as say:
                await answer.stream(say)
        else:
            segments, reason = await whole(conversation)
            items = [answer.item(segment) for segment in segments]
            await call.json(answer.finished(items, reason), headers.of_answer(compute_type, [run]))


async def stored_response(call: Call, service: Service, _: None) -> None:
    for name, _value in parse_qsl(call.query, keep_blank_values=True):
        raise invalid(f"the query's `{name}` is not supported")
    await call.answer(200, _stored(service, call.path["response_id"]).response, "application/json")


async def delete_response(call: Call, service: Service, _: None) -> None:
    id = call.path["response_id"]
    if not service.responses.delete(id):
        raise _missing(id)
    await call.json(DeletedResponse(id=id))


async def cancel_response(call: Call, service: Service, _: None) -> None:
    raise invalid("only responses made with `background` can be cancelled, and `background` is not supported")


def _stored(service: Service, id: str) -> Stored:
    stored = service.responses.get(id)
    if stored is None:
        raise _missing(id)
    return stored


def _missing(id: str) -> RequestError:
    return RequestError(NOT_FOUND, f"No response `{id}` is stored; only those made with `store: true` are, for a while")


# --- Errors ----------------------------------------------------------------------------------------------------------


async def _tell(call: Call, error: RequestError | Unreadable) -> None:
    status = ERRORS.status_of(error.status)
    await call.json(error_of(status, error.message), status=status)


ERRORS = ErrorStyle(_tell, OpenAIError, {415: 400, 422: 400, 424: 500})


# --- The answer ------------------------------------------------------------------------------------------------------

_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}


class _Answer:
    """One response: as it is now, and the events that tell how it grows."""

    def __init__(
        self, service: Service, request: ResponsesRequest, context: list[InputItem], conversation: Conversation
    ) -> None:
        self._service = service
        self._request = request
        self._context = context
        self._conversation = conversation
        self._hex = uuid.uuid4().hex
        self._created = int(time.time())
        self._numbers = itertools.count()
        self._items: list[OutputItem] = []
        """Those whose end has been told."""

    async def stream(self, say: Callable[[bytes], None]) -> None:
        say(self._event(Created, response=self._response("in_progress", [])))
        say(self._event(InProgress, response=self._response("in_progress", [])))

        def hear(step: Step) -> None:
            for event in self._told(step):
                say(event)

        await follow(self._conversation, hear)

    def fail(self, error: Exception) -> bytes:
        """The last events of a stream that fails."""
        judged = self._service.judge(error)
        code: Literal["server_error", "rate_limit_exceeded"]
        code = "rate_limit_exceeded" if judged.status == 429 else "server_error"
        failed = self._response("failed", self._items, error=ResponseError(code, judged.message))
        return self._event(ErrorEvent, code=code, message=judged.message) + self._event(Failed, response=failed)

    def finished(self, items: list[OutputItem], reason: FinishReason) -> Response:
        """The whole response, which is stored if the request wants that."""
        if reason == "length":
            response = self._response("incomplete", items, incomplete_details=IncompleteDetails("max_output_tokens"))
        else:
            response = self._response("completed", items, completed_at=int(time.time()))
        if self._request.store:
            stored = Stored(msgspec.json.encode(response), msgspec.json.encode(self._context))
            self._service.responses.put(response.id, stored)
        return response

    def item(self, segment: Segment, *, begins: bool = False) -> OutputItem:
        """A segment that has ended, or that ``begins``."""
        id, text = self._id(segment), segment.text
        status: ItemStatus = "in_progress" if begins else "incomplete" if segment.cut else "completed"
        match segment.kind:
            case "reasoning":
                encrypts = _ENCRYPTED in (self._request.include or []) and not begins
                return ReasoningItem(
                    id=id,
                    content=[] if begins else [ReasoningText(text)],
                    encrypted_content=_OURS + b64encode(text.encode()).decode() if encrypts else None,
                    status=status,
                )
            case "text":
                parts = [] if begins else [OutputText(text=text, logprobs=self._logprobs(segment.pieces))]
                return OutputMessage(id=id, content=parts, status=status)
            case "call":
                return FunctionCallItem(
                    id=id, call_id=segment.call_id, name=segment.name, arguments=text, status=status
                )

    def _told(self, step: Step) -> Iterator[bytes]:
        if isinstance(step, Finish):
            response = self.finished(self._items, step.reason)
            yield self._event(Incomplete if response.incomplete_details else Completed, response=response)
            return
        segment = step.segment
        at = {"output_index": segment.index, "item_id": self._id(segment)}
        match step:
            case Begin():
                yield self._event(OutputItemAdded, output_index=segment.index, item=self.item(segment, begins=True))
                if segment.kind != "call":
                    part = ReasoningText("") if segment.kind == "reasoning" else OutputText(text="")
                    yield self._event(ContentPartAdded, **at, part=part)
            case Grow(_, text, pieces):
                match segment.kind:
                    case "reasoning":
                        yield self._event(ReasoningTextDelta, **at, delta=text)
                    case "text":
                        yield self._event(OutputTextDelta, **at, delta=text, logprobs=self._logprobs(pieces))
                    case "call":
                        yield self._event(FunctionCallArgumentsDelta, **at, delta=text)
            case End():
                item = self.item(segment)
                match item:
                    case ReasoningItem(content=[thought]):
                        yield self._event(ReasoningTextDone, **at, text=thought.text)
                        yield self._event(ContentPartDone, **at, part=thought)
                    case OutputMessage(content=[said]):
                        yield self._event(OutputTextDone, **at, text=said.text, logprobs=said.logprobs)
                        yield self._event(ContentPartDone, **at, part=said)
                    case FunctionCallItem():
                        yield self._event(FunctionCallArgumentsDone, **at, name=item.name, arguments=item.arguments)
                yield self._event(OutputItemDone, output_index=segment.index, item=item)
                self._items.append(item)

    def _event(self, kind: type[Event], **fields: Any) -> bytes:
        return named_event(kind(sequence_number=next(self._numbers), **fields))

    def _id(self, segment: Segment) -> str:
        return f"{_PREFIXES[segment.kind]}_{self._hex}_{segment.index}"

    def _logprobs(self, pieces: Sequence[Piece]) -> list[Logprob]:
        return logprobs_of(self._service, pieces).content if _wants_logprobs(self._request) else []

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        output: list[OutputItem],
        **more: Any,
    ) -> Response:
        request = self._request
        text = request.text or TextConfig()
        return Response(
            id=f"resp_{self._hex}",
            created_at=self._created,
            status=status,
            model=self._service.settings.model.model_id,
            output=output,
            usage=None if status == "in_progress" else _usage(self._conversation),
            instructions=request.instructions,
            previous_response_id=request.previous_response_id,
            store=request.store or False,
            max_output_tokens=request.max_output_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_logprobs=request.top_logprobs or 0,
            tools=request.tools or [],
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls or False,
            text=TextConfig(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
            metadata=request.metadata or {},
            user=request.user,
            safety_identifier=request.safety_identifier,
            prompt_cache_key=request.prompt_cache_key,
            reasoning=request.reasoning or Reasoning(),
            **more,
        )


def _usage(conversation: Conversation) -> ResponseUsage:
    (run,) = conversation.runs
    given, reasoning = len(run.generation.token_ids), OutputTokensDetails(conversation.reasoning_tokens)
    return ResponseUsage(given, InputTokensDetails(run.cached), run.tokens, reasoning, given + run.tokens)


# --- The request -----------------------------------------------------------------------------------------------------


class _Answered(msgspec.Struct):
    """What later requests need of a stored response."""

    output: list[InputItem]


def _context(service: Service, request: ResponsesRequest) -> list[InputItem]:
    """All items that are to be answered, those of earlier responses first."""
    items = [InputItem(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    if request.previous_response_id is None:
        return items
    stored = _stored(service, request.previous_response_id)
    answered = msgspec.json.decode(stored.response, type=_Answered).output
    return [*msgspec.json.decode(stored.context, type=list[InputItem]), *answered, *items]


def _chat(request: ResponsesRequest, context: list[InputItem]) -> ChatRequest:
    if not context:
        raise invalid("`input` must not be empty")
    refuse(request)
    for value in request.include or []:
        if value not in (_LOGPROBS, _ENCRYPTED):
            raise invalid(f"`include` of `{value}` is not supported")
    return ChatRequest(
        **{name: getattr(request, name) for name in Sampled.__struct_fields__},
        chat_template_kwargs=request.chat_template_kwargs,
        enable_thinking=request.enable_thinking,
        thinking_budget=request.thinking_budget,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        model=request.model,
        messages=_messages(request.instructions, context),
        add_generation_prompt=True,  # an answer never goes on with the last item
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        logprobs=_wants_logprobs(request),
        top_logprobs=request.top_logprobs,
        user=request.user,
        tools=[_tool(tool) for tool in request.tools or []] or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=None if request.text is None else _response_format(request.text.format),
    )


def _wants_logprobs(request: ResponsesRequest) -> bool:
    return bool(request.top_logprobs) or _LOGPROBS in (request.include or [])


def _messages(instructions: str | None, items: Iterable[InputItem]) -> list[Message]:
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    for is_assistant, turn in itertools.groupby(items, key=_is_assistant):
        if is_assistant:
            messages.append(_assistant(turn))
        else:
            messages += map(_message, turn)
    return messages


def _is_assistant(item: InputItem) -> bool:
    return item.type in ("function_call", "reasoning") or item.role == "assistant"


def _assistant(turn: Iterable[InputItem]) -> Message:
    """What the assistant thought, said and called in a row is one message to a template."""
    reasoning = ""
    parts: list[Part] = []
    calls: list[ToolCall] = []
    for item in turn:
        if item.type == "reasoning":
            reasoning += _reasoning(item)
        elif item.type == "function_call":
            function = FunctionCall(name=item.name or "", arguments=item.arguments)
            calls.append(ToolCall(id=item.call_id or "", function=function))
        else:
            parts += _parts(item.content)
    return Message(
        role="assistant",
        content=_text(parts) if parts or not calls else None,
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )


def _message(item: InputItem) -> Message:
    if item.type == "function_call_output":
        return Message(role="tool", tool_call_id=item.call_id, content=_text(_parts(item.output)))
    # OpenAI's two names for one thing; templates know the older one.
    role = "system" if item.role == "developer" else item.role or ""
    return Message(role=role, content=_text(_parts(item.content)))


def _reasoning(item: InputItem) -> str:
    """In full, or else summed up; what another server has encrypted nobody here can read."""
    full = "".join(part.text for part in _parts(item.content) if isinstance(part, ReasoningText))
    if not full and (encrypted := item.encrypted_content or "").startswith(_OURS):
        with suppress(ValueError):
            full = b64decode(encrypted.removeprefix(_OURS)).decode()
    return full or "".join(part.text for part in item.summary or [])


def _parts(content: str | Sequence[Part] | None) -> Sequence[Part]:
    return [InputText(content)] if isinstance(content, str) else content or []


def _text(parts: Sequence[Part]) -> str | list[TextPart | ImagePart]:
    """One text as a string, several as parts."""
    texts = []
    for part in parts:
        match part:
            case InputText(text) | WrittenText(text) | Refusal(text):
                texts.append(text)
            case _:
                raise invalid(f"`{part.__struct_config__.tag}` is not supported")
    return "".join(texts) if len(texts) < 2 else [TextPart(text) for text in texts]


def _tool(tool: FunctionTool) -> Tool:
    if tool.type != "function":
        raise invalid(f"tools of type `{tool.type}` are not supported")
    if tool.name is None:
        raise invalid("a tool of type `function` needs a `name`")
    return Tool(
        function=Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    )


def _tool_choice(choice: str | ToolChoice | None) -> str | ToolSelection | None:
    if not isinstance(choice, ToolChoice):
        return choice
    if choice.type == "allowed_tools":
        if choice.tools is None:
            raise invalid("`tool_choice` of type `allowed_tools` needs `tools`")
        return ToolSelection(type="allowed_tools", mode=choice.mode or "auto", tools=choice.tools)
    if choice.type != "function":
        raise invalid(f"`tool_choice` of type `{choice.type}` is not supported")
    if choice.name is None:
        raise invalid("`tool_choice` of type `function` needs a `name`")
    return ToolSelection(name=choice.name)


def _response_format(format: TextFormat | None) -> Grammar | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return JsonObjectGrammar()
    if format.name is None or format.schema is None:
        raise invalid("`text.format` of type `json_schema` needs a `name` and a `schema`")
    return JsonSchemaGrammar(json_schema=NamedSchema(name=format.name, schema=format.schema, strict=format.strict))
