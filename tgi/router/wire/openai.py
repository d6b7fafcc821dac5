"""The wire of OpenAI's routes, with the extensions of other servers. Types only: ``validate`` judges the values."""

from typing import Any, Literal, cast

from msgspec import UNSET, Struct, UnsetType

from tgi.router.wire.base import F32, I32, I64, U32, Refusing
from tgi.router.wire.grammar import Grammar, ResponseFormat

# --- Requests --------------------------------------------------------------------------------------------------------


class StreamOptions(Refusing, frozen=True, kw_only=True):
    neutral = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None
    """One more chunk at the end, with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The usage so far on every chunk."""
    include_obfuscation: bool | None = None


class Sampled(Refusing, frozen=True, kw_only=True):
    """How tokens are chosen: what chat and text completions take, responses take, too, though OpenAI's don't."""

    top_k: I32 | None = None
    min_p: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    logit_bias: dict[int, F32] | list[Any] | None = None
    seed: I64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[U32] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: U32 | None = None
    skip_special_tokens: bool | None = None
    priority: I32 | None = None
    cache_salt: str | None = None


class StructuredOutputs(Refusing, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the answer must spell, as vLLM is asked for it now: one of the first five, or nothing. A field that nobody
    knows would be a wish that nobody keeps."""

    neutral = {"disable_additional_properties": (None, False), "structural_tag": (None,)}

    json: Any = None
    """A JSON schema, as itself or in a string."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    """A regex of the white space in JSON."""
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None
    """There is nothing to fall back to."""
    disable_additional_properties: bool | None = None
    structural_tag: Any = None


class OpenAIRequest(Sampled, frozen=True, kw_only=True):
    """What chat and text completions have in common."""

    neutral = {
        "adapter_id": (None,),
        "guided_decoding_backend": (None, "auto", "guidance"),
        "structural_tag": (None,),
    }

    model: str | None = None
    """Any name is accepted: one model is served."""
    max_tokens: U32 | None = None
    temperature: F32 | None = None
    """0 is greedy; null samples at 1."""
    top_p: F32 | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: U32 | None = None
    best_of: U32 | None = None
    response_format: ResponseFormat | None = None
    watermark: bool | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    guided_json: Any = None
    """A JSON schema, as itself or in a string."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    """Lark or GBNF."""
    guided_whitespace_pattern: str | None = None
    """A regex of the white space in JSON."""
    guided_decoding_backend: str | None = None
    structural_tag: Any = None
    structured_outputs: StructuredOutputs | None = None

    user: Any = None
    """This and what follows has its effect on the operator's side at OpenAI, and none on the answer: nobody looks."""
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class Url(Struct, frozen=True):
    url: str


class ImagePart(Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: Url


class FunctionCall(Struct, frozen=True, kw_only=True):
    name: str
    arguments: Any = None
    """JSON: as itself, or in a string."""
    parameters: Any = None
    """TGI's other name for ``arguments``."""


class ToolCall(Struct, frozen=True, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class Function(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without one there are none."""
    arguments: dict[str, Any] | None = None
    """TGI's other name for ``parameters``."""
    strict: bool | None = None
    """false: what of the schema can't be enforced is left to the model. Otherwise it is refused."""

    @property
    def schema(self) -> dict[str, Any] | None:
        return self.arguments if self.parameters is None else self.parameters


class Tool(Struct, frozen=True, kw_only=True):
    type: str = "function"
    """As TGI, nobody looks at it: there are no other tools than functions."""
    function: Function


class FunctionName(Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(Struct, frozen=True, kw_only=True):
    """The name in a ``function``, as in chat completions, or beside the type, as in responses."""

    type: Literal["function"] = "function"
    function: FunctionName | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.name is None:
            raise ValueError("a tool choice needs `function` with a `name`")

    @property
    def chosen(self) -> str:
        return self.function.name if self.function is not None else self.name or ""


class AllowedTools(Struct, frozen=True, kw_only=True):
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool]


class ToolSelection(Struct, frozen=True, kw_only=True):
    """One function, or several of which the model may call some: as in chat completions, in an object of its own, or as
    in responses, beside the type."""

    type: Literal["function", "allowed_tools"] = "function"
    function: FunctionName | None = None
    name: str | None = None
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] | None = None

    def __post_init__(self) -> None:
        if self.type == "function" and self.function is None and self.name is None:
            raise ValueError("a tool choice needs `function` with a `name`")
        if self.type == "allowed_tools" and self.allowed_tools is None and self.tools is None:
            raise ValueError("a tool choice of type `allowed_tools` needs `allowed_tools`")

    @property
    def allowed(self) -> AllowedTools | None:
        """None: one function is chosen."""
        if self.type == "function":
            return None
        return self.allowed_tools or AllowedTools(mode=self.mode, tools=self.tools or [])

    @property
    def names(self) -> list[str]:
        """Of all that may be called."""
        if (allowed := self.allowed) is not None:
            return [tool.chosen for tool in allowed.tools]
        return [self.function.name if self.function is not None else self.name or ""]


class Message(Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs `content` or `tool_calls`")


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    neutral = OpenAIRequest.neutral | {
        "best_of": (None, 1),
        "functions": (None, []),
        "function_call": (None, "none"),
        "chat_template": (None,),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "store": (None, False),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    messages: list[Message]
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolSelection | None = None
    """"auto", "none", "required", or a function's name. Without tools nobody looks at it."""
    tool_prompt: str | None = None
    """Tells the model how to call a function, in place of TGI's own words."""
    parallel_tool_calls: bool | None = None
    """true: several calls in one answer; false: one at most. Left out, it is one of models that were taught no format
    for calls: they go on calling."""
    functions: Any = None
    function_call: Any = None
    documents: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    """For templates that read it. Where a template can only turn reasoning on and off, "none" is off."""
    enable_thinking: bool | None = None
    """Turns reasoning on or off: by the template's switch; where it has none, reasoning is closed where it begins."""
    thinking_budget: U32 | None = None
    """Tokens of reasoning; then it is brought to an end, and the answer begins."""
    include_reasoning: bool | None = None
    """false: reasoning is not told."""
    separate_reasoning: bool | None = None
    """false: reasoning stays in the content, with its marks."""
    audio: Any = None
    modalities: Any = None
    moderation: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: str | list[str | U32 | list[U32]]
    """One text, several texts, one prompt of token ids, or several of those."""
    suffix: str | None = None
    echo: bool | None = None
    logprobs: U32 | None = None

    def __post_init__(self) -> None:
        if self.prompt == []:
            raise ValueError("Empty array detected. Do not use an empty array for the prompt.")
        if len({type(item) for item in self.prompt}) > 1:
            raise ValueError("a prompt is one text, several texts, one list of token ids or several of those")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [cast("str | list[int]", self.prompt)]
        return cast("list[str | list[int]]", self.prompt)


# --- Answers ---------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[Logprob]


class FunctionCalled(Struct, frozen=True):
    name: str
    arguments: str
    """JSON in a string."""


class ToolCalled(Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCalled


class AssistantMessage(Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCalled] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionCallDelta(Struct, frozen=True):
    name: str | None
    arguments: str


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(Struct, frozen=True):
    role: str | UnsetType
    content: str | None
    tool_calls: list[ToolCallDelta] | None = None
    """Always there: the text-generation client can't read a delta without the key."""
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion.chunk"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Struct, frozen=True):
    """Of the legacy route: parallel lists, one item for each token. The first of a prompt has no log-probability."""

    tokens: list[str]
    """Texts; of tokens that are part of a character ``bytes:\\xe2\\x98`` and so on, as OpenAI spells them."""
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The token itself and the likeliest in its place, best first; of several with one text the likeliest."""
    text_offset: list[int]
    """Where a token begins in the choice's text, in characters."""


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    """null while the choice's text goes on, in a stream."""


class Completion(Struct, frozen=True, kw_only=True, tag_field="object", tag="text_completion"):
    """A whole answer, and a stream's chunk with the usage of all that it ends."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Struct, frozen=True, kw_only=True, tag_field="object", tag="text_completion"):
    """The same keys in TGI's other order."""

    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class OpenAIErrorBody(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(Struct, frozen=True):
    """How OpenAI tells of errors."""

    error: OpenAIErrorBody


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
