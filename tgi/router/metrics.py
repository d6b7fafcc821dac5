"""Every ``tgi_*`` metric: one table, and the points of a request's life and of an engine's step that are written down.

TGI's names, labels and buckets, since dashboards query them. A generation counts once; TGI counts some twice or thrice.
All of it happens on one event loop: no locks, and a series costs the memory of its buckets, whatever is observed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from tgi.core.board import Board, Cells
from tgi.core.config import Limits
from tgi.core.errors import Kind
from tgi.core.messages import StepStats

CONTENT_TYPE = "text/plain; charset=utf-8"

COUNTER, GAUGE = "counter", "gauge"
SECONDS, INPUT_TOKENS, TOTAL_TOKENS, ROWS, SPECULATED = "seconds", "input", "total", "rows", "speculated"
"""Histograms, by their buckets."""


class Row(NamedTuple):
    kind: str
    help: str
    label: str | None = None
    values: Sequence[str] = ("",)
    """Of the label: each series is there from the start, at zero."""


_METHODS = ("prefill", "decode")
_METHOD = ("method", _METHODS)
"""A step that computes any prompt is a prefill, as with TGI's prefill chunking."""

TABLE = {
    "tgi_request_count": Row(COUNTER, "Total number of requests"),
    "tgi_request_success": Row(COUNTER, "Number of successful requests"),
    "tgi_request_failure": Row(
        COUNTER,
        "Number of failed requests, by cause",
        "err",
        ("overloaded", "validation", "template", "incomplete", "dropped", "generation"),
    ),
    "tgi_request_duration": Row(SECONDS, "Request duration"),
    "tgi_request_validation_duration": Row(SECONDS, "Request validation duration"),
    "tgi_request_queue_duration": Row(SECONDS, "Request queue duration"),
    "tgi_request_inference_duration": Row(SECONDS, "Request inference duration"),
    "tgi_request_mean_time_per_token_duration": Row(SECONDS, "Mean time per token per request"),
    "tgi_request_time_to_first_token_duration": Row(SECONDS, "Time from a request's arrival to its first token"),
    "tgi_request_inter_token_duration": Row(SECONDS, "Time between two steps that gave a request tokens"),
    "tgi_request_generated_tokens": Row(TOTAL_TOKENS, "Generated tokens per request"),
    "tgi_request_input_length": Row(INPUT_TOKENS, "Input token length per request"),
    "tgi_request_max_new_tokens": Row(TOTAL_TOKENS, "Maximum new tokens per request"),
    "tgi_request_skipped_tokens": Row(SPECULATED, "Speculated tokens per request"),
    "tgi_request_cached_tokens": Row(COUNTER, "Input tokens that the prefix cache had"),
    "tgi_queue_size": Row(GAUGE, "Current queue size"),
    "tgi_batch_next_size": Row(ROWS, "Batch size of the next batch"),
    "tgi_batch_current_size": Row(GAUGE, "Current batch size"),
    "tgi_batch_current_max_tokens": Row(GAUGE, "Maximum tokens for the current batch"),
    "tgi_batch_max_total_tokens": Row(GAUGE, "Maximum tokens that the running requests may hold"),
    "tgi_batch_inference_count": Row(COUNTER, "Inference calls per method (prefill or decode)", *_METHOD),
    "tgi_batch_inference_success": Row(
        COUNTER, "Number of successful inference calls per method (prefill or decode)", *_METHOD
    ),
    "tgi_batch_inference_failure": Row(COUNTER, "Number of inference calls that ended the engine, by method", *_METHOD),
    "tgi_batch_inference_duration": Row(SECONDS, "Batch inference duration", *_METHOD),
    "tgi_batch_forward_duration": Row(SECONDS, "Batch forward duration per method (prefill or decode)", *_METHOD),
    "tgi_batch_decode_duration": Row(SECONDS, "Time spent decoding a batch per method (prefill or decode)", *_METHOD),
    "tgi_batch_filter_duration": Row(
        SECONDS,
        "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
        *_METHOD,
    ),
    "tgi_batch_concat": Row(COUNTER, "Times that requests joined a running batch, by reason", "reason", ("chunking",)),
    "tgi_batch_concat_duration": Row(
        SECONDS, "Time spent forming a batch that requests join while others run", "method", ("decode",)
    ),
    "tgi_batch_preempted": Row(COUNTER, "Times that a running request had to give up its cache and start again"),
    "tgi_engine_restarts": Row(COUNTER, "Times that an engine took the place of one that was lost"),
    "tgi_grammar_forced_tokens": Row(COUNTER, "Generated tokens that were the only ones possible, without steps"),
}


