"""Grammars of running requests: matchers are made ready beside the step loop, masks while the device works.

Knows requests and llguidance, which is loaded for the first grammar; knows no device.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from tgi.core.plan import Masks, Work
from tgi.engine.request import Request

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_STACK = 1 << 24
"""Bytes of a compiling thread's stack: more than the router's trials have, so that what passed them can't overflow."""

_KEPT = 32
"""Compiled grammars that are kept for requests to come."""


class Grammars:
    """Makes requests ready for their grammars, and says what may come next."""

    def __init__(self, tokenizer: Path, vocab_size: int, wake: Callable[[], None]) -> None:
        """``vocab_size``: the width of the logits. ``wake`` is called, by another thread, when ``ready`` has news."""
        self._compiler = _Compiler(tokenizer, vocab_size)
        self._vocab_size = vocab_size
        self._wake = wake
        self._threads: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._preparing: list[Request] = []
        self._prepared: SimpleQueue[tuple[Request, str | None]] = SimpleQueue()

    def prepare(self, request: Request) -> None:
        """Begin to compile a request's grammar, and to follow the tokens that it has generated already."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
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

    def masks(self, requests: Sequence[Request], works: Sequence[Work]) -> Masks:
        """What may come next in each work that samples under a grammar; the requests are the works', in their order.

        A grammar that becomes too complex on the way is known by its matcher's error.
        """
        rows = [
            (index, request.matcher, request)
            for index, (request, work) in enumerate(zip(requests, works, strict=True))
            if request.matcher is not None and work.samples
        ]
        if not rows:
            return {}
        import numpy
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor()
        bits = allocate_token_bitmask(len(rows), self._compiler.width)
        fill_next_token_bitmask_par(self._executor, [(matcher, at) for at, (_, matcher, _) in enumerate(rows)], bits)
        allowed = numpy.zeros((len(rows), self._vocab_size), bool)
        known = min(self._vocab_size, self._compiler.width)
        allowed[:, :known] = numpy.unpackbits(bits.view(numpy.uint8), 1, known, "little")
        for row, (_, _, request) in zip(allowed, rows, strict=True):
            ends = [token for token in _unwanted(request) if token < self._vocab_size]
            if ends and row.sum() > row[ends].sum():
                row[ends] = False
        return {index: row for row, (index, _, _) in zip(allowed, rows, strict=True)}

    def _prepare(self, request: Request) -> None:
        error = None
        try:
            request.matcher = self._compiler.compile(request)
        except BaseException as failure:  # a panic of llguidance's is no Exception
            error = f"grammar: {failure}"
        self._prepared.put((request, error))
        self._wake()


def _unwanted(request: Request) -> list[int]:
    """End tokens that the request doesn't want, unless its grammar has nothing else left: ``ignore_eos``, and
    ``min_tokens``."""
    submit = request.submit
    if request.generated < submit.sampling.min_tokens:
        return submit.sampling.end_token_ids
    return [token for token in submit.sampling.end_token_ids if token not in submit.stop_token_ids]


class _Compiler:
    """Grammars to matchers, on any thread. What was compiled before only costs a copy."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._fresh: OrderedDict[str, LLMatcher] = OrderedDict()
        """Matchers that never move from the start, least recently used first."""

    @property
    def width(self) -> int:
        """Tokens that a mask tells of. Only once something has been compiled."""
        assert self._tokenizer is not None
        return self._tokenizer.vocab_size

    def compile(self, request: Request) -> "LLMatcher":
        """A matcher that has followed what the request has generated. Raises GrammarError."""
        from tgi.core.grammar import check, start

        sampling = request.submit.sampling
        with self._lock:
            fresh = self._fresh.get(sampling.grammar)
        if fresh is None:
            fresh = start(self._load(sampling.end_token_ids), sampling.grammar)
        with self._lock:
            self._fresh[sampling.grammar] = fresh
            self._fresh.move_to_end(sampling.grammar)
            if len(self._fresh) > _KEPT:
                self._fresh.popitem(last=False)
            matcher = fresh.deep_copy()
        for token in request.tokens[request.submit.prompt_length :]:
            matcher.consume_token(token)
        check(matcher)
        return matcher

    def _load(self, end_ids: Sequence[int]) -> "LLTokenizer":
        """Takes a fraction of a second the first time; the end tokens are the model's, the same every time."""
        from tgi.core.grammar import load_tokenizer

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._path, self._vocab_size, end_ids)
            return self._tokenizer
