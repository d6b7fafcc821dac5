"""OpenAI's legacy completions: one or several texts that are gone on with."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack

from msgspec import UNSET

from tgi.core.errors import BATCH_SIZE, SUFFIX, RequestError
from tgi.router import headers
from tgi.router.call import Call, event
from tgi.router.conversation import FINISH, is_greedy, refuse_unsupported, to_parameters
from tgi.router.dialects.openai import DONE, fail_with, identity, usage_of, wants_usage
from tgi.router.pipeline import Run, Service, collect, interleave
from tgi.router.validate import invalid, refuse
from tgi.router.wire.openai import Completion, CompletionChoice, CompletionRequest


async def completions(call: Call, service: Service, request: CompletionRequest) -> None:
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    most = service.settings.limits.max_client_batch_size
    service.metrics.arrived(len(prompts))
    if request.suffix is not None:
        raise RequestError(SUFFIX)
    if len(prompts) > most:
        raise RequestError(BATCH_SIZE, str(most))
    refuse_unsupported(request)
    refuse(request, {"n": (None, 1), "best_of": (None, 1), "echo": (None, False), "logprobs": (None,)})
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        raise invalid("prompts of token ids are not supported")
    parameters = to_parameters(request, request.max_tokens)
    compute_type = service.settings.compute_type
    with service.permits.take(len(prompts)):
        generations = [await service.validator.validate(text, parameters, greedy=is_greedy(request)) for text in texts]
        runs = [Run(service, generation, call.arrived) for generation in generations]
        if request.stream:
            async with AsyncExitStack() as stack:
                for run in runs:
                    await stack.enter_async_context(run)
                fields = headers.of_stream(compute_type, texts)
                await call.stream(_events(service, request, runs), fields, fail_with(service))
        else:
            await collect(runs)
            response = Completion(
                **identity(service, "cmpl"),
                choices=[
                    CompletionChoice(index, run.text, None, FINISH[run.finish] if run.finish else None)
                    for index, run in enumerate(runs)
                ],
                usage=usage_of(runs),
            )
            await call.json(response, headers.of_answer(compute_type, runs, compute_time=False))


async def _events(service: Service, request: CompletionRequest, runs: Sequence[Run]) -> AsyncGenerator[bytes, None]:
    """With ``include_usage`` one sum at the end, as OpenAI; without, each prompt's own on its last chunk, as TGI."""
    common, usage_at_end = identity(service, "cmpl"), wants_usage(request)
    async for index, piece in interleave(runs):
        choice = CompletionChoice(index, piece.text, None, FINISH[piece.finish] if piece.finish else None)
        usage = None if usage_at_end else usage_of([runs[index]]) if piece.finish else UNSET
        yield event(Completion(**common, choices=[choice], usage=usage))
    if usage_at_end:
        yield event(Completion(**common, choices=[], usage=usage_of(runs)))
    yield DONE
