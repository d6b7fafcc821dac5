"""The wire of Anthropic's messages. Types only: the dialect judges the values.

Fields of Anthropic's that the dialect refuses are here, so that they are refused by name.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tgi.router.wire.base import U32, Refusing

# --- Requests --------------------------------------------------------------------------------------------------------

Share = Annotated[float, Meta(ge=0, le=1)]


class CacheControl(Struct, frozen=True, tag_field="type", tag="ephemeral"):
    """Accepted wherever Anthropic has it: prompts are cached without being asked to."""

    ttl: Literal["5m", "1h"] | None = None


class _Block(Struct, frozen=True, kw_only=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextBlock(_Block, frozen=True, kw_only=True, tag="text"):
    text: str


class ImageBlock(_Block, frozen=True, kw_only=True, tag="image"):
    source: Any


class DocumentBlock(_Block, frozen=True, kw_only=True, tag="document"):
    source: Any


class ToolUseBlock(_Block, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block, frozen=True, kw_only=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] = ""
    is_error: bool | None = None


class ThinkingBlock(_Block, frozen=True, kw_only=True, tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block, frozen=True, kw_only=True, tag="redacted_thinking"):
    """Reasoning that only the server that wrote it can read."""

    data: str


Block = TextBlock | ImageBlock | DocumentBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class InputMessage(Struct, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(Refusing, frozen=True, kw_only=True):
    neutral = {"input_examples": (None, []), "defer_loading": (None, False), "allowed_callers": (None, ["direct"])}

    name: str
    type: str | None = None
    """Another than ``custom`` is a tool that Anthropic defines or runs."""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Input is always streamed as it is generated."""
    input_examples: list[Any] | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class ToolChoice(Struct, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, frozen=True, kw_only=True):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    """``adaptive``: as the model does unless told otherwise, which is also what happens without the field."""
    budget_tokens: U32 | None = None
    display: Literal["summarized", "omitted"] | None = None
    """Nothing is ever summed up; ``omitted``: reasoning isn't told."""


class OutputFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True, kw_only=True):
    effort: str | None = None
    """For templates that read ``reasoning_effort``."""
    format: OutputFormat | None = None


class RequestMetadata(Struct, frozen=True, kw_only=True):
    user_id: str | None = None


class CountTokensRequest(Refusing, frozen=True, kw_only=True):
    neutral = {
        "speed": (None, "standard"),
        "mcp_servers": (None, []),
        "context_management": (None,),
    }

    model: str
    """Any name is accepted: one model is served."""
    messages: list[InputMessage]
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: str | None = None
    mcp_servers: list[Any] | None = None
    context_management: Any = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    neutral = CountTokensRequest.neutral | {"container": (None,), "diagnostics": (None,), "inference_geo": (None,)}

    max_tokens: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    stop_sequences: list[str] | None = None
    temperature: Share | None = None
    """0 is greedy; null samples at 1."""
    top_p: Share | None = None
    top_k: U32 | None = None
    """0 is off."""
    stream: bool | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    """There is one tier."""
    container: Any = None
    diagnostics: Any = None
    inference_geo: str | None = None


# --- Answers ---------------------------------------------------------------------------------------------------------

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TokenCount(Struct, frozen=True):
    input_tokens: int


class UsageDetails(Struct, frozen=True):
    thinking_tokens: int


class MessageUsage(Struct, frozen=True, kw_only=True):
    """A prompt's tokens are the sum of the three that speak of input."""

    input_tokens: int
    """Computed for this request."""
    cache_creation_input_tokens: int = 0
    """Always 0: nothing is cached for a price."""
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: UsageDetails


class Thought(Struct, frozen=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Whose reasoning it is nobody checks."""


class Text(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ToolUse(Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    """Empty where the answer ran out of tokens before the input was whole, and at the start of a stream's block."""


class AnthropicMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Thought | Text | ToolUse]
    stop_reason: StopReason | None
    """null at the start of a stream."""
    stop_sequence: str | None
    usage: MessageUsage


# --- Events ----------------------------------------------------------------------------------------------------------


class MessageStart(Struct, frozen=True, tag_field="type", tag="message_start"):
    message: AnthropicMessage


class Ping(Struct, frozen=True, tag_field="type", tag="ping"):
    pass


class ContentBlockStart(Struct, frozen=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Thought | Text | ToolUse


class ThinkingDelta(Struct, frozen=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(Struct, frozen=True, tag_field="type", tag="signature_delta"):
    signature: str


class TextDelta(Struct, frozen=True, tag_field="type", tag="text_delta"):
    text: str


class InputJsonDelta(Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class ContentBlockDelta(Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: ThinkingDelta | SignatureDelta | TextDelta | InputJsonDelta


class ContentBlockStop(Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, frozen=True, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(Struct, frozen=True, tag_field="type", tag="message_stop"):
    pass


# --- Errors ----------------------------------------------------------------------------------------------------------

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "api_error",
    "overloaded_error",
]


class ErrorDetail(Struct, frozen=True):
    type: ErrorType
    message: str


class MessageError(Struct, frozen=True, tag_field="type", tag="error"):
    """The body of an error, and the event that ends a stream that fails."""

    error: ErrorDetail
    request_id: str


MessageEvent = (
    MessageStart
    | Ping
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | MessageError
)
