"""OpenAI's routes: chat and text completions. Wishes become TGI's parameters; answers take OpenAI's shapes."""

import functools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from msgspec import UNSET

import tgi
from tgi.core.errors import BATCH_SIZE, SUFFIX, RequestError
from tgi.router import headers
from tgi.router.call import Call, event
from tgi.router.pipeline import Piece, Run, Service, collect, interleave
from tgi.router.schema import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionChunk,
    ChatCompletionComplete,
    ChatCompletionDelta,
    ChatCompletionLogprob,
    ChatCompletionLogprobs,
    ChatCompletionTopLogprob,
    ChatRequest,
    ChatTokenizeResponse,
    Chunk,
    CompletionChoice,
    CompletionComplete,
    CompletionFinal,
    CompletionRequest,
    FinishReason,
    GenerateParameters,
    ImagePart,
    Message,
    ModelInfo,
    ModelsInfo,
    OpenAIFinishReason,
    OpenAIRequest,
    SimpleToken,
    StreamError,
    StreamErrorBody,
    TextMessage,
    Token,
    Usage,
)
from tgi.router.validate import invalid, refuse

FINGERPRINT = f"{tgi.__version__}-native"

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""

FINISH: dict[FinishReason, OpenAIFinishReason] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
    "watermark": (None, False),
    "grammar": (None,),
    "adapter_id": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
}
_CHAT_NEUTRAL = _NEUTRAL | {
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none"),
    "chat_template": (None,),
}
_COMPLETION_NEUTRAL = _NEUTRAL | {"echo": (None, False), "logprobs": (None,)}

_TEMPLATE_OWN = {
    "add_generation_prompt",
    "bos_token",
    "continue_final_message",
    "documents",
    "eos_token",
    "messages",
    "self",
    "tools",
}
"""What ``chat_template_kwargs`` must not set."""


async def models(call: Call, service: Service, _: None) -> None:
    name = service.settings.model.model_id
    await call.json(ModelsInfo("list", [ModelInfo(name, "model", 0, name)]))


async def chat_tokenize(call: Call, service: Service, request: ChatRequest) -> None:
    _refuse_chat(request)
    text = await _prompt(service, request)
    spans = await service.validator.spans(text, add_special_tokens=False)
    await call.json(ChatTokenizeResponse([SimpleToken(*span) for span in spans], text))


async def chat(call: Call, service: Service, request: ChatRequest) -> None:
    service.metrics.arrived()
    _refuse_chat(request)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    parameters = _parameters(request, max_tokens, request.top_logprobs if request.logprobs else None)
    compute_type = service.settings.compute_type
    with service.permits.take():
        prompt = await _prompt(service, request)
        generation = await service.validator.validate(
            prompt, parameters, add_special_tokens=False, greedy=_is_greedy(request)
        )
        run = Run(service, generation, call.arrived, keep_stop=False)
        if request.stream:
            async with run:
                fields = headers.of_stream(compute_type, [generation.text])
                await call.stream(_chat_events(service, request, run), fields, _fail(service))
        else:
            [answer] = await collect([run])
            response = ChatCompletion(
                **_identity(service, "chatcmpl"),
                choices=[
                    ChatCompletionComplete(
                        0,
                        TextMessage("assistant", run.text),
                        _logprobs(service, answer.pieces) if request.logprobs else None,
                        _finish(run),
                    )
                ],
                usage=_usage([run]),
            )
            await call.json(response, headers.of_answer(compute_type, [run]))


async def completions(call: Call, service: Service, request: CompletionRequest) -> None:
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    most = service.settings.limits.max_client_batch_size
    service.metrics.arrived(len(prompts))
    if request.suffix is not None:
        raise RequestError(SUFFIX)
    if len(prompts) > most:
        raise RequestError(BATCH_SIZE, str(most))
    refuse(request, _COMPLETION_NEUTRAL)
    parameters = _parameters(request, request.max_tokens)
    compute_type = service.settings.compute_type
    with service.permits.take(len(prompts)):
        generations = [
            await service.validator.validate(prompt, parameters, greedy=_is_greedy(request)) for prompt in prompts
        ]
        runs = [Run(service, generation, call.arrived, keep_stop=False) for generation in generations]
        if request.stream:
            async with AsyncExitStack() as stack:
                for run in runs:
                    await stack.enter_async_context(run)
                fields = headers.of_stream(compute_type, prompts)
                await call.stream(_completion_events(service, request, runs), fields, _fail(service))
        else:
            await collect(runs)
            response = CompletionFinal(
                **_identity(service, "cmpl"),
                choices=[CompletionComplete(index, run.text, None, _finish(run)) for index, run in enumerate(runs)],
                usage=_usage(runs),
            )
            await call.json(response, headers.of_answer(compute_type, runs, compute_time=False))


async def _chat_events(service: Service, request: ChatRequest, run: Run) -> AsyncGenerator[bytes, None]:
    identity = _identity(service, "chatcmpl")
    async for piece in run:
        choice = ChatCompletionChoice(
            0,
            ChatCompletionDelta("assistant", piece.text),
            _logprobs(service, [piece]) if request.logprobs else None,
            FINISH[piece.finish] if piece.finish else None,
        )
        yield event(ChatCompletionChunk(**identity, choices=[choice]))
    if _wants_usage(request):
        yield event(ChatCompletionChunk(**identity, choices=[], usage=_usage([run])))
    yield DONE


