"""What OpenAI's routes have in common, and the list of models."""

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tgi
from tgi.core.errors import NOT_FOUND, RequestError
from tgi.router.call import Call, ErrorStyle, event
from tgi.router.dialects import native
from tgi.router.pipeline import Run, Service
from tgi.router.wire.base import ErrorResponse, OneOf, Unreadable
from tgi.router.wire.openai import (
    CompletionTokensDetails,
    ModelInfo,
    ModelsInfo,
    OpenAIError,
    OpenAIErrorBody,
    OpenAIRequest,
    PromptTokensDetails,
    StreamError,
    StreamErrorBody,
    Usage,
)

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def is_openais(call: Call) -> bool:
    """Whether OpenAI's own library calls, which can't read TGI's words where they differ from OpenAI's."""
    return b"openai/" in call.header(b"user-agent").lower()


def error_of(status: int, message: str) -> OpenAIError:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return OpenAIError(OpenAIErrorBody(message=message, type=kind, code=_ERROR_CODES.get(status)))


_ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


async def _tell(call: Call, error: RequestError | Unreadable) -> None:
    if is_openais(call):
        await call.json(error_of(error.status, error.message), status=error.status)
    else:
        await native.ERRORS.answer(call, error)


ERRORS = ErrorStyle(_tell, OneOf((ErrorResponse, OpenAIError)), plain=True)
"""TGI's, but for OpenAI's library: it shows its user only the message that it finds in OpenAI's place."""


async def models(call: Call, service: Service, _: None) -> None:
    await call.json(ModelsInfo("list", [_served(service)]))


async def model(call: Call, service: Service, _: None) -> None:
    served, name = _served(service), call.path["id"]
    if name != served.id:
        raise RequestError(NOT_FOUND, f"The model `{name}` does not exist")
    await call.json(served)


def _served(service: Service) -> ModelInfo:
    """As old as its files are on this machine."""
    model = service.settings.model
    created = (Path(model.folder) / "tokenizer.json").stat().st_mtime
    return ModelInfo(model.model_id, "model", int(created), model.model_id)


def wants_usage(request: OpenAIRequest) -> bool:
    """At the end of a stream."""
    return bool(request.stream_options and request.stream_options.include_usage)


def wants_continuous_usage(request: OpenAIRequest) -> bool:
    """On each chunk of a stream."""
    return bool(request.stream_options and request.stream_options.continuous_usage_stats)


def usage_of(runs: Sequence[Run], choices: int = 1, reasoning: int = 0) -> Usage:
    """So far, of all runs. Each ``choices`` of them in a row have one prompt, which counts once. ``reasoning``: how
    many of their tokens were that."""
    firsts = runs[::choices]
    prompt = sum(len(run.generation.token_ids) for run in firsts)
    completion = sum(run.tokens for run in runs)
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptTokensDetails(sum(run.cached for run in firsts)),
        CompletionTokensDetails(reasoning),
    )


def identity(service: Service, prefix: str) -> dict[str, Any]:
    """What every chunk of an answer repeats."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.settings.model.model_id,
        "system_fingerprint": f"{tgi.__version__}-{service.settings.docker_label or 'native'}",
    }


def fail_with(service: Service) -> Callable[[Exception], bytes]:
    """The last events of a stream that fails."""

    def fail(error: Exception) -> bytes:
        judged = service.judge(error)
        return event(StreamError(StreamErrorBody(judged.message, judged.kind.status))) + DONE

    return fail