@dataclass(frozen=True, slots=True)
class Times:
    """A finished generation's seconds: in all, until the engine had it, until its first step, from then on; and from
    its arrival to its first token."""

    total: float
    validation: float
    queue: float
    inference: float
    first_token: float


class _Number:
    """A counter or a gauge."""

    __slots__ = ("_cells", "_name", "own")

    def __init__(self, name: str, labels: str, cells: Cells[int]) -> None:
        self._name = f"{name}{{{labels}}}" if labels else name
        self._cells = cells
        self.own = cells.own

    def lines(self) -> Iterator[str]:
        yield f"{self._name} {self._cells.sums()[0]}\n"


class _Histogram:
    """Observations counted by bucket; each bucket's line has all that is not above its bound."""

    __slots__ = ("_bounds", "_cells", "_counts", "_heads", "_name", "_sum", "_tail", "_total")

    def __init__(self, name: str, labels: str, bounds: Iterable[float], board: Board) -> None:
        self._bounds = list(bounds)
        self._cells, self._total = board.integers(len(self._bounds) + 1), board.floats(1)
        self._counts, self._sum = self._cells.own, self._total.own
        self._name = name
        self._tail = f"{{{labels}}}" if labels else ""
        texts = [*(repr(bound).removesuffix(".0") for bound in self._bounds), "+Inf"]
        self._heads = [f'{name}_bucket{{{labels}{"," if labels else ""}le="{text}"}} ' for text in texts]

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum[0] += value * times

    def lines(self) -> Iterator[str]:
        count = 0
        for head, count in zip(self._heads, accumulate(self._cells.sums()), strict=True):
            yield f"{head}{count}\n"
        yield f"{self._name}_sum{self._tail} {self._total.sums()[0]}\n"
        yield f"{self._name}_count{self._tail} {count}\n"


