"""From the wire to a Generation, the one place where a client's wishes are judged. Knows limits and the tokenizer."""

import asyncio
import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tgi.core.config import Limits
from tgi.core.errors import TOOL, VALIDATION, RequestError
from tgi.core.messages import Sampling, Thinking
from tgi.router.grammar import UNSUPPORTED, Grammars, Wish, wish_of
from tgi.router.tokenizer import SHORT, Tokenizer
from tgi.router.wire.base import Refusing
from tgi.router.wire.native import GenerateParameters

MAX_STOP_TOKEN_IDS = 64
"""Models have a handful; each one is a look-up for each token."""

MAX_CACHE_SALT = 256
"""Characters."""

Result = TypeVar("Result")


def invalid(detail: str) -> RequestError:
    return RequestError(VALIDATION, detail)


def refuse(request: Refusing, where: str = "") -> None:
    """Refuse by name what this version doesn't do: fields that ask for anything but the values that change nothing.

    ``where`` in the whole request this one is, with a dot behind it. What it holds is judged, too, but for lists.
    """
    for name, values in request.neutral.items():
        if getattr(request, name) not in values:
            raise invalid(f"`{where}{name}` is not supported")
    for name in request.__struct_fields__:
        if isinstance(value := getattr(request, name), Refusing):
            refuse(value, f"{where}{name}.")


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that may run: every limit holds, every default is filled in. Only Validator makes one."""

    parameters: GenerateParameters
    """What was asked for."""
    text: str
    """The prompt, whole, even where it was truncated; of a prompt of token ids what they spell."""
    token_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: list[str]
    keep_stop: bool
    """A stop string, or the text of a token that ends the generation, stays in the text."""
    stop_token_ids: list[int]
    skip_special_tokens: bool
    shown: frozenset[int]
    """Special tokens that stay in the text even so."""
    prompt_logprobs: bool
    cache_salt: bytes
    priority: int

    @property
    def seed(self) -> int | None:
        """As clients see it: greedy generations have none."""
        return None if self.sampling.greedy else self.sampling.seed

    def choice(self, index: int) -> "Generation":
        """The same request for its ``index``-th answer. The first has the seed itself, the others' follow from it."""
        if index == 0 or self.sampling.greedy:
            return self
        digest = hashlib.blake2b(b"%d %d" % (self.sampling.seed, index), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
        return dataclasses.replace(self, sampling=msgspec.structs.replace(self.sampling, seed=seed))


class Validator:
    """TGI's checks, in TGI's order and words; what TGI lacks is checked beside what it resembles."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: Tokenizer,
        watermark: tuple[float, float] = (0.5, 2.0),
        grammars: Grammars | None = None,
    ) -> None:
        """``watermark``: gamma and delta for those who ask for one; ``grammars``: None refuses every grammar."""
        self._limits = limits
        self._tokenizer = tokenizer
        self._watermark = watermark
        self._grammars = grammars
        self._pool = ThreadPoolExecutor(limits.validation_workers, thread_name_prefix="validation")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._grammars is not None:
            self._grammars.close()

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

    def check_choices(self, n: int | None, best_of: int | None = None) -> None:
        """How many answers OpenAI's routes give: ``n``, the likeliest of ``best_of``. Judged as check_best_of."""
        most = self._limits.max_best_of
        for name, count in (("n", n), ("best_of", best_of)):
            if count is None:
                continue
            if count > 1 and most == 1:
                raise invalid(f"`{name}` != 1 is not allowed for this endpoint")
            if not 0 < count <= most:
                raise invalid(f"`{name}` must be > 0 and <= {most}. Given: {count}")
        if best_of is not None and best_of < (n or 1):
            raise invalid(f"`best_of` must be >= `n`. Given: {best_of} and {n}")

    def check_truncate(self, truncate: int | None) -> None:
        most = self._limits.max_input_tokens
        if truncate is not None and not 0 < truncate <= most:
            raise invalid(f"`truncate` must be strictly positive and less than {most}. Given: {truncate}")

    async def validate(
        self,
        prompt: str | Sequence[int],
        parameters: GenerateParameters,
        *,
        greedy: bool = False,
        grammar: str = "",
        frame: str = "",
        shown: frozenset[int] = frozenset(),
        thinking: Thinking | None = None,
        generates: bool = True,
    ) -> Generation:
        """Judge and tokenise a text, or judge a prompt of token ids.

        ``greedy`` overrides what the parameters say about sampling; ``grammar``, as llguidance reads it, is the
        caller's own; ``frame`` is what stands around the parameters', see ``Wish``; ``shown``: special tokens that the
        caller must see; without ``generates`` only the prompt is computed, and ``max_new_tokens`` isn't looked at.
        """
        self._check(prompt, parameters, generates)
        if isinstance(prompt, str):
            token_ids = await self.encode(prompt, add_special_tokens=parameters.add_special_tokens)
        else:
            token_ids = list(prompt)
        if parameters.truncate is not None:
            token_ids = token_ids[-parameters.truncate :]
        given, limits = len(token_ids), self._limits
        room = limits.max_total_tokens - given
        wanted = parameters.max_new_tokens if generates else 0
        if wanted is not None and wanted > room:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {given} `inputs` tokens and {wanted} `max_new_tokens`"
            )
        if given > limits.max_input_tokens:
            raise invalid(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {given}")
        if not given:
            raise invalid("`inputs` cannot be empty")
        max_new_tokens = room if wanted is None else wanted
        if (parameters.min_tokens or 0) > max_new_tokens:
            raise invalid(
                f"`min_tokens` must be <= `max_new_tokens`. Given: {parameters.min_tokens} and {max_new_tokens}"
            )
        sampling, eos_ids = _sampling(parameters, greedy), self._tokenizer.eos_ids
        if grammar := await self._grammar(parameters, grammar, frame):
            sampling = msgspec.structs.replace(sampling, grammar=grammar, end_token_ids=sorted(eos_ids))
        if parameters.watermark:
            sampling = msgspec.structs.replace(sampling, watermark=self._watermark)
        if thinking is not None:
            sampling = msgspec.structs.replace(sampling, thinking=thinking, end_token_ids=sorted(eos_ids))
        return Generation(
            parameters=parameters,
            text=prompt if isinstance(prompt, str) else await self._decode(token_ids),
            token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=parameters.stop,
            keep_stop=parameters.include_stop_str_in_output,
            skip_special_tokens=parameters.skip_special_tokens,
            shown=shown,
            cache_salt=hashlib.sha256(parameters.cache_salt.encode()).digest() if parameters.cache_salt else b"",
            priority=parameters.priority,
            stop_token_ids=sorted({*parameters.stop_token_ids, *(() if parameters.ignore_eos else eos_ids)}),
            prompt_logprobs=parameters.decoder_input_details,
        )

    @property
    def has_grammars(self) -> bool:
        """Whether it takes any."""
        return self._grammars is not None

    async def _grammar(self, parameters: GenerateParameters, own: str, frame: str) -> str:
        """As the engine takes it, "" if there is none. ``own`` is the caller's."""
        if own and parameters.grammar is not None:
            raise RequestError(TOOL, "Grammar and tools are mutually exclusive")
        if not own and parameters.grammar is None:
            return ""
        if parameters.grammar is None:
            return await self.compile(Wish("llguidance", own))
        return await self.compile(msgspec.structs.replace(wish_of(parameters.grammar), frame=frame))

    async def compile(self, wish: Wish) -> str:
        """A grammar as the engine takes it. Raises RequestError for one that can't be enforced, in full."""
        if self._grammars is None:
            raise invalid(UNSUPPORTED)
        return await self._grammars.compile(wish)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await self._tokenize(self._tokenizer.encode, text, add_special_tokens)

    async def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, str, int, int]]:
        """As Tokenizer.spans."""
        return await self._tokenize(self._tokenizer.spans, text, add_special_tokens)

    async def apart(self, work: Callable[[], Result], size: int) -> Result:
        """Do ``work`` on ``size`` characters: at once if they are short, otherwise beside the event loop, of which it
        would hold up every stream."""
        return work() if size <= SHORT else await self.beside(work)

    async def beside(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _tokenize(self, work: Callable[..., Result], text: str, add_special_tokens: bool) -> Result:
        try:
            return await self.apart(functools.partial(work, text, add_special_tokens=add_special_tokens), len(text))
        except Exception as error:  # the library raises nothing more specific
            raise invalid(f"tokenizer error {error}") from error

    async def _decode(self, token_ids: list[int]) -> str:
        decode = functools.partial(self._tokenizer.decode, token_ids, skip_special_tokens=False)
        return await self.apart(decode, 4 * len(token_ids))

    def _check(self, prompt: str | Sequence[int], p: GenerateParameters, generates: bool) -> None:
        refuse(p)
        limits, best_of = self._limits, p.best_of or 1
        asks_sampling = p.do_sample or any(
            v is not None for v in (p.temperature, p.top_k, p.top_p, p.typical_p, p.min_p)
        )
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
        if p.min_p is not None and not 0 <= p.min_p <= 1:
            raise invalid("`min_p` must be >= 0.0 and <= 1.0")
        if p.max_new_tokens == 0 and generates:
            raise invalid("`max_new_tokens` must be strictly positive")
        if len(p.stop) > limits.max_stop_sequences:
            raise invalid(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}")
        if "" in p.stop:
            raise invalid("`stop` must not contain an empty string")
        if len(p.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise invalid(f"`stop_token_ids` supports up to {MAX_STOP_TOKEN_IDS} ids. Given: {len(p.stop_token_ids)}")
        self._check_ids("stop_token_ids", p.stop_token_ids)
        if p.seed is not None and best_of > 1:
            raise invalid("`seed` must not be set when `best_of` > 1")
        if p.seed is not None and p.seed >= 2**64:
            raise invalid(f"`seed` must be < 2^64. Given: {p.seed}")
        if p.top_n_tokens is not None and p.top_n_tokens > limits.max_top_n_tokens:
            raise invalid(f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {p.top_n_tokens}")
        self._check_ids("logit_bias", p.logit_bias or {})
        for token_id, bias in (p.logit_bias or {}).items():
            if not -100 <= bias <= 100:
                raise invalid(f"`logit_bias` must be >= -100.0 and <= 100.0. Given: {bias} for token {token_id}")
        if p.cache_salt is not None and len(p.cache_salt) > MAX_CACHE_SALT:
            raise invalid(f"`cache_salt` supports up to {MAX_CACHE_SALT} characters. Given: {len(p.cache_salt)}")
        if not prompt:
            raise invalid("`inputs` cannot be empty")
        if not isinstance(prompt, str):
            self._check_ids("prompt", prompt)
        self.check_truncate(p.truncate)

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                raise invalid(f"`{name}` names token {token_id}, which the model doesn't have")


def _sampling(p: GenerateParameters, greedy: bool) -> Sampling:
    """Sampling iff the client asked for it or moved a warper off its neutral value."""
    temperature = 1.0 if p.temperature is None else p.temperature
    top_k, top_p, typical_p, min_p = p.top_k or 0, p.top_p or 1.0, p.typical_p or 1.0, p.min_p or 0.0
    greedy = greedy or not (p.do_sample or temperature != 1 or top_k != 0 or top_p < 1 or typical_p < 1 or min_p > 0)
    sampling = Sampling(
        repetition_penalty=p.repetition_penalty or 1.0,
        frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        logit_bias=p.logit_bias or {},
        min_tokens=p.min_tokens or 0,
        top_n_tokens=p.top_n_tokens or 0,
    )
    if greedy:
        return sampling
    return msgspec.structs.replace(
        sampling,
        greedy=False,
        seed=secrets.randbits(64) if p.seed is None else p.seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        min_p=min_p,
    )
