"""Clouds: SageMaker's /invocations, Vertex AI's predictions, and the KServe v2 protocol as TGI speaks it.

None has a way to generate of its own: they hand requests to the native and the OpenAI routes and wrap what these say.
"""

from functools import partial

import tgi
from tgi.core.config import Limits
from tgi.core.errors import BATCH_SIZE, LENGTH_MISMATCH, NO_INSTANCES, UNHEALTHY, UTF8, RequestError
from tgi.router.call import Call
from tgi.router.conversation import converse
from tgi.router.dialects import native
from tgi.router.dialects.chat import chat
from tgi.router.dialects.completions import completions
from tgi.router.pipeline import Service, together
from tgi.router.validate import invalid
from tgi.router.wire.base import decode_one
from tgi.router.wire.cloud import (
    INSTANCE,
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    Live,
    Metadata,
    VertexRequest,
    VertexResponse,
)
from tgi.router.wire.native import CompatGenerateRequest, GenerateRequest
from tgi.router.wire.openai import ChatRequest, CompletionRequest

# --- SageMaker -------------------------------------------------------------------------------------------------------


async def invocations(
    call: Call, service: Service, request: CompatGenerateRequest | ChatRequest | CompletionRequest
) -> None:
    match request:
        case CompatGenerateRequest():
            await native.compat(call, service, request)
        case ChatRequest():
            await chat(call, service, request)
        case CompletionRequest():
            await completions(call, service, request)


# --- Vertex AI -------------------------------------------------------------------------------------------------------


async def vertex(call: Call, service: Service, request: VertexRequest) -> None:
    if not request.instances:
        raise RequestError(NO_INSTANCES)
    _check_count(len(request.instances), service.settings.limits)
    instances = [decode_one(bytes(raw), INSTANCE, f"instances[{i}]") for i, raw in enumerate(request.instances)]
    await call.json(VertexResponse(await together(_predict(call, service, instance) for instance in instances)))


async def _predict(call: Call, service: Service, instance: GenerateRequest | ChatRequest) -> str:
    """One text, as the model writes it: a prediction has no room for events, several choices, tool calls and reasoning
    apart from the text."""
    if isinstance(instance, GenerateRequest):
        return await _generate(call, service, instance)
    if instance.n not in (None, 1):
        raise invalid("`n` must be 1 in an instance: it gets one prediction")
    if instance.include_reasoning is False and instance.tools:
        raise invalid("`include_reasoning: false` is not supported with `tools` in an instance")
    async with converse(service, instance, call.arrived) as conversation:
        (reply,) = await conversation.replies()
        return reply.text if instance.include_reasoning is False else reply.run.text


async def _generate(call: Call, service: Service, request: GenerateRequest) -> str:
    best, *_ = await native.answers_to(call, service, request)
    return native.whole_text(request, best.run, full_text=False)


def _check_count(count: int, limits: Limits) -> None:
    """More than may run at once could never be answered."""
    if count > limits.max_concurrent_requests:
        raise RequestError(BATCH_SIZE, str(limits.max_concurrent_requests))


# --- KServe ----------------------------------------------------------------------------------------------------------


async def infer(call: Call, service: Service, request: InferRequest) -> None:
    if len(request.inputs) != len(request.outputs):
        raise RequestError(LENGTH_MISMATCH)
    _check_count(len(request.inputs), service.settings.limits)
    requests = [GenerateRequest(inputs=_text(tensor), parameters=request.parameters) for tensor in request.inputs]
    texts = await together(map(partial(_generate, call, service), requests))
    outputs = []
    for wanted, text in zip(request.outputs, texts, strict=True):
        data = text.encode()
        outputs.append(InferOutput(name=wanted.name, shape=(1, len(data)), data=list(data)))
    await call.json(InferResponse(request.id, outputs))


def _text(tensor: InferInput) -> str:
    try:
        return bytes(tensor.data).decode()
    except UnicodeDecodeError as error:
        length, start = error.end - error.start, error.start
        raise RequestError(UTF8, f"invalid utf-8 sequence of {length} bytes from index {start}") from None


async def server_metadata(call: Call, service: Service, _: None) -> None:
    await call.json(Metadata("text-generation-inference", tgi.__version__, ["health", "models", "metrics"]))


async def model_metadata(call: Call, service: Service, _: None) -> None:
    """Any name and version: one model is served."""
    await call.json(Metadata(call.path["model_name"], call.path["model_version"], ["infer", "ready"]))


async def live(call: Call, service: Service, _: None) -> None:
    await call.json(Live(True))


async def ready(call: Call, service: Service, _: None) -> None:
    if not await service.client.healthy():
        raise RequestError(UNHEALTHY)
    await call.json(Live(True))


async def model_ready(call: Call, service: Service, _: None) -> None:
    await ready(call, service, None)
