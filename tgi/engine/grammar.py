"""Grammars of running requests, and budgets of their reasoning: made ready beside the step loop, masks while the device
works.

Knows requests and llguidance, which is loaded for the first grammar; knows no device.
"""

import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from tgi.core.plan import Masks, Work
from tgi.core.vocabulary import Vocabulary
from tgi.engine.request import Request
from tgi.engine.thinking import Thoughts

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_STACK = 1 << 24
"""Bytes of a compiling thread's stack: more than the router's trials have, so that what passed them can't overflow."""

_KEPT = 1 << 29
"""Bytes of compiled grammars that are kept for requests to come; see ``_size``."""


class Grammars:
    """Makes requests ready for their grammars, and says what may come next."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], vocab_size: int, wake: Callable[[], None]) -> None:
        """``vocabulary`` loads it; ``vocab_size``: the width of the logits. ``wake`` is called, by another thread, when
        ``ready`` has news."""
        self._compiler = _Compiler(vocabulary, vocab_size)
        self._vocab_size = vocab_size
        self._wake = wake
        self._threads: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._preparing: list[Request] = []
        self._prepared: SimpleQueue[tuple[Request, str | None]] = SimpleQueue()

    def prepare(self, request: Request) -> None:
        """Begin to compile a request's grammar, and to follow the tokens that it has generated already."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar", initializer=_give_way)
        self._preparing.append(request)
        before = threading.stack_size(_STACK)
        self._threads.submit(self._prepare, request)  # which may start a thread
        threading.stack_size(before)

    def ready(self) -> Iterator[tuple[Request, str | None]]:
        """Requests that meanwhile have got their matcher, or what is wrong with their grammar."""
        while True:
            try:
                request, error = self._prepared.get_nowait()
            except Empty:
                return
            if request in self._preparing:
                self._preparing.remove(request)
                yield request, error

    def cancel(self, router: int, request_id: int | None = None) -> None:
        """Forget one request that isn't ready, or all of a router."""
        self._preparing = [r for r in self._preparing if r.router != router or request_id not in (None, r.submit.id)]

    def masks(self, requests: Sequence[Request], works: Sequence[Work]) -> Masks | None:
        """What may come next in each work that samples under a grammar; the requests are the works', in their order.

        A grammar that becomes too complex on the way is known by ``Request.broken``.
        """
        matchers = {
            at: request.matcher
            for at, (request, work) in enumerate(zip(requests, works, strict=True))
            if work.samples and request.matcher is not None
        }
        if not matchers:
            return None
        import numpy
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor()
        words = allocate_token_bitmask(len(matchers), self._compiler.width)
        rows = [(matcher, row) for row, matcher in enumerate(matchers.values())]
        fill_next_token_bitmask_par(self._executor, rows, words)
        bits = words.view(numpy.uint8)[:, : -(-self._vocab_size // 8)]
        for row, at in zip(bits, matchers, strict=True):
            _forbid(row, _unwanted(requests[at]))
        return Masks(list(matchers), bits)

    def _prepare(self, request: Request) -> None:
        try:
            request.follow(*self._compiler.watch(request))
            while (error := request.broken) is not None and request.renews(error):
                request.follow(*self._compiler.watch(request))
        except BaseException as failure:  # a panic of llguidance's is no Exception
            error = f"grammar: {failure}"
        self._prepared.put((request, error))
        self._wake()


def _give_way() -> None:
    """The calling thread gets what the step's threads leave of the processor: those whose tokens are due don't wait for
    somebody's large grammar. (Of Linux; elsewhere it would be the whole process.)"""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _unwanted(request: Request) -> set[int]:
    """Tokens that would end a request before it wants to: by ``min_tokens``, and by ``ignore_eos``."""
    submit = request.submit
    ends = set(submit.sampling.end_token_ids)
    if request.generated < submit.sampling.min_tokens:
        return ends.union(submit.stop_token_ids)
    return ends.difference(submit.stop_token_ids)


def _forbid(row: Any, tokens: set[int]) -> None:
    """Take tokens from a row of bits, unless nothing else is left."""
    left = row.copy()
    for token in tokens:
        if 0 <= token < 8 * len(row):  # a model's files can name end tokens that it doesn't have
            left[token >> 3] &= 0xFF ^ 1 << (token & 7)
    if tokens and left.any():
        row[:] = left


def _size(seconds: float) -> int:
    """Bytes that a compiled grammar may come to hold, by the processor time that it took to compile.

    llguidance doesn't tell. Fresh from the compiler, grammars of all kinds have 30 to 280 kB for each millisecond (a
    schema of five fields 60 kB in 0.3 ms, an enumeration of 20 000 texts 12 MB in 60 ms). Their lexers, which all
    requests of a grammar share, grow by about 1 kB a state, up to the bound on these.
    """
    from tgi.core.grammar import LIMITS

    return int(3e8 * seconds) + 1000 * LIMITS.max_lexer_states


class _Compiler:
    """Grammars to matchers, on any thread. What was compiled before only costs a copy."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], vocab_size: int) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: tuple[Vocabulary, LLTokenizer] | None = None
        self._fresh: OrderedDict[str, tuple[LLMatcher, int]] = OrderedDict()
        """Matchers that never move from the start, and their sizes; least recently used first."""
        self._held = 0
        """Sum of these sizes."""

    @property
    def width(self) -> int:
        """Tokens that a mask tells of. Only once something has been compiled."""
        assert self._tokenizer is not None
        return self._tokenizer[1].vocab_size

    def watch(self, request: Request) -> "tuple[LLMatcher | None, Thoughts | None]":
        """What watches over a reply, at its beginning. Raises GrammarError."""
        sampling = request.submit.sampling
        vocabulary, tokenizer = self._load(sampling.end_token_ids)
        thoughts = None
        if sampling.thinking is not None:

            def encode(text: str) -> list[int]:
                return [mark] if (mark := vocabulary.added.get(text)) is not None else tokenizer.tokenize_str(text)

            thoughts = Thoughts(sampling.thinking, vocabulary.token_bytes, encode)
        return self._matcher(request, tokenizer) if sampling.grammar else None, thoughts

    def _matcher(self, request: Request, tokenizer: "LLTokenizer") -> "LLMatcher":
        from tgi.core.grammar import start

        sampling = request.submit.sampling
        if request.renewed:  # the lexer of those before has broken
            self._keep(sampling.grammar, None)
            return start(tokenizer, sampling.grammar)
        with self._lock:
            if sampling.grammar in self._fresh:
                self._fresh.move_to_end(sampling.grammar)
                return self._fresh[sampling.grammar][0].deep_copy()
        begin = time.thread_time()
        fresh = start(tokenizer, sampling.grammar)
        self._keep(sampling.grammar, (fresh, _size(time.thread_time() - begin)))
        return fresh.deep_copy()

    def _keep(self, grammar: str, entry: "tuple[LLMatcher, int] | None") -> None:
        """For requests to come; None to forget it."""
        with self._lock:
            self._held -= self._fresh.pop(grammar, (None, 0))[1]
            if entry is not None:
                self._fresh[grammar] = entry
                self._held += entry[1]
            while self._held > _KEPT:
                self._held -= self._fresh.popitem(last=False)[1][1]

    def _load(self, end_ids: Sequence[int]) -> "tuple[Vocabulary, LLTokenizer]":
        """Takes a fraction of a second the first time; the end tokens are the model's, the same every time."""
        from tgi.core.grammar import load_tokenizer

        with self._lock:
            if self._tokenizer is None:
                vocabulary = self._vocabulary()
                self._tokenizer = vocabulary, load_tokenizer(vocabulary, self._vocab_size, end_ids)
            return self._tokenizer