async def _completion_events(
    service: Service, request: CompletionRequest, runs: Sequence[Run]
) -> AsyncGenerator[bytes, None]:
    """With ``include_usage`` one sum at the end, as OpenAI; without, each prompt's own on its last chunk, as TGI."""
    identity, usage_at_end = _identity(service, "cmpl"), _wants_usage(request)
    async for index, piece in interleave(runs):
        choice = CompletionChoice(index, piece.text, None, FINISH[piece.finish] if piece.finish else None)
        usage = None if usage_at_end else _usage([runs[index]]) if piece.finish else UNSET
        yield event(Chunk(**identity, choices=[choice], usage=usage))
    if usage_at_end:
        yield event(Chunk(**identity, choices=[], usage=_usage(runs)))
    yield DONE


def _refuse_chat(request: ChatRequest) -> None:
    refuse(request, _CHAT_NEUTRAL)
    if request.tools and request.tool_choice != "none":
        raise invalid("`tools` is not supported")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("`max_tokens` and `max_completion_tokens` must not both be set")


def _is_greedy(request: OpenAIRequest) -> bool:
    return request.temperature == 0 or request.top_p == 0


def _parameters(request: OpenAIRequest, max_tokens: int | None, top_logprobs: int | None = None) -> GenerateParameters:
    """In TGI's terms. OpenAI samples unless told not to; its ``top_p`` includes both ends: 0 is greedy, 1 is off."""
    if request.top_p is not None and not 0 <= request.top_p <= 1:
        raise invalid("`top_p` must be >= 0.0 and <= 1.0")
    logit_bias = request.logit_bias or None
    if isinstance(logit_bias, list):
        raise invalid("`logit_bias` as a list is not supported: send an object of token ids and biases")
    return GenerateParameters(
        do_sample=True,
        temperature=request.temperature or None,
        top_p=None if request.top_p in (0, 1) else request.top_p,
        top_k=request.top_k,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=logit_bias,
        max_new_tokens=max_tokens,
        ignore_eos=request.ignore_eos,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        seed=request.seed,
        top_n_tokens=top_logprobs,
    )


async def _prompt(service: Service, request: ChatRequest) -> str:
    """The conversation as the model's template writes it. A last message by the assistant is gone on with."""
    variables = request.chat_template_kwargs or {}
    for name in variables.keys() & _TEMPLATE_OWN:
        raise invalid(f"`chat_template_kwargs` must not set `{name}`")
    last = request.messages[-1] if request.messages else None
    goes_on = request.continue_final_message
    if goes_on is None:
        goes_on = last is not None and last.role == "assistant" and last.content is not None
    render = functools.partial(
        service.template.render,
        [_as_template_reads(message) for message in request.messages],
        add_generation_prompt=not goes_on if request.add_generation_prompt is None else request.add_generation_prompt,
        continue_final_message=goes_on,
        **variables,
    )
    # A message costs a template about as much as some tens of characters cost the tokenizer.
    return await service.validator.apart(render, sum(64 + len(message.content or "") for message in request.messages))


def _as_template_reads(message: Message) -> dict[str, Any]:
    if not isinstance(message.content, str) and any(isinstance(part, ImagePart) for part in message.content or []):
        raise invalid("`image_url` content is not supported")
    try:
        plain: dict[str, Any] = msgspec.to_builtins(message)
        for call in plain["tool_calls"] or []:
            # OpenAI sends JSON in a string; templates write the object out themselves.
            call["function"]["arguments"] = _unpacked(call["function"]["arguments"])
    except RecursionError:
        raise invalid("the arguments of `tool_calls` are nested too deeply") from None
    return plain


def _unpacked(arguments: Any) -> Any:
    try:
        return msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except msgspec.DecodeError:
        return arguments


def _logprobs(service: Service, pieces: Sequence[Piece]) -> ChatCompletionLogprobs:
    def entry(token: Token) -> tuple[str, float, list[int]]:
        data = service.tokenizer.token_bytes(token.id)
        return data.decode(errors="replace"), token.logprob, list(data)

    return ChatCompletionLogprobs(
        [
            ChatCompletionLogprob(
                *entry(piece.token), top_logprobs=[ChatCompletionTopLogprob(*entry(token)) for token in piece.top]
            )
            for piece in pieces
        ]
    )


def _wants_usage(request: OpenAIRequest) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def _finish(run: Run) -> OpenAIFinishReason:
    assert run.finish is not None
    return FINISH[run.finish]


def _usage(runs: Sequence[Run]) -> Usage:
    prompt = sum(len(run.generation.token_ids) for run in runs)
    completion = sum(run.tokens for run in runs)
    return Usage(prompt, completion, prompt + completion)


def _identity(service: Service, prefix: str) -> dict[str, Any]:
    """What every chunk of an answer repeats."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.settings.model.model_id,
        "system_fingerprint": FINGERPRINT,
    }


def _fail(service: Service) -> Callable[[Exception], bytes]:
    def fail(error: Exception) -> bytes:
        judged = service.judge(error)
        return event(StreamError(StreamErrorBody(judged.message, judged.kind.status))) + DONE

    return fail
