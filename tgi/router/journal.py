"""What is written down about one HTTP request: its lines in the log, in TGI's words, and the facts for its span.

Knows parameters, counts and times; prompts and answers never come here.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from tgi.core.errors import RequestError
from tgi.core.telemetry import Span, duration
from tgi.router.wire.native import GenerateParameters

if TYPE_CHECKING:
    from tgi.router.pipeline import Run

log = logging.getLogger("tgi.router.server")
"""Its target is ``text_generation_router::server``, as in TGI: parsers of logs look for it."""

_TGI = (
    "best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample max_new_tokens "
    "return_full_text stop truncate watermark details decoder_input_details seed top_n_tokens grammar adapter_id"
).split()
"""TGI's fields in TGI's order are always shown, ours if they were set."""
_DEFAULTS = msgspec.structs.asdict(GenerateParameters())
_SECRET = ("cache_salt",)
_SHOWN = [*_TGI, *(name for name in _DEFAULTS if name not in (*_TGI, *_SECRET))]
_LONGEST = 200
"""Characters of a value: stop strings, biases and grammars can be as long as a body. Messages get five times that."""


MOST = 32
"""Generations of one request that are written about: a call for embeddings can have thousands."""


class Journal:
    """Of one request. Every generation in it leaves one line, whatever becomes of it."""

    def __init__(self, name: str = "") -> None:
        """``name``: TGI's for the span."""
        self.name = name
        self.runs: list[Run] = []
        """The first that the engine was given."""
        self.error: RequestError | None = None
        self.input_tokens = 0
        """Of all generations; choices of one prompt come in a row and share it."""
        self.output_tokens = 0
        self._prompt: list[int] = []

    def began(self, run: "Run") -> None:
        if run.generation.token_ids is not self._prompt:
            self._prompt = run.generation.token_ids
            self.input_tokens += len(self._prompt)
        if len(self.runs) < MOST:
            self.runs.append(run)

    def finished(self, run: "Run") -> None:
        self.output_tokens += run.tokens
        if run in self.runs and log.isEnabledFor(logging.INFO):
            log.info("Success", extra={"span": Span(self.name, fields_of(run))})

    def dropped(self, run: "Run") -> None:
        """The client left, or another generation of its request failed."""
        self.output_tokens += run.tokens
        if run not in self.runs:
            return
        span = Span(self.name, {"parameters": Debug(run.generation.parameters)})
        log.info("Dropped after %d tokens", run.tokens, extra={"span": span})

    def failed(self, error: RequestError) -> None:
        self.error = error
        fields = {"parameters": Debug(self.runs[0].generation.parameters)} if self.runs else {}
        level = logging.ERROR if error.kind.ours else logging.WARNING
        log.log(level, "%s", _cut(error.message, 5 * _LONGEST), extra={"span": Span(self.name, fields)})


@dataclass(frozen=True, slots=True)
class Debug:
    """Parameters as Rust's ``{:?}`` writes them."""

    parameters: GenerateParameters

    def __str__(self) -> str:
        values = ((name, getattr(self.parameters, name)) for name in _SHOWN)
        shown = (
            f"{name}: {_optional(value) if _DEFAULTS[name] is None else _debug(value)}"
            for name, value in values
            if name in _TGI or value != _DEFAULTS[name]
        )
        return f"GenerateParameters {{ {', '.join(shown)} }}"


def fields_of(run: "Run") -> dict[str, object]:
    """What TGI records of a finished generation."""
    times, seed = run.times, run.generation.seed
    return {
        "parameters": Debug(run.generation.parameters),
        "total_time": duration(times.total),
        "validation_time": duration(times.validation),
        "queue_time": duration(times.queue),
        "inference_time": duration(times.inference),
        "time_per_token": duration(times.inference / max(1, run.tokens)),
        "seed": _optional(seed),
    }


def _optional(value: object) -> str:
    return "None" if value is None else f"Some({_debug(value)})"


def _debug(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if isinstance(value, int | float) else msgspec.json.encode(value).decode()
    return _cut(text, _LONGEST)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"
