"""The table of routes: what each takes, who answers it, what it returns, and whether a key is needed."""

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from tgi.core.config import Settings
from tgi.core.errors import NOT_FOUND, UNHEALTHY, VALIDATION, Kind
from tgi.router.call import Call, ErrorStyle
from tgi.router.dialects import anthropic, chat, cloud, completions, embeddings, native, openai, responses
from tgi.router.pipeline import Service
from tgi.router.wire.anthropic import (
    AnthropicMessage,
    CountTokensRequest,
    MessageEvent,
    MessagesRequest,
    TokenCount,
)
from tgi.router.wire.base import ErrorResponse, OneOf
from tgi.router.wire.cloud import (
    INVOCATION,
    InferRequest,
    InferResponse,
    Live,
    Metadata,
    VertexRequest,
    VertexResponse,
)
from tgi.router.wire.embeddings import Embedding, Embeddings, EmbeddingsRequest
from tgi.router.wire.native import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    Info,
    SimpleToken,
    StreamResponse,
)
from tgi.router.wire.openai import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Completion,
    CompletionChunk,
    CompletionRequest,
    ModelInfo,
    ModelsInfo,
    StreamError,
)
from tgi.router.wire.responses import DeletedResponse, Response, ResponseEvent, ResponsesRequest


class Row(NamedTuple):
    method: str
    path: str
    handler: Callable[[Call, Service, Any], Coroutine[Any, Any, None]]
    summary: str | None = None
    """None keeps the route out of the OpenAPI document."""
    body: Any = None
    """The JSON type it takes; this and the others may be OneOf."""
    answer: Any = None
    """The JSON type it returns, if it returns JSON."""
    event: Any = None
    """The JSON type of its events, if it streams."""
    protected: bool = False
    """Needs the API key, if the server has one."""
    key_header: str | None = None
    """The key is taken from here, too, without a word before it."""
    errors: ErrorStyle = native.ERRORS
    failures: tuple[Kind, ...] = ()
    """How it can fail, beside what can happen to a route with a body and to one with a key."""
    span: str = ""
    """TGI's name for it in logs and traces, where the handler has another."""

    @property
    def name(self) -> str:
        return self.span or self.handler.__name__


_VERTEX = "vertex_compatibility"
_SICK = (UNHEALTHY,)
_MODEL = "/v2/models/{model_name:path}/versions/{model_version}"

