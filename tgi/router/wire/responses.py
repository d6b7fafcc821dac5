"""The wire of OpenAI's responses. Types only: the dialect judges the values.

Fields of OpenAI's that the dialect refuses are here, so that they are refused by name.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tgi.router.wire.base import F32, U32, Refusing
from tgi.router.wire.openai import Logprob, NamedTool, Sampled

# --- Requests --------------------------------------------------------------------------------------------------------


class InputText(Struct, frozen=True, tag_field="type", tag="input_text"):
    text: str


class InputImage(Struct, frozen=True, tag_field="type", tag="input_image"):
    pass


class InputFile(Struct, frozen=True, tag_field="type", tag="input_file"):
    pass


class WrittenText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """What a model wrote earlier."""

    text: str


class Refusal(Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class ReasoningText(Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class SummaryText(Struct, frozen=True, tag_field="type", tag="summary_text"):
    text: str


Part = InputText | InputImage | InputFile | WrittenText | Refusal | ReasoningText

_REQUIRED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class InputItem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message, a function's call or its output, or reasoning: the fields of all, since a message needs no type."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """JSON in a string."""
    output: str | list[InputText | InputImage | InputFile] | None = None
    summary: list[SummaryText] | None = None
    encrypted_content: str | None = None

    def __post_init__(self) -> None:
        required = _REQUIRED.get(self.type)
        if required is None:
            raise ValueError(f"items of type `{self.type}` are not supported")
        for name in required:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type `{self.type}` needs `{name}`")


class FunctionTool(Struct, frozen=True, kw_only=True):
    type: str
    """Another than ``function`` is a tool that OpenAI runs."""
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    """``function``, ``allowed_tools``; another chooses one of OpenAI's tools."""
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedTool] | None = None


class TextFormat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(Refusing, frozen=True, kw_only=True, omit_defaults=True):
    neutral = {"verbosity": (None, "medium")}

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Refusing, frozen=True, kw_only=True):
    neutral = {
        "summary": (None, "auto"),
        "generate_summary": (None, "auto"),
        "context": (None, "auto"),
        "mode": (None, "standard"),
    }

    effort: str | None = None
    """As ``reasoning_effort`` of chat completions."""
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(Refusing, frozen=True, kw_only=True):
    neutral = {"include_obfuscation": (None, False)}

    include_obfuscation: bool | None = None


class ResponsesRequest(Sampled, frozen=True, kw_only=True):
    neutral = {
        "truncation": (None, "disabled"),
        "service_tier": (None, "auto", "default"),
        "background": (None, False),
        "background_options": (None,),
        "conversation": (None,),
        "prompt": (None,),
        "prompt_cache_retention": (None, "in_memory"),
        "prompt_cache_options": (None,),
        "max_tool_calls": (None,),
        "context_management": (None, []),
        "moderation": (None,),
        "access_programs": (None,),
        "image": (None,),
    }

    chat_template_kwargs: dict[str, Any] | None = None
    """This and the next two as in chat completions."""
    enable_thinking: bool | None = None
    thinking_budget: U32 | None = None
    model: str | None = None
    """Any name is accepted: one model is served."""
    input: str | list[InputItem]
    instructions: str | None = None
    """Goes before everything else; not carried over to later responses."""
    previous_response_id: str | None = None
    """Of a stored response: the conversation so far."""
    store: bool | None = None
    """Only true stores, unlike at OpenAI."""
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**32 - 1)] | None = None
    temperature: F32 | None = None
    """0 is greedy; null samples at 1."""
    top_p: F32 | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: U32 | None = None
    """More than 0 asks for logprobs, as ``include`` does."""
    truncation: Literal["disabled", "auto"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """There is one cache, and it needs no hints."""
    service_tier: str | None = None
    reasoning: Reasoning | None = None
    background: bool | None = None
    background_options: Any = None
    conversation: Any = None
    prompt: Any = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    max_tool_calls: U32 | None = None
    context_management: Any = None
    moderation: Any = None
    access_programs: Any = None
    image: Any = None


# --- Answers ---------------------------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Logprob] = []


class OutputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[SummaryText] = []
    """Always empty: the reasoning is told in full."""
    content: list[ReasoningText]
    encrypted_content: str | None = None
    """On request the text once more, in Base64, for clients that send nothing else back."""
    status: ItemStatus


class FunctionCallItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    """JSON in a string; a part of it in an incomplete item."""
    status: ItemStatus


OutputItem = ReasoningItem | OutputMessage | FunctionCallItem


class InputTokensDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0
    """Always 0: nothing is cached for a price."""


class OutputTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class Response(Struct, frozen=True, kw_only=True, tag_field="object", tag="response"):
    id: str
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    instructions: str | None
    previous_response_id: str | None
    store: bool
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    tools: list[FunctionTool]
    tool_choice: Literal["none", "auto", "required"] | ToolChoice
    parallel_tool_calls: bool
    text: TextConfig
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning = Reasoning()
    service_tier: Literal["default"] = "default"
    background: bool = False


class DeletedResponse(Struct, frozen=True, kw_only=True, tag_field="object", tag="response"):
    id: str
    deleted: bool = True


# --- Events ----------------------------------------------------------------------------------------------------------


class Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    sequence_number: int


class _Lifecycle(Event, frozen=True, kw_only=True):
    response: Response


class Created(_Lifecycle, frozen=True, kw_only=True, tag="response.created"):
    pass


class InProgress(_Lifecycle, frozen=True, kw_only=True, tag="response.in_progress"):
    pass


class Completed(_Lifecycle, frozen=True, kw_only=True, tag="response.completed"):
    pass


class Incomplete(_Lifecycle, frozen=True, kw_only=True, tag="response.incomplete"):
    pass


class Failed(_Lifecycle, frozen=True, kw_only=True, tag="response.failed"):
    pass


class OutputItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class OutputItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class _OfItem(Event, frozen=True, kw_only=True):
    output_index: int
    item_id: str


class ContentPartAdded(_OfItem, frozen=True, kw_only=True, tag="response.content_part.added"):
    content_index: int = 0
    part: OutputText | ReasoningText


class ContentPartDone(_OfItem, frozen=True, kw_only=True, tag="response.content_part.done"):
    content_index: int = 0
    part: OutputText | ReasoningText


class OutputTextDelta(_OfItem, frozen=True, kw_only=True, tag="response.output_text.delta"):
    content_index: int = 0
    delta: str
    logprobs: list[Logprob]


class OutputTextDone(_OfItem, frozen=True, kw_only=True, tag="response.output_text.done"):
    content_index: int = 0
    text: str
    logprobs: list[Logprob]


class ReasoningTextDelta(_OfItem, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    content_index: int = 0
    delta: str


class ReasoningTextDone(_OfItem, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    content_index: int = 0
    text: str


class FunctionCallArgumentsDelta(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class FunctionCallArgumentsDone(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


class ErrorEvent(Event, frozen=True, kw_only=True, tag="error"):
    code: str
    message: str
    param: str | None = None


ResponseEvent = (
    Created
    | InProgress
    | OutputItemAdded
    | ContentPartAdded
    | ReasoningTextDelta
    | ReasoningTextDone
    | OutputTextDelta
    | OutputTextDone
    | ContentPartDone
    | FunctionCallArgumentsDelta
    | FunctionCallArgumentsDone
    | OutputItemDone
    | Completed
    | Incomplete
    | Failed
    | ErrorEvent
)
