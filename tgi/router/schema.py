"""The wire: JSON bodies of requests and answers, field by field as TGI has them, and strict decoding.

Types only. What a value may be beyond its type is decided in ``validate``.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec checks no bound above 63 bits: ``validate`` does."""
F32 = Annotated[float, Meta(ge=-3.4028234663852886e38, le=3.4028234663852886e38)]

Body = TypeVar("Body")

_PATH = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
"""How msgspec ends a message: with the path of the wrong value. TGI begins with it."""


class Unreadable(Exception):
    """The body is not what the route takes. Answered in plain text, as TGI's HTTP layer does, not as its JSON error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def decode(body: bytes, kind: type[Body]) -> Body:
    """JSON to a request struct. No value is coerced, except integers to floats.

    Raises Unreadable: 400 for what is not JSON, 422 for JSON of another type, with the path of the wrong value.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = _PATH.sub(r"\2: \1", str(error))
        raise Unreadable(422, f"Failed to deserialize the JSON body into the target type: {text}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(400, f"Failed to parse the request body as JSON: {error}") from error


# --- Native requests -------------------------------------------------------------------------------------------------


class GenerateParameters(Struct, frozen=True, kw_only=True):
    """How to generate. Fields of null take the model's way."""

    best_of: U63 | None = None
    """Generate this many sequences and return the one with the highest mean logprob."""
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    min_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    ignore_eos: bool = False
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: U63 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    logit_bias: dict[int, F32] | None = None
    grammar: Any = None
    adapter_id: str | None = None


class GenerateRequest(Struct, frozen=True, kw_only=True):
    inputs: str
    parameters: GenerateParameters = GenerateParameters(do_sample=True)  # TGI: sampling unless parameters are sent


class CompatGenerateRequest(GenerateRequest, frozen=True, kw_only=True):
    stream: bool = False


# --- OpenAI requests -------------------------------------------------------------------------------------------------


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool = False


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    """Any name is accepted: one model is served."""
    max_tokens: U32 | None = None
    temperature: F32 | None = None
    """0 is greedy; null samples at 1."""
    top_p: F32 | None = None
    top_k: I32 | None = None
    min_p: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    logit_bias: dict[int, F32] | list[Any] | None = None
    seed: U64 | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: U32 | None = None
    best_of: U32 | None = None
    min_tokens: U32 | None = None
    stop_token_ids: list[U32] | None = None
    watermark: bool | None = None
    grammar: Any = None
    adapter_id: str | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class Url(Struct, frozen=True):
    url: str


class ImagePart(Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: Url


class FunctionCall(Struct, frozen=True, kw_only=True):
    name: str
    arguments: Any = None


class ToolCall(Struct, frozen=True, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class Message(Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs `content` or `tool_calls`")


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    response_format: Any = None
    functions: Any = None
    function_call: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: str | list[str]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: U32 | None = None

    def __post_init__(self) -> None:
        if self.prompt == []:
            raise ValueError("Empty array detected. Do not use an empty array for the prompt.")


# --- Native answers --------------------------------------------------------------------------------------------------

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class ErrorResponse(Struct, frozen=True):
    error: str
    error_type: str


class PrefillToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None


class Token(Struct, frozen=True):
    id: int
    text: str
    logprob: float
    """The model's own, before penalties and warpers."""
    special: bool


class BestOfSequence(Struct, frozen=True, kw_only=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct, frozen=True):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, frozen=True, kw_only=True):
    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct, frozen=True):
    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, frozen=True):
    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(Struct, frozen=True, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    device: str
    dtype: str
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    memory: dict[str, int]
    """The memory ledger: name → bytes."""


# --- OpenAI answers --------------------------------------------------------------------------------------------------

OpenAIFinishReason = Literal["stop", "length"]


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletionTopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatCompletionLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatCompletionTopLogprob]


class ChatCompletionLogprobs(Struct, frozen=True):
    content: list[ChatCompletionLogprob]


class TextMessage(Struct, frozen=True):
    role: str
    content: str


class ChatCompletionComplete(Struct, frozen=True):
    index: int
    message: TextMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: OpenAIFinishReason


class ChatCompletion(Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionComplete]
    usage: Usage


class ChatCompletionDelta(Struct, frozen=True):
    role: str
    """On every delta, as the text-generation client wants it."""
    content: str
    tool_calls: None = None
    """Always there: the text-generation client can't read a delta without the key."""


class ChatCompletionChoice(Struct, frozen=True):
    index: int
    delta: ChatCompletionDelta
    logprobs: ChatCompletionLogprobs | None
    finish_reason: OpenAIFinishReason | None


class ChatCompletionChunk(Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion.chunk"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionChoice]
    usage: Usage | None = None


class CompletionComplete(Struct, frozen=True):
    index: int
    text: str
    logprobs: None
    finish_reason: OpenAIFinishReason


class CompletionFinal(Struct, frozen=True, kw_only=True, tag_field="object", tag="text_completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionComplete]
    usage: Usage


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: None
    finish_reason: OpenAIFinishReason | None


class Chunk(Struct, frozen=True, kw_only=True, tag_field="object", tag="text_completion"):
    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class StreamErrorBody(Struct, frozen=True):
    message: str
    http_status_code: int


class StreamError(Struct, frozen=True):
    """How a failure reads inside a stream of an OpenAI route."""

    error: StreamErrorBody


class ModelInfo(Struct, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsInfo(Struct, frozen=True):
    object: Literal["list"]
    data: list[ModelInfo]
