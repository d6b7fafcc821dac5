"""The table of routes: what each takes, who answers it, what it returns, and whether a key is needed."""

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from tgi.router.call import Call
from tgi.router.dialects import chat, completions, native, openai
from tgi.router.pipeline import Service
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
    CompletionRequest,
    ModelsInfo,
)


class Row(NamedTuple):
    method: str
    path: str
    handler: Callable[[Call, Service, Any], Coroutine[Any, Any, None]]
    summary: str | None = None
    """None keeps the route out of the OpenAPI document."""
    body: Any = None
    """The JSON type it takes."""
    answer: Any = None
    """The JSON type it returns, if it returns JSON."""
    event: Any = None
    """The JSON type of its events, if it streams."""
    protected: bool = False
    """Needs the API key, if the server has one."""


ROUTES = (
    Row(
        "POST",
        "/",
        native.compat,
        "Generate tokens if `stream == false` or a stream of tokens if `stream == true`",
        body=CompatGenerateRequest,
        answer=list[GenerateResponse],
        event=StreamResponse,
        protected=True,
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
        event=StreamResponse,
        protected=True,
    ),
    Row(
        "POST",
        "/v1/chat/completions",
        chat.chat,
        "Continue a conversation",
        body=ChatRequest,
        answer=ChatCompletion,
        event=ChatCompletionChunk,
        protected=True,
    ),
    Row(
        "POST",
        "/v1/completions",
        completions.completions,
        "Continue one or several texts",
        body=CompletionRequest,
        answer=Completion,
        event=Completion,
        protected=True,
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
    Row("GET", "/v1/models", openai.models, "The served model", answer=ModelsInfo),
    Row("GET", "/info", native.info, "Text Generation Inference endpoint info", answer=Info),
    Row("GET", "/health", native.health, "Whether the engine answers: 200, or 503 with an error"),
    Row("GET", "/metrics", native.metrics, "Prometheus metrics scrape endpoint"),
    Row("GET", "/", native.health),
    Row("GET", "/ping", native.health),
)
