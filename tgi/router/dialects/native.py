"""TGI's own routes: generate, stream, tokenize, and what tells about the server."""

from msgspec import UNSET
from msgspec.structs import replace

import tgi
from tgi.core.errors import UNAUTHORIZED, UNHEALTHY, RequestError
from tgi.router import headers
from tgi.router.call import Call, ErrorStyle, event
from tgi.router.metrics import CONTENT_TYPE
from tgi.router.pipeline import Answer, Piece, Run, Service, collect
from tgi.router.wire.base import ErrorResponse, Unreadable
from tgi.router.wire.native import (
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    GenerateRequest,
    GenerateResponse,
    Info,
    PrefillToken,
    SimpleToken,
    StreamDetails,
    StreamResponse,
)


async def _tell(call: Call, error: RequestError | Unreadable) -> None:
    if isinstance(error, Unreadable):
        await call.answer(error.status, error.message.encode(), "text/plain; charset=utf-8")
    elif error.kind is UNAUTHORIZED:
        await call.answer(error.status)
    else:
        await call.json(error.body, status=error.status)


ERRORS = ErrorStyle(_tell, ErrorResponse, plain=True)
"""As TGI, on every route that has no style of its own."""


async def compat(call: Call, service: Service, request: CompatGenerateRequest) -> None:
    # The hub's text-generation pipeline returns the full text; a model without a tag is taken for one.
    full_text = service.settings.model.pipeline_tag in (None, "text-generation")
    if request.stream:
        await _stream(call, service, request, full_text)
    else:
        answers = await answers_to(call, service, request)
        response = [_response(service, request, answers, full_text)]
        await call.json(response, headers.of_answer(service.settings.compute_type, [answers[0].run]))


async def generate(call: Call, service: Service, request: GenerateRequest) -> None:
    answers = await answers_to(call, service, request)
    response = _response(service, request, answers, full_text=False)
    await call.json(response, headers.of_answer(service.settings.compute_type, [answers[0].run]))


async def generate_stream(call: Call, service: Service, request: GenerateRequest) -> None:
    await _stream(call, service, request, full_text=False)


async def tokenize(call: Call, service: Service, request: GenerateRequest) -> None:
    """The tokens that the model would see."""
    parameters = request.parameters
    service.validator.check_truncate(parameters.truncate)
    spans = await service.validator.spans(request.inputs, add_special_tokens=parameters.add_special_tokens)
    seen = spans if parameters.truncate is None else spans[-parameters.truncate :]
    await call.json([SimpleToken(*span) for span in seen])


async def health(call: Call, service: Service, _: None) -> None:
    """Healthy is an engine whose step loop answers, not one whose socket is open."""
    if not await service.client.healthy():
        error = RequestError(UNHEALTHY)
        await call.json(error.body, status=error.kind.status)
    else:
        await call.answer(200)


async def readyz(call: Call, service: Service, _: None) -> None:
    await health(call, service, None)


async def livez(call: Call, service: Service, _: None) -> None:
    """The router is there to answer. Who restarts what isn't alive must not do so because the engine is loading."""
    await call.answer(200)


async def info(call: Call, service: Service, _: None) -> None:
    settings, limits = service.settings, service.settings.limits
    answer = Info(
        model_id=settings.model.model_id,
        model_sha=settings.model.sha,
        model_pipeline_tag=settings.model.pipeline_tag,
        max_concurrent_requests=limits.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=limits.validation_workers,
        max_client_batch_size=limits.max_client_batch_size,
        router="text-generation-router",
        version=tgi.__version__,
        sha=settings.git_sha,
        docker_label=settings.docker_label,
        device=settings.device,
        dtype=settings.dtype,
        max_batch_prefill_tokens=limits.max_batch_prefill_tokens,
        max_batch_total_tokens=limits.max_batch_total_tokens,
        memory=settings.ledger,
        implementation=service.client.implementation,
    )
    await call.json(answer)


async def metrics(call: Call, service: Service, _: None) -> None:
    await call.answer(200, service.metrics.expose(service.client.queued_anywhere), CONTENT_TYPE)


async def answers_to(call: Call, service: Service, request: GenerateRequest) -> list[Answer]:
    """The answers, best first; one unless ``best_of`` asks for more."""
    parameters = request.parameters
    service.metrics.arrived()
    service.validator.check_best_of(parameters)
    best_of = parameters.best_of or 1
    with service.permits.take(best_of):
        generation = await service.validator.validate(request.inputs, parameters)
        runs = [Run(service, generation.choice(i), call.arrived, counts=i == 0) for i in range(best_of)]
        answers = await collect(runs)
    best = max(answers, key=lambda answer: answer.mean_logprob)
    return [best, *(answer for answer in answers if answer is not best)]


async def _stream(call: Call, service: Service, request: GenerateRequest, full_text: bool) -> None:
    """Always status 200: on native streams even a request that can't run is told so by an event."""

    def fail(error: Exception) -> bytes:
        return event(service.judge(error).body)

    fields, parameters = headers.of_stream(service.settings.compute_type, [request.inputs]), request.parameters
    async with call.stream(fields, fail) as say:
        service.metrics.arrived()
        service.validator.check_stream(parameters)
        with service.permits.take():
            generation = await service.validator.validate(request.inputs, parameters)
            async with Run(service, generation, call.arrived) as run:

                def tell(piece: Piece) -> None:
                    text, details = None, None
                    if piece.finish is not None:
                        text = whole_text(request, run, full_text)
                        if parameters.details:
                            given = len(generation.token_ids)
                            details = StreamDetails(piece.finish, run.tokens, generation.seed, given)
                    say(event(StreamResponse(run.tokens, piece.token, piece.top or UNSET, text, details)))

                await run.follow(tell)


def whole_text(request: GenerateRequest, run: Run, full_text: bool) -> str:
    wanted = request.parameters.return_full_text
    return request.inputs + run.text if (full_text if wanted is None else wanted) else run.text


def _response(service: Service, request: GenerateRequest, answers: list[Answer], full_text: bool) -> GenerateResponse:
    best, *others = answers
    text = whole_text(request, best.run, full_text)
    if not (request.parameters.details or request.parameters.decoder_input_details):
        return GenerateResponse(text)
    details = _details(service, best)
    if others:
        details = replace(details, best_of_sequences=[_loser(service, request, answer, full_text) for answer in others])
    return GenerateResponse(text, details)


def _details(service: Service, answer: Answer) -> Details:
    run, generation = answer.run, answer.run.generation
    prefill: list[PrefillToken] = []
    if generation.prompt_logprobs:
        logprobs = [None, *(token.logprob for token in run.prompt)]  # nothing precedes the first token
        prefill = [
            PrefillToken(id, service.tokenizer.piece(id), logprob)
            for id, logprob in zip(generation.token_ids, logprobs, strict=True)
        ]
    assert run.finish is not None
    return Details(
        finish_reason=run.finish,
        generated_tokens=run.tokens,
        seed=generation.seed,
        prefill=prefill,
        tokens=[piece.token for piece in answer.pieces],
        top_tokens=[piece.top for piece in answer.pieces] if generation.sampling.top_n_tokens else UNSET,
    )


def _loser(service: Service, request: GenerateRequest, answer: Answer, full_text: bool) -> BestOfSequence:
    details = _details(service, answer)
    return BestOfSequence(
        generated_text=whole_text(request, answer.run, full_text),
        finish_reason=details.finish_reason,
        generated_tokens=details.generated_tokens,
        seed=details.seed,
        prefill=details.prefill,
        tokens=details.tokens,
        top_tokens=details.top_tokens,
    )
