"""Spans as a collector gets them from a real router."""

import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.router.collector import Collector
from tests.router.serving import Router, settings, until
from tgi.core.errors import StartupError
from tgi.router import tracing
from tgi.router.app import build
from tgi.router.journal import MOST

DURATION = re.compile(r"\d+(\.\d+)?(ns|µs|ms|s)")
ERROR, SERVER, UNSET = 2, 2, 0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(folder: Path, act: Callable[[Router], object], **changes: Any) -> Collector:
    """What a collector has when a router that did ``act`` has stopped."""
    with Collector() as collector:
        with Router(settings(folder, otlp_endpoint=collector.url, **changes)) as router:
            act(router)
        return collector


def check_tree(collector: Collector) -> None:
    """Children lie within their parents in time; all belong to the first span's trace."""
    known = {span.id: span for span in collector.spans}
    for span in collector.spans:
        assert span.begin <= span.end
        if parent := known.get(span.parent):
            assert span.trace == parent.trace
            assert parent.begin <= span.begin and span.end <= parent.end, (span.name, parent.name)


def test_a_generation(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        router.says("the dog</s>")
        assert router.generate(max_new_tokens=7, temperature=0.5, seed=2**63 + 1).status_code == 200

    before = time.time_ns()
    collector = spans(tmp_path, act)
    check_tree(collector)
    assert {span.service for span in collector.spans} == {"text-generation-inference.router"}
    root = collector.named("generate")
    assert (root.parent, root.kind, root.status) == (b"", SERVER, UNSET)
    assert before <= root.begin <= root.end <= time.time_ns()
    for name in ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token"):
        assert DURATION.fullmatch(root.attributes.pop(name))
    assert 0 < root.attributes.pop("gen_ai.response.time_to_first_chunk") < 10
    parameters = root.attributes.pop("parameters")
    assert parameters.startswith("GenerateParameters { best_of: None, temperature: Some(0.5), ")
    assert "max_new_tokens: Some(7)" in parameters
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "text-generation-inference",
        "gen_ai.request.model": "a/model",
        "gen_ai.response.model": "a/model",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0.0,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "seed": "Some(9223372036854775809)",
    }
    for name, parent in (("validate", root), ("queued", root), ("infer", root)):
        assert collector.named(name).parent == parent.id
    infer = collector.named("infer")
    prefill, decode = collector.named("prefill"), collector.named("decode")
    assert prefill.parent == decode.parent == infer.id
    assert prefill.begin == infer.begin and prefill.end == decode.begin and decode.end == infer.end
    assert len(collector.spans) == 6


