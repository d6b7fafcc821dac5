"""What OpenAI's routes have in common, and the list of models."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import tgi
from tgi.router.call import Call, event
from tgi.router.pipeline import Run, Service
from tgi.router.wire.openai import (
    ModelInfo,
    ModelsInfo,
    OpenAIRequest,
    PromptTokensDetails,
    StreamError,
    StreamErrorBody,
    Usage,
)

FINGERPRINT = f"{tgi.__version__}-native"

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


async def models(call: Call, service: Service, _: None) -> None:
    name = service.settings.model.model_id
    await call.json(ModelsInfo("list", [ModelInfo(name, "model", 0, name)]))


def wants_usage(request: OpenAIRequest) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def usage_of(runs: Sequence[Run]) -> Usage:
    prompt = sum(len(run.generation.token_ids) for run in runs)
    completion = sum(run.tokens for run in runs)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(sum(run.cached for run in runs)))


def identity(service: Service, prefix: str) -> dict[str, Any]:
    """What every chunk of an answer repeats."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.settings.model.model_id,
        "system_fingerprint": FINGERPRINT,
    }


def fail_with(service: Service) -> Callable[[Exception], bytes]:
    """The last events of a stream that fails."""

    def fail(error: Exception) -> bytes:
        judged = service.judge(error)
        return event(StreamError(StreamErrorBody(judged.message, judged.kind.status))) + DONE

    return fail
