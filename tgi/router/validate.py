"""From the wire to a Generation, the one place where a client's wishes are judged. Knows limits and the tokenizer."""

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tgi.core.config import Limits
from tgi.core.errors import VALIDATION, RequestError
from tgi.core.messages import Sampling
from tgi.router.tokenizer import Tokenizer
from tgi.router.wire.native import GenerateParameters

INLINE_CHARACTERS = 4096
"""Longer texts are worked on beside the event loop: they would hold up every stream for milliseconds."""

Result = TypeVar("Result")

_NATIVE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "watermark": (False,),
    "adapter_id": (None,),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "stop_token_ids": ([],),
    "grammar": (None,),
}


def invalid(detail: str) -> RequestError:
    return RequestError(VALIDATION, detail)


def refuse(request: msgspec.Struct, neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse by name what this version doesn't do: fields that ask for anything but the values that change nothing."""
    for name, values in neutral.items():
        if getattr(request, name) not in values:
            raise invalid("grammar is not supported" if name == "grammar" else f"`{name}` is not supported")


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that may run: every limit holds, every default is filled in. Only Validator makes one."""

    text: str
    """The prompt, whole, even where it was truncated."""
    token_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: list[str]
    keep_stop: bool
    """A stop string stays in the text."""
    stop_token_ids: list[int]
    skip_special_tokens: bool
    prompt_logprobs: bool
    cache_salt: bytes
    priority: int

    @property
    def seed(self) -> int | None:
        """As clients see it: greedy generations have none."""
        return None if self.sampling.greedy else self.sampling.seed

    def reseeded(self) -> "Generation":
        """The same request with a random seed of its own, for ``best_of``."""
        return dataclasses.replace(self, sampling=msgspec.structs.replace(self.sampling, seed=_random_seed()))


class Validator:
    """TGI's checks, in TGI's order and words."""

    def __init__(self, limits: Limits, tokenizer: Tokenizer) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(limits.validation_workers, thread_name_prefix="validation")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def check_best_of(self, parameters: GenerateParameters) -> None:
        """What is judged before a request counts against the concurrency limit, when it doesn't stream."""
        best_of, most = parameters.best_of or 1, self._limits.max_best_of
        if best_of > 1 and most == 1:
            raise invalid("`best_of` != 1 is not allowed for this endpoint")
        if best_of > most:
            raise invalid(f"`best_of` must be > 0 and <= {most}. Given: {best_of}")

    def check_stream(self, parameters: GenerateParameters) -> None:
        """What is judged before a request counts against the concurrency limit, when it streams."""
        if parameters.best_of not in (None, 1):
            raise invalid("`best_of` != 1 is not supported when streaming tokens")
        if parameters.decoder_input_details:
            raise invalid("`decoder_input_details` == true is not supported when streaming tokens")

    async def validate(
        self,
        text: str,
        parameters: GenerateParameters,
        *,
        add_special_tokens: bool = True,
        greedy: bool = False,
        grammar: str = "",
    ) -> Generation:
        """Judge and tokenise. ``greedy`` overrides what the parameters say about sampling; ``grammar``, as llguidance
        reads it, is the caller's own."""
        self._check(text, parameters)
        token_ids = await self.encode(text, add_special_tokens=add_special_tokens)
        if parameters.truncate is not None:
            token_ids = token_ids[-parameters.truncate :]
        given, limits = len(token_ids), self._limits
        room = limits.max_total_tokens - given
        wanted = parameters.max_new_tokens
        if wanted is not None and wanted > room:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {given} `inputs` tokens and {wanted} `max_new_tokens`"
            )
        if given > limits.max_input_tokens:
            raise invalid(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {given}")
        if not given:
            raise invalid("`inputs` cannot be empty")
        return Generation(
            text=text,
            token_ids=token_ids,
            max_new_tokens=room if wanted is None else wanted,
            sampling=msgspec.structs.replace(_sampling(parameters, greedy), grammar=grammar),
            stop=parameters.stop,
            keep_stop=parameters.include_stop_str_in_output,
            skip_special_tokens=parameters.skip_special_tokens,
            cache_salt=(parameters.cache_salt or "").encode(),
            priority=parameters.priority,
            stop_token_ids=[] if parameters.ignore_eos else sorted(self._tokenizer.eos_ids),
            prompt_logprobs=parameters.decoder_input_details,
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encode = functools.partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self.apart(encode, len(text))

    async def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, str, int, int]]:
        """As Tokenizer.spans."""
        spans = functools.partial(self._tokenizer.spans, text, add_special_tokens=add_special_tokens)
        return await self.apart(spans, len(text))

    async def apart(self, work: Callable[[], Result], size: int) -> Result:
        """Do ``work`` on ``size`` characters: at once if that is quick, otherwise beside the event loop."""
        if size <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _check(self, text: str, p: GenerateParameters) -> None:
        refuse(p, _NATIVE_NEUTRAL)
        limits, best_of = self._limits, p.best_of or 1
        asks_sampling = p.do_sample or any(v is not None for v in (p.temperature, p.top_k, p.top_p, p.typical_p))
        if best_of > 1 and not asks_sampling:
            raise invalid("you must use sampling when `best_of` is > 1")
        if p.temperature is not None and p.temperature <= 0:
            raise invalid("`temperature` must be strictly positive")
        if p.repetition_penalty is not None and p.repetition_penalty <= 0:
            raise invalid("`repetition_penalty` must be strictly positive")
        if p.frequency_penalty is not None and not -2 <= p.frequency_penalty <= 2:
            raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
        if p.presence_penalty is not None and not -2 <= p.presence_penalty <= 2:
            raise invalid("`presence_penalty` must be >= -2.0 and <= 2.0")
        if p.top_p is not None and not 0 < p.top_p < 1:
            raise invalid("`top_p` must be > 0.0 and < 1.0")
        if p.typical_p is not None and not 0 < p.typical_p < 1:
            raise invalid("`typical_p` must be > 0.0 and < 1.0")
        if p.top_k is not None and p.top_k <= 0:
            raise invalid("`top_k` must be strictly positive")
        if p.max_new_tokens == 0:
            raise invalid("`max_new_tokens` must be strictly positive")
        if len(p.stop) > limits.max_stop_sequences:
            raise invalid(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}")
        if "" in p.stop:
            raise invalid("`stop` must not contain an empty string")
        if p.seed is not None and best_of > 1:
            raise invalid("`seed` must not be set when `best_of` > 1")
        if p.seed is not None and p.seed >= 2**64:
            raise invalid(f"`seed` must be < 2^64. Given: {p.seed}")
        if p.top_n_tokens is not None and p.top_n_tokens > limits.max_top_n_tokens:
            raise invalid(f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {p.top_n_tokens}")
        for token_id, bias in (p.logit_bias or {}).items():
            if not 0 <= token_id < self._tokenizer.vocab_size:
                raise invalid(f"`logit_bias` names token {token_id}, which the model doesn't have")
            if not -100 <= bias <= 100:
                raise invalid(f"`logit_bias` must be >= -100.0 and <= 100.0. Given: {bias} for token {token_id}")
        if not text:
            raise invalid("`inputs` cannot be empty")
        if p.truncate is not None and not 0 < p.truncate <= limits.max_input_tokens:
            raise invalid(
                f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {p.truncate}"
            )


def _sampling(p: GenerateParameters, greedy: bool) -> Sampling:
    """Sampling iff the client asked for it or moved a warper off its neutral value."""
    temperature = 1.0 if p.temperature is None else p.temperature
    top_k, top_p, typical_p = p.top_k or 0, p.top_p or 1.0, p.typical_p or 1.0
    greedy = greedy or not (p.do_sample or temperature != 1 or top_k != 0 or top_p < 1 or typical_p < 1)
    sampling = Sampling(
        repetition_penalty=p.repetition_penalty or 1.0,
        frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        logit_bias=p.logit_bias or {},
        top_n_tokens=p.top_n_tokens or 0,
    )
    if greedy:
        return sampling
    return msgspec.structs.replace(
        sampling,
        greedy=False,
        seed=_random_seed() if p.seed is None else p.seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
    )


def _random_seed() -> int:
    return secrets.randbits(64)
