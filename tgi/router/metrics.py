"""Every ``tgi_*`` metric: one table, and the points of a request's life and of an engine's step that are written down.

TGI's names, labels and buckets, since dashboards query them. A generation counts once; TGI counts some twice or thrice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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


_METHOD = ("method", ("prefill", "decode"))
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
    "tgi_request_generated_tokens": Row(TOTAL_TOKENS, "Generated tokens per request"),
    "tgi_request_input_length": Row(INPUT_TOKENS, "Input token length per request"),
    "tgi_request_max_new_tokens": Row(TOTAL_TOKENS, "Maximum new tokens per request"),
    "tgi_request_skipped_tokens": Row(SPECULATED, "Speculated tokens per request"),
    "tgi_queue_size": Row(GAUGE, "Current queue size"),
    "tgi_batch_next_size": Row(ROWS, "Batch size of the next batch"),
    "tgi_batch_current_size": Row(GAUGE, "Current batch size"),
    "tgi_batch_current_max_tokens": Row(GAUGE, "Maximum tokens for the current batch"),
    "tgi_batch_max_total_tokens": Row(GAUGE, "Maximum tokens that the running requests may hold"),
    "tgi_batch_inference_count": Row(COUNTER, "Inference calls per method (prefill or decode)", *_METHOD),
    "tgi_batch_inference_success": Row(
        COUNTER, "Number of successful inference calls per method (prefill or decode)", *_METHOD
    ),
    "tgi_batch_inference_duration": Row(SECONDS, "Batch inference duration", *_METHOD),
    "tgi_batch_forward_duration": Row(SECONDS, "Batch forward duration per method (prefill or decode)", *_METHOD),
    "tgi_batch_decode_duration": Row(SECONDS, "Time spent decoding a batch per method (prefill or decode)", *_METHOD),
    "tgi_batch_filter_duration": Row(
        SECONDS,
        "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
        *_METHOD,
    ),
    "tgi_batch_concat": Row(COUNTER, "Times that requests joined a running batch, by reason", "reason", ("chunking",)),
}


@dataclass(frozen=True, slots=True)
class Times:
    """A finished generation's seconds: in all, until the engine had it, until its first step, from then on."""

    total: float
    validation: float
    queue: float
    inference: float


_FOREIGN = re.compile(rb"(?m)^(?:# \w+ )?\w+_created\b.*\n|(?<=\w)_total(?=[ {])")
"""What prometheus_client adds to TGI's names: ``_created`` series, and ``_total`` behind the names of counters."""


class Metrics:
    """One registry, filled by what happens to requests and in the engine's steps."""

    def __init__(self, limits: Limits) -> None:
        buckets: dict[str, Sequence[float]] = {
            SECONDS: [0.0001 * 1.5**i for i in range(1, 36)],
            INPUT_TOKENS: [limits.max_input_tokens / 100 * i for i in range(1, 101)],
            TOTAL_TOKENS: [limits.max_total_tokens / 100 * i for i in range(1, 101)],
            ROWS: range(1, 1025),
            SPECULATED: range(17),
        }
        self._registry = CollectorRegistry()
        self._counters: dict[tuple[str, str], Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[tuple[str, str], Histogram] = {}
        for name, row in TABLE.items():
            labels = [row.label] if row.label else []
            if row.kind == GAUGE:
                self._gauges[name] = Gauge(name, row.help, registry=self._registry)
            elif row.kind == COUNTER:
                counter = Counter(name, row.help, labels, registry=self._registry)
                self._counters |= {(name, v): counter.labels(v) if v else counter for v in row.values}
            else:
                histogram = Histogram(name, row.help, labels, registry=self._registry, buckets=buckets[row.kind])
                self._histograms |= {(name, v): histogram.labels(v) if v else histogram for v in row.values}
        self._gauges["tgi_batch_max_total_tokens"].set(limits.max_batch_total_tokens)

    def arrived(self, generations: int = 1) -> None:
        """A client asks for so many generations; nothing about them has been judged yet."""
        self._counters["tgi_request_count", ""].inc(generations)

    def validated(self, input_length: int, max_new_tokens: int) -> None:
        self._observe("tgi_request_input_length", input_length)
        self._observe("tgi_request_max_new_tokens", max_new_tokens)

    def spoke(self, tokens: int) -> None:
        """One step of the engine gave one request so many tokens."""
        self._observe("tgi_request_skipped_tokens", tokens - 1)

    def finished(self, times: Times, tokens: int) -> None:
        self._counters["tgi_request_success", ""].inc()
        self._observe("tgi_request_duration", times.total)
        self._observe("tgi_request_validation_duration", times.validation)
        self._observe("tgi_request_queue_duration", times.queue)
        self._observe("tgi_request_inference_duration", times.inference)
        self._observe("tgi_request_mean_time_per_token_duration", times.inference / tokens)
        self._observe("tgi_request_generated_tokens", tokens)

    def failed(self, kind: Kind) -> None:
        if kind.label is not None:
            self._counters["tgi_request_failure", kind.label].inc()

    def dropped(self) -> None:
        """The client went away before its generation was complete."""
        self._counters["tgi_request_failure", "dropped"].inc()

    def stepped(self, stats: StepStats) -> None:
        self._gauges["tgi_batch_current_size"].set(stats.running)
        self._gauges["tgi_batch_current_max_tokens"].set(stats.batch_tokens)
        if not stats.prefill_rows + stats.decode_rows:
            return
        method = "prefill" if stats.prefill_rows else "decode"
        self._counters["tgi_batch_inference_count", method].inc()
        self._counters["tgi_batch_inference_success", method].inc()
        self._observe("tgi_batch_inference_duration", stats.duration, method)
        self._observe("tgi_batch_forward_duration", stats.forward, method)
        self._observe("tgi_batch_decode_duration", stats.sample, method)
        self._observe("tgi_batch_filter_duration", max(0.0, stats.duration - stats.forward - stats.sample), method)
        if stats.admitted:
            self._observe("tgi_batch_next_size", stats.admitted)
            if stats.prefill_rows + stats.decode_rows > stats.admitted:
                self._counters["tgi_batch_concat", "chunking"].inc()

    def expose(self, queued: int) -> bytes:
        """Prometheus text with TGI's names."""
        self._gauges["tgi_queue_size"].set(queued)
        return _FOREIGN.sub(b"", generate_latest(self._registry))

    def _observe(self, name: str, value: float, label: str = "") -> None:
        self._histograms[name, label].observe(value)
