"""Spans of requests, sent to a collector by OTLP: made when a request has ended, from the times that are known then.

The only module that imports OpenTelemetry, and only when a Tracer is made: who doesn't trace pays nothing. The
``gen_ai`` attributes are those of its semantic conventions for generative models, which are not final yet.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tgi import __version__
from tgi.core.config import Settings
from tgi.core.errors import StartupError
from tgi.core.telemetry import escape
from tgi.router.call import Call
from tgi.router.journal import Journal, fields_of

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue


FAREWELL = 3.0
"""Seconds to send the last spans when the router stops."""

_PACKAGES = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http"
_OPERATIONS = {"chat_completions": "chat", "messages": "chat", "responses": "chat", "embeddings": "embeddings"}
_FINISH = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


class Tracer:
    """Sends spans in batches from a thread of its own. What a collector doesn't take is dropped in the end; requests
    never wait for it. All spans are sent, as in TGI, whatever a parent says of sampling."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartupError if OpenTelemetry isn't installed."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._exporter = _exporter(settings.otlp_endpoint or "")
        except ImportError as error:
            raise StartupError(f"`--otlp-endpoint` needs packages: pip install {_PACKAGES} ({error})") from None
        # A collector that is down is worth a line for each batch that is lost, not one for each attempt.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
        resource = Resource.create({"service.name": settings.otlp_service_name, "service.version": __version__})
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("tgi.router", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = settings.model.model_id

    def record(self, journal: Journal, call: Call, method: str, route: str) -> None:
        """The spans of a request that has ended."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        wall, now = time.time_ns(), time.monotonic()

        def at(moment: float) -> int:
            return wall - round((now - moment) * 1e9)

        def write(name: str, parent: "Context", begin: float, end: float) -> "Context":
            span = self._tracer.start_span(name, parent, start_time=at(begin))
            span.end(at(end))
            return set_span_in_context(span, parent)

        headers = {name: call.header(name.encode()).decode("latin-1") for name in ("traceparent", "tracestate")}
        parent = self._propagator.extract(headers, Context())
        root = self._tracer.start_span(journal.name, parent, SpanKind.SERVER, start_time=at(call.arrived))
        inside = set_span_in_context(root, parent)
        root.set_attributes({"http.request.method": method, "http.route": route})
        if call.status:
            root.set_attribute("http.response.status_code", call.status)
        if journal.error is not None:
            root.set_attribute("error.type", journal.error.kind.type)
            if journal.error.kind.ours:
                root.set_status(StatusCode.ERROR, escape(journal.error.message))
        elif any(run.finish is None for run in journal.runs):
            root.set_attribute("error.type", "dropped")
        if journal.runs:
            root.set_attributes(self._attributes(journal, call.arrived))
            write("validate", inside, call.arrived, min(run.ticket.submitted for run in journal.runs))
        for run in journal.runs:
            ticket = run.ticket
            write("queued", inside, ticket.submitted, ticket.started or ticket.finished)
            if ticket.started:
                infer = write("infer", inside, ticket.started, ticket.finished)
                write("prefill", infer, ticket.started, ticket.first_token or ticket.finished)
                if ticket.first_token:
                    write("decode", infer, ticket.first_token, ticket.finished)
        root.end(wall)

    def close(self) -> None:
        """Send what is left, but not for ever."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(FAREWELL)
        if closing.is_alive():
            self._exporter.shutdown()

    def _attributes(self, journal: Journal, arrived: float) -> "dict[str, AttributeValue]":
        runs = journal.runs
        first, sampling = runs[0], runs[0].generation.sampling
        found: dict[str, AttributeValue] = {
            "gen_ai.operation.name": _OPERATIONS.get(journal.name, "text_completion"),
            "gen_ai.provider.name": "text-generation-inference",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": first.generation.max_new_tokens,
            "gen_ai.response.finish_reasons": [_FINISH[run.finish] for run in runs if run.finish],
            "gen_ai.usage.input_tokens": journal.input_tokens,
            "gen_ai.usage.output_tokens": journal.output_tokens,
        }
        if not sampling.greedy:
            found["gen_ai.request.temperature"] = sampling.temperature
            found["gen_ai.request.top_p"] = sampling.top_p
            found["gen_ai.request.top_k"] = float(sampling.top_k)
        prompts = {id(run.generation.token_ids): run for run in reversed(runs)}.values()  # the first choice of each
        if sum(len(run.generation.token_ids) for run in prompts) == journal.input_tokens:  # all were written about
            found["gen_ai.usage.cache_read.input_tokens"] = sum(run.cached for run in prompts)
        if spoke := [run.ticket.first_token for run in runs if run.ticket.first_token]:
            found["gen_ai.response.time_to_first_chunk"] = min(spoke) - arrived
        if first.finish is not None:
            found |= {name: str(value) for name, value in fields_of(first).items()}
        return found


def _exporter(endpoint: str) -> "SpanExporter":
    """OTLP by gRPC, as TGI speaks it; by HTTP if the URL has a path, or HTTP's port."""
    url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    if url.path.strip("/") or url.port == 4318:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        path = url.path if url.path.strip("/") else "/v1/traces"
        return HttpExporter(url._replace(path=path).geturl())
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(url.geturl(), insecure=url.scheme == "http")
