"""OpenAI's embeddings: texts as vectors, pooled from the served model's last hidden states."""

import asyncio
import math
import struct
from collections.abc import Sequence

import msgspec
from msgspec import Raw

from tgi.router.call import Call
from tgi.router.pipeline import Run, Service, together
from tgi.router.validate import invalid
from tgi.router.wire.embeddings import Embedding, Embeddings, EmbeddingsRequest, EmbeddingsUsage
from tgi.router.wire.native import GenerateParameters

MAX_INPUTS = 2048
"""OpenAI's own bound; client libraries send up to it."""


async def embeddings(call: Call, service: Service, request: EmbeddingsRequest) -> None:
    """``max_client_batch_size`` inputs of one call are with the engine at a time, each with a permit."""
    limits, prompts = service.settings.limits, _prompts(request)
    service.metrics.arrived(len(prompts))
    if not 0 < len(prompts) <= MAX_INPUTS:
        raise invalid(f"`input` must have between 1 and {MAX_INPUTS} items. Given: {len(prompts)}")
    parameters = _parameters(request, limits.max_input_tokens)
    at_once = min(len(prompts), limits.max_client_batch_size, limits.max_concurrent_requests)
    places = asyncio.Semaphore(at_once)

    async def embed(index: int, prompt: str | Sequence[int]) -> tuple[Raw, int]:
        """The answer's item and the number of tokens."""
        async with places:
            generation = await service.validator.validate(prompt, parameters, generates=False)
            async with Run(service, generation, call.arrived, pooling=request.pooling or "mean") as run:
                await run.follow(lambda _: None)
        if request.dimensions not in (None, len(run.embedding)):
            raise invalid(f"`dimensions` must be {len(run.embedding)}, the model's own. Given: {request.dimensions}")
        item = Embedding(index=index, embedding=_encode(run.embedding, request))
        # As JSON at once: the numbers of thousands of vectors would take much memory, and their writing the event loop.
        return Raw(msgspec.json.encode(item)), len(generation.token_ids)

    with service.permits.take(at_once):
        done = await together(embed(*prompt) for prompt in enumerate(prompts))
    tokens = sum(count for _, count in done)
    answer = Embeddings(
        data=[item for item, _ in done],
        model=service.settings.model.model_id,
        usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )
    await call.json(answer, {"x-compute-type": service.settings.compute_type, "x-prompt-tokens": str(tokens)})


def _prompts(request: EmbeddingsRequest) -> Sequence[str | Sequence[int]]:
    if isinstance(request.input, str):
        return [request.input]
    ids = [item for item in request.input if isinstance(item, int)]
    prompts = [item for item in request.input if not isinstance(item, int)]
    if ids and prompts:
        raise invalid("`input` must be all token ids, or have none beside texts and lists of token ids")
    return [ids] if ids else prompts


def _parameters(request: EmbeddingsRequest, longest: int) -> GenerateParameters:
    truncate = request.truncate_prompt_tokens
    if truncate is not None and not 0 < truncate <= longest:
        raise invalid(f"`truncate_prompt_tokens` must be > 0 and <= {longest}. Given: {truncate}")
    return GenerateParameters(
        truncate=truncate,
        add_special_tokens=request.add_special_tokens is not False,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )


def _encode(vector: Sequence[float], request: EmbeddingsRequest) -> list[float] | bytes:
    """Scaled to length 1. A vector of zeros stays one."""
    length = math.hypot(*vector) or 1.0
    if request.encoding_format == "base64":
        return struct.pack(f"<{len(vector)}f", *(x / length for x in vector))
    # A float32 has no more digits.
    return [round(x / length, 9) for x in vector]