class Metrics:
    """The numbers of all routers, filled by what happens to this one's requests and in the engine's steps."""

    def __init__(self, limits: Limits, board: Board) -> None:
        buckets: dict[str, Iterable[float]] = {
            SECONDS: [0.0001 * 1.5**i for i in range(1, 36)],
            INPUT_TOKENS: [limits.max_input_tokens / 100 * i for i in range(1, 101)],
            TOTAL_TOKENS: [limits.max_total_tokens / 100 * i for i in range(1, 101)],
            ROWS: range(1, 1025),
            SPECULATED: range(17),
        }
        self._numbers: dict[tuple[str, str], _Number] = {}
        self._histograms: dict[tuple[str, str], _Histogram] = {}
        for name, row in TABLE.items():
            for value in row.values:
                labels = f'{row.label}="{value}"' if row.label else ""
                if row.kind in buckets:
                    self._histograms[name, value] = _Histogram(name, labels, buckets[row.kind], board)
                else:
                    cells = board.integers(1)
                    # Who is told of a gauge tells it for all.
                    self._numbers[name, value] = _Number(name, labels, cells if row.kind == COUNTER else cells.common)
        self._board = board
        self._lost, self._met = board.integers(1).common, board.integers(1).common
        """Epochs of the last engines of which a router has told."""
        self._set("tgi_batch_max_total_tokens", limits.max_batch_total_tokens)

    def arrived(self, generations: int = 1) -> None:
        """A client asks for so many generations; nothing about them has been judged yet."""
        self._count("tgi_request_count", by=generations)

    def validated(self, input_length: int, max_new_tokens: int) -> None:
        self._observe("tgi_request_input_length", input_length)
        self._observe("tgi_request_max_new_tokens", max_new_tokens)

    def spoke(self, tokens: int, requests: int) -> None:
        """One step of the engine gave so many requests so many tokens each."""
        self._histograms["tgi_request_skipped_tokens", ""].observe(tokens - 1, requests)

    def waited(self, seconds: float, requests: int) -> None:
        """So long after their last tokens so many requests got more."""
        self._histograms["tgi_request_inter_token_duration", ""].observe(seconds, requests)

    def finished(self, times: Times, tokens: int, cached: int) -> None:
        self._count("tgi_request_success")
        self._count("tgi_request_cached_tokens", by=cached)
        self._observe("tgi_request_duration", times.total)
        self._observe("tgi_request_validation_duration", times.validation)
        self._observe("tgi_request_queue_duration", times.queue)
        self._observe("tgi_request_inference_duration", times.inference)
        self._observe("tgi_request_generated_tokens", tokens)
        if tokens:
            self._observe("tgi_request_mean_time_per_token_duration", times.inference / max(1, tokens))
            self._observe("tgi_request_time_to_first_token_duration", times.first_token)

    def failed(self, kind: Kind) -> None:
        if kind.label is not None:
            self._count("tgi_request_failure", kind.label)

    def dropped(self) -> None:
        """The client went away before its generation was complete."""
        self._count("tgi_request_failure", "dropped")

    def stepped(self, stats: StepStats) -> None:
        self._set("tgi_batch_current_size", stats.running)
        self._set("tgi_batch_current_max_tokens", stats.batch_tokens)
        if not stats.prefill_rows + stats.decode_rows:
            return
        method = _method(prefills=stats.prefill_rows > 0)
        self._count("tgi_batch_inference_count", method)
        self._count("tgi_batch_inference_success", method)
        self._count("tgi_batch_preempted", by=stats.preempted)
        self._count("tgi_grammar_forced_tokens", by=stats.forced)
        self._observe("tgi_batch_inference_duration", stats.duration, method)
        self._observe("tgi_batch_forward_duration", stats.forward, method)
        self._observe("tgi_batch_decode_duration", stats.sample, method)
        rest = stats.duration - stats.planning - stats.forward - stats.sample
        self._observe("tgi_batch_filter_duration", max(0.0, rest), method)
        if stats.admitted:
            self._observe("tgi_batch_next_size", stats.admitted)
            if stats.prefill_rows + stats.decode_rows > stats.admitted:
                self._count("tgi_batch_concat", "chunking")
                self._observe("tgi_batch_concat_duration", stats.planning, "decode")

    def broke(self, epoch: int, *, prefills: bool) -> None:
        """The engine of this epoch was lost in the middle of its work."""
        if not self._is_news(self._lost, epoch):
            return
        method = _method(prefills=prefills)
        self._count("tgi_batch_inference_count", method)
        self._count("tgi_batch_inference_failure", method)

    def restarted(self, epoch: int) -> None:
        """Another engine is there than before."""
        if self._is_news(self._met, epoch):
            self._count("tgi_engine_restarts")

    def expose(self, queued: int) -> bytes:
        """Prometheus' text format."""
        self._set("tgi_queue_size", queued)
        return "".join(self._lines()).encode()

    def _lines(self) -> Iterator[str]:
        for name, row in TABLE.items():
            number = row.kind in (COUNTER, GAUGE)
            yield f"# HELP {name} {row.help}\n# TYPE {name} {row.kind if number else 'histogram'}\n"
            for value in row.values:
                yield from (self._numbers if number else self._histograms)[name, value].lines()

    def _is_news(self, last: Cells[int], epoch: int) -> bool:
        """Of what all routers are told, the first counts."""
        with self._board.lock:
            known, last.own[0] = last.own[0], epoch
        return known != epoch

    def _count(self, name: str, label: str = "", by: int = 1) -> None:
        self._numbers[name, label].own[0] += by

    def _set(self, name: str, value: int) -> None:
        self._numbers[name, ""].own[0] = value

    def _observe(self, name: str, value: float, label: str = "") -> None:
        self._histograms[name, label].observe(value)


def _method(*, prefills: bool) -> str:
    return _METHODS[0] if prefills else _METHODS[1]