ROUTES = (
    Row(
        "POST",
        "/",
        native.compat,
        "Generate tokens if `stream == false` or a stream of tokens if `stream == true`",
        body=CompatGenerateRequest,
        answer=list[GenerateResponse],
        event=OneOf((StreamResponse, ErrorResponse)),
        protected=True,
        span="compat_generate",
    ),
    Row(
        "POST",
        "/generate",
        native.generate,
        "Generate tokens",
        body=GenerateRequest,
        answer=GenerateResponse,
        protected=True,
    ),
    Row(
        "POST",
        "/generate_stream",
        native.generate_stream,
        "Generate a stream of tokens using Server-Sent Events",
        body=GenerateRequest,
        event=OneOf((StreamResponse, ErrorResponse)),
        protected=True,
    ),
    Row(
        "POST",
        "/v1/chat/completions",
        chat.chat,
        "Continue a conversation",
        body=ChatRequest,
        answer=ChatCompletion,
        event=OneOf((ChatCompletionChunk, StreamError)),
        protected=True,
        errors=openai.ERRORS,
        span="chat_completions",
    ),
    Row(
        "POST",
        "/v1/completions",
        completions.completions,
        "Continue one or several texts",
        body=CompletionRequest,
        answer=Completion,
        event=OneOf((CompletionChunk, StreamError)),
        protected=True,
        errors=openai.ERRORS,
    ),
    Row(
        "POST",
        "/v1/responses",
        responses.responses,
        "Answer a conversation; the response is stored only where `store` is true, and then for a while, in memory",
        body=ResponsesRequest,
        answer=Response,
        event=ResponseEvent,
        protected=True,
        errors=responses.ERRORS,
        failures=(NOT_FOUND,),
    ),
    Row(
        "GET",
        "/v1/responses/{response_id}",
        responses.stored_response,
        "A stored response",
        answer=Response,
        protected=True,
        errors=responses.ERRORS,
        failures=(NOT_FOUND, VALIDATION),
    ),
    Row(
        "DELETE",
        "/v1/responses/{response_id}",
        responses.delete_response,
        "Forget a stored response",
        answer=DeletedResponse,
        protected=True,
        errors=responses.ERRORS,
        failures=(NOT_FOUND,),
    ),
    Row(
        "POST",
        "/v1/responses/{response_id}/cancel",
        responses.cancel_response,
        protected=True,
        errors=responses.ERRORS,
    ),
    Row(
        "POST",
        "/v1/messages",
        anthropic.messages,
        "Continue a conversation, as Anthropic's clients ask",
        body=MessagesRequest,
        answer=AnthropicMessage,
        event=MessageEvent,
        protected=True,
        key_header="x-api-key",
        errors=anthropic.ERRORS,
    ),
    Row(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        "Count a conversation's tokens, as Anthropic's clients ask",
        body=CountTokensRequest,
        answer=TokenCount,
        protected=True,
        key_header="x-api-key",
        errors=anthropic.ERRORS,
    ),
    Row(
        "POST",
        "/v1/embeddings",
        embeddings.embeddings,
        "Turn texts into vectors",
        body=EmbeddingsRequest,
        answer=Embeddings[Embedding],
        protected=True,
        errors=openai.ERRORS,
    ),
    Row(
        "POST",
        "/tokenize",
        native.tokenize,
        "Tokenize inputs",
        body=GenerateRequest,
        answer=list[SimpleToken],
        protected=True,
    ),
    Row(
        "POST",
        "/chat_tokenize",
        chat.chat_tokenize,
        "Template and tokenize a conversation",
        body=ChatRequest,
        answer=ChatTokenizeResponse,
        protected=True,
    ),
    Row(
        "POST",
        "/invocations",
        cloud.invocations,
        "Generate as /, /v1/chat/completions or /v1/completions do: SageMaker's one route for all of them",
        body=INVOCATION,
        span="sagemaker_compatibility",
        answer=OneOf((list[GenerateResponse], ChatCompletion, Completion)),
        event=OneOf((StreamResponse, ErrorResponse, ChatCompletionChunk, CompletionChunk, StreamError)),
        protected=True,
    ),
    Row(
        "POST",
        "/vertex",
        cloud.vertex,
        "Generate one text for each instance, as Vertex AI asks",
        body=VertexRequest,
        answer=VertexResponse,
        protected=True,
        span=_VERTEX,
    ),
    Row(
        "POST",
        f"{_MODEL}/infer",
        cloud.infer,
        "KServe: generate one output for each input",
        body=InferRequest,
        answer=InferResponse,
        protected=True,
        span="kserve_model_infer",
    ),
    Row("GET", _MODEL, cloud.model_metadata, "KServe: metadata of the model", answer=Metadata),
    Row(
        "GET",
        f"{_MODEL}/ready",
        cloud.model_ready,
        "KServe: whether the model answers",
        answer=Live,
        failures=_SICK,
    ),
    Row("GET", "/v2/health/live", cloud.live, "KServe: whether the server lives", answer=Live),
    Row("GET", "/v2/health/ready", cloud.ready, "KServe: whether the engine answers", answer=Live, failures=_SICK),
    Row("GET", "/v2", cloud.server_metadata, "KServe: metadata of the server", answer=Metadata),
    Row("GET", "/v1/models", openai.models, "The served model, as a list", answer=ModelsInfo),
    Row(
        "GET",
        "/v1/models/{id:path}",
        openai.model,
        "The served model",
        answer=ModelInfo,
        errors=openai.ERRORS,
        failures=(NOT_FOUND,),
    ),
    Row("GET", "/info", native.info, "Text Generation Inference endpoint info", answer=Info),
    Row("GET", "/health", native.health, "Whether the engine answers: 200, or 503 with an error", failures=_SICK),
    Row("GET", "/livez", native.livez, "Whether the server lives: 200, whatever the engine does"),
    Row("GET", "/readyz", native.readyz, "As /health: whether the engine answers", failures=_SICK),
    Row("GET", "/metrics", native.metrics, "Prometheus metrics scrape endpoint"),
    Row("GET", "/", native.health),
    Row("GET", "/ping", native.health),
)


def named_by_vertex(settings: Settings) -> Iterator[Row]:
    """/vertex and /health once more, where Vertex AI says that it will ask."""
    if settings.aip_predict_route is not None:
        yield Row("POST", settings.aip_predict_route, cloud.vertex, body=VertexRequest, protected=True, span=_VERTEX)
    if settings.aip_health_route is not None:
        yield Row("GET", settings.aip_health_route, native.health)
