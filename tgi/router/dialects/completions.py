"""OpenAI's legacy completions: one or several texts that are gone on with, each in one or several ways."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack

from msgspec import UNSET
from msgspec.structs import replace

from tgi.core.errors import BATCH_SIZE, SUFFIX, RequestError
from tgi.router import headers
from tgi.router.call import Call, event
from tgi.router.conversation import FINISH
from tgi.router.dialects.openai import DONE, fail_with, identity, usage_of, wants_continuous_usage, wants_usage
from tgi.router.pipeline import Answer, Piece, Run, Service, collect, follow_all
from tgi.router.prompt import is_greedy, to_parameters
from tgi.router.stream import Detokenizer
from tgi.router.validate import Generation, invalid, refuse
from tgi.router.wire.native import FinishReason
from tgi.router.wire.openai import Completion, CompletionChoice, CompletionChunk, CompletionLogprobs, CompletionRequest

_Row = tuple[str, float | None, dict[str, float] | None, int]
"""Of CompletionLogprobs."""


async def completions(call: Call, service: Service, request: CompletionRequest) -> None:
    prompts = request.prompts
    most = service.settings.limits.max_client_batch_size
    service.metrics.arrived(len(prompts))
    if request.suffix is not None:
        raise RequestError(SUFFIX)
    if len(prompts) > most:
        raise RequestError(BATCH_SIZE, str(most))
    refuse(request)
    service.validator.check_choices(request.n, request.best_of)
    candidates = request.best_of or request.n or 1
    if request.stream and candidates > (request.n or 1):
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    service.metrics.arrived(len(prompts) * (candidates - 1))
    compute_type = service.settings.compute_type
    with service.permits.take(len(prompts) * candidates):
        generations = [await _judged(service, request, prompt) for prompt in prompts]
        runs = [
            Run(service, generation.choice(index), call.arrived)
            for generation in generations
            for index in range(candidates)
        ]
        if request.stream:
            async with AsyncExitStack() as stack:
                for run in runs:
                    await stack.enter_async_context(run)
                fields = headers.of_stream(compute_type, [generation.text for generation in generations])
                async with call.stream(fields, fail_with(service)) as say:
                    await _stream(service, request, runs, candidates, say)
        else:
            answers = await collect(runs)
            response = Completion(
                **identity(service, "cmpl"),
                choices=[
                    _choice(service, request, index, answer)
                    for index, answer in enumerate(_likeliest(answers, candidates, request.n or 1))
                ],
                usage=usage_of(runs, candidates),
            )
            await call.json(response, headers.of_answer(compute_type, runs, candidates, compute_time=False))


async def _judged(service: Service, request: CompletionRequest, prompt: str | list[int]) -> Generation:
    parameters = replace(
        to_parameters(request, request.max_tokens, request.logprobs),
        decoder_input_details=bool(request.echo) and request.logprobs is not None,
    )
    generates = not (request.echo and request.max_tokens == 0)
    return await service.validator.validate(prompt, parameters, greedy=is_greedy(request), generates=generates)


def _likeliest(answers: Sequence[Answer], candidates: int, n: int) -> Iterable[Answer]:
    """The ``n`` likeliest of each prompt's ``candidates``, prompt by prompt."""
    for start in range(0, len(answers), candidates):
        own = answers[start : start + candidates]
        yield from own if n == candidates else sorted(own, key=lambda answer: -answer.mean_logprob)[:n]


def _choice(service: Service, request: CompletionRequest, index: int, answer: Answer) -> CompletionChoice:
    run, scribe = answer.run, _Scribe(service, request, answer.run)
    text = run.generation.text + run.text if request.echo else run.text
    logprobs = scribe.write(answer.pieces, prompt=request.echo or False)
    return CompletionChoice(index, text, logprobs, FINISH[run.finish] if run.finish else None)


async def _stream(
    service: Service, request: CompletionRequest, runs: Sequence[Run], choices: int, say: Callable[[bytes], None]
) -> None:
    """With ``include_usage`` one sum at the end, as OpenAI; without, each choice's own on its last chunk, as TGI."""
    common, scribes = identity(service, "cmpl"), [_Scribe(service, request, run) for run in runs]
    usage_at_end, continuous = wants_usage(request), wants_continuous_usage(request)

    def chunk(index: int, text: str, logprobs: CompletionLogprobs | None, finish: FinishReason | None) -> None:
        choice = CompletionChoice(index, text, logprobs, FINISH[finish] if finish else None)
        if finish is not None and not (usage_at_end or continuous):
            say(event(Completion(**common, choices=[choice], usage=usage_of([runs[index]]))))
            return
        usage = usage_of(runs, choices) if continuous else None if usage_at_end else UNSET
        say(event(CompletionChunk(**common, choices=[choice], usage=usage)))

    def echo(index: int) -> None:
        run = runs[index]
        finish = run.finish if run.tokens == 0 else None
        chunk(index, run.generation.text, scribes[index].write([], prompt=True), finish)

    unspoken = set(range(len(runs))) if request.echo else set[int]()

    def hear(index: int, piece: Piece) -> None:
        if index in unspoken:
            unspoken.remove(index)
            echo(index)
        chunk(index, piece.text, scribes[index].write([piece]), piece.finish)

    await follow_all(runs, hear)
    for index in sorted(unspoken):
        echo(index)
    if usage_at_end:
        say(event(Completion(**common, choices=[], usage=usage_of(runs, choices))))
    say(DONE)


class _Scribe:
    """Writes down one choice's log-probabilities, and where in its text each token begins."""

    def __init__(self, service: Service, request: CompletionRequest, run: Run) -> None:
        self._tokenizer = service.tokenizer
        self._wanted = request.logprobs is not None
        self._run = run
        self._at = 0

    def write(self, pieces: Sequence[Piece], *, prompt: bool = False) -> CompletionLogprobs | None:
        """Of the next pieces; ``prompt``: behind the whole prompt. None if nobody asked."""
        if not self._wanted:
            return None
        rows = [*(self._prompt() if prompt else ()), *map(self._piece, pieces)]
        return CompletionLogprobs(*([row[column] for row in rows] for column in range(4)))

    def _prompt(self) -> Iterator[_Row]:
        generation, tokenizer = self._run.generation, self._tokenizer
        detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
        for id, scored in zip(generation.token_ids, [None, *self._run.prompt], strict=True):
            yield self._row(id, scored.logprob, scored.top) if scored else (self._spelled(id), None, None, self._at)
            name = tokenizer.piece(id) if id in tokenizer.special_ids else ""
            # A special token is in the text only if the client wrote it there.
            grown = name if generation.text.startswith(name, self._at) else ""
            self._at += len(grown + detokenizer.push(id))
        self._at = len(generation.text)

    def _piece(self, piece: Piece) -> _Row:
        token = piece.token
        row = self._row(token.id, token.logprob, [(other.id, other.logprob) for other in piece.top])
        if not (token.special and self._run.generation.skip_special_tokens):
            self._at += len(token.text)
        return row

    def _row(self, id: int, logprob: float, top: Iterable[tuple[int, float]]) -> _Row:
        likely: dict[str, float] = {}
        for other, value in sorted((dict(top) | {id: logprob}).items(), key=lambda item: -item[1]):
            likely.setdefault(self._spelled(other), value)
        return self._spelled(id), logprob, likely, self._at

    def _spelled(self, id: int) -> str:
        data = self._tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