def test_every_route_that_works_has_its_span_by_tgi_s_name(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        router.says("the dog</s>")
        router.http.post("/", json={"inputs": "x", "stream": True})
        router.http.post("/generate_stream", json={"inputs": "x"})
        router.chat(n=2)
        router.complete(prompt=["a", "dog"], stream=True)
        router.http.post("/tokenize", json={"inputs": "x"})
        router.http.post("/invocations", json={"inputs": "x"})
        router.http.post("/vertex", json={"instances": [{"inputs": "x"}]})
        for path in ("/health", "/info", "/metrics", "/v1/models"):
            router.http.get(path)

    collector = spans(tmp_path, act, otlp_service_name="mine")
    check_tree(collector)
    assert {span.service for span in collector.spans} == {"mine"}
    roots = [span for span in collector.spans if not span.parent]
    assert sorted(root.name for root in roots) == sorted(
        "compat_generate generate_stream chat_completions completions tokenize sagemaker_compatibility "
        "vertex_compatibility".split()
    )
    chat = collector.named("chat_completions")
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    assert chat.attributes["gen_ai.usage.output_tokens"] == 6
    children = [span.name for span in collector.spans if span.parent == chat.id]
    assert children == ["validate", "queued", "infer", "queued", "infer"]
    completions = collector.named("completions")
    assert completions.attributes["gen_ai.usage.input_tokens"] == 1 + 2
    assert "gen_ai.operation.name" not in collector.named("tokenize").attributes


def test_embeddings_have_sums_but_not_a_span_for_each(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        assert router.http.post("/v1/embeddings", json={"input": ["a", "dog"] * 50}).status_code == 200

    collector = spans(tmp_path, act)
    check_tree(collector)
    root = collector.named("embeddings")
    assert root.attributes["gen_ai.operation.name"] == "embeddings"
    assert root.attributes["gen_ai.usage.input_tokens"] == 50 * (1 + 2)
    assert root.attributes["gen_ai.usage.output_tokens"] == 0
    assert "gen_ai.usage.cache_read.input_tokens" not in root.attributes
    assert [span.name for span in collector.spans].count("infer") == MOST


def test_no_text_of_clients_or_models_is_in_spans(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        router.says("the dog</s>")
        router.generate("quick brown")
        router.chat(messages=[{"role": "user", "content": "quick brown"}], user="me")
        router.chat(messages=[{"role": "user", "content": "quick brown"}], top_p=7)

    collector = spans(tmp_path, act)
    assert len(collector.spans) > 10
    assert not re.search("quick|brown|dog", str(collector.spans))


@pytest.mark.parametrize(
    ("header", "follows"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", True),
        (f"cc-{TRACE}-{PARENT}-01", True),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{TRACE}-{PARENT}", False),
        (f"00-{TRACE}-{PARENT}-01-x", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE[:-1]}g-{PARENT}-01", False),
        ("\xff\xfe", False),
        ("", False),
    ],
)
def test_traceparent(tmp_path: Path, header: str, follows: bool) -> None:
    def act(router: Router) -> None:
        headers = {b"traceparent": header.encode("latin-1"), b"tracestate": b"vendor=x"}
        response = router.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers)
        assert response.status_code == 200

    root = spans(tmp_path, act).named("completions")
    assert (root.trace.hex() == TRACE, root.parent.hex() == PARENT) == (follows, follows)
    assert root.trace_state == ("vendor=x" if follows else "")
    assert follows or not root.parent


def test_the_client_s_error(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        assert router.generate(top_k=0).status_code == 422
        assert router.http.post("/generate_stream", json={"inputs": ""}).status_code == 200

    collector = spans(tmp_path, act)
    for name, status in (("generate", 422), ("generate_stream", 200)):
        span = collector.named(name)
        assert (span.status, span.attributes["error.type"]) == (UNSET, "validation")
        assert span.attributes["http.response.status_code"] == status
    assert len(collector.spans) == 2


def test_an_unreadable_body(tmp_path: Path) -> None:
    span = spans(tmp_path, lambda router: router.http.post("/generate", content=b"{")).named("generate")
    assert span.attributes["http.response.status_code"] == 415 and span.status == UNSET


def test_the_server_s_error(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        router.reply = lambda submit: "no\nway"
        assert router.generate().status_code == 424

    collector = spans(tmp_path, act)
    root = collector.named("generate")
    assert (root.status, root.attributes["error.type"]) == (ERROR, "generation")
    assert root.message == r"Request failed during generation: Server error: no\nway"
    assert "total_time" not in root.attributes
    assert [span.name for span in collector.spans if span.parent == root.id] == ["validate", "queued"]


def test_a_client_that_leaves(tmp_path: Path) -> None:
    def act(router: Router) -> None:
        router.engine.pause()
        connection = router.send_raw("/generate", {"inputs": "x"})
        until(lambda: bool(router.engine.submits))
        connection.close()
        until(lambda: router.service.client.open == 0)
        router.engine.resume()

    root = spans(tmp_path, act).named("generate")
    assert (root.status, root.attributes["error.type"]) == (UNSET, "dropped")
    assert root.attributes["gen_ai.response.finish_reasons"] == []
    assert "http.response.status_code" not in root.attributes


def test_by_http(tmp_path: Path) -> None:
    """To a path, and so not by gRPC: one POST with spans as protobuf."""
    got = []

    def listen(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            data = b""
            while b"generate" not in data:
                data += connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            got.append(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/otlp/v1/traces"
        with Router(settings(tmp_path, otlp_endpoint=url)) as router:
            assert router.generate(max_new_tokens=1).status_code == 200
        thread.join(10)
    assert got[0].startswith(b"POST /otlp/v1/traces HTTP/1.1\r\n") and b"application/x-protobuf" in got[0]


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("path", ["", "/v1/traces"])
def test_a_collector_that_is_down_disturbs_nobody(
    tmp_path: Path, listens: bool, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether its port is closed, or takes connections and never answers."""
    monkeypatch.setattr(tracing, "FAREWELL", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
        if not listens:
            listener.close()
        with Router(settings(tmp_path, otlp_endpoint=url)) as router:
            for _ in range(3):
                assert router.generate(max_new_tokens=3).status_code == 200
    # The exporter was stopped: it didn't give up by itself, which takes ten seconds.
    assert not re.search("Failed to export(?!.*Channel closed)", caplog.text)
    until(lambda: not any("Otel" in thread.name for thread in threading.enumerate()))


def test_without_the_flag_nothing_of_it_is_there(tmp_path: Path) -> None:
    service = build(settings(tmp_path))
    assert service.tracer is None
    service.validator.close()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"`--otlp-endpoint` needs packages: pip install opentelemetry-sdk "):
        build(settings(tmp_path, otlp_endpoint="http://127.0.0.1:1"))
