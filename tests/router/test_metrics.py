"""The metrics' names, types and buckets against TGI's, and what requests and steps leave in them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.dashboard import PANELS, empty_panels
from tests.router.serving import LIMITS, Router, settings, until
from tgi.core.board import Board
from tgi.core.messages import StepStats
from tgi.router.metrics import TABLE, Metrics

TYPES = {
    "tgi_request_count": "counter",
    "tgi_request_success": "counter",
    "tgi_request_failure": "counter",
    "tgi_request_duration": "histogram",
    "tgi_request_validation_duration": "histogram",
    "tgi_request_queue_duration": "histogram",
    "tgi_request_inference_duration": "histogram",
    "tgi_request_mean_time_per_token_duration": "histogram",
    "tgi_request_time_to_first_token_duration": "histogram",
    "tgi_request_inter_token_duration": "histogram",
    "tgi_request_generated_tokens": "histogram",
    "tgi_request_input_length": "histogram",
    "tgi_request_max_new_tokens": "histogram",
    "tgi_request_skipped_tokens": "histogram",
    "tgi_request_cached_tokens": "counter",
    "tgi_queue_size": "gauge",
    "tgi_batch_next_size": "histogram",
    "tgi_batch_current_size": "gauge",
    "tgi_batch_current_max_tokens": "gauge",
    "tgi_batch_max_total_tokens": "gauge",
    "tgi_batch_inference_count": "counter",
    "tgi_batch_inference_success": "counter",
    "tgi_batch_inference_failure": "counter",
    "tgi_batch_inference_duration": "histogram",
    "tgi_batch_forward_duration": "histogram",
    "tgi_batch_decode_duration": "histogram",
    "tgi_batch_filter_duration": "histogram",
    "tgi_batch_concat": "counter",
    "tgi_batch_concat_duration": "histogram",
    "tgi_batch_preempted": "counter",
    "tgi_engine_restarts": "counter",
    "tgi_grammar_forced_tokens": "counter",
}
"""TGI's and five of ours: time to the first token and between tokens, cached tokens, preemptions, forced tokens."""


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    with Router(settings(tmp_path)) as router:
        yield router


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def bounds(family: Metric) -> list[float]:
    return [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in metrics.expose(0).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_names_and_types() -> None:
    text = Metrics(LIMITS, Board()).expose(0).decode()
    assert {name: family.type for name, family in families(text).items()} == TYPES
    assert "_created" not in text
    assert "_count_total" not in text
    assert "\ntgi_request_count 0\n" in text
    assert '\ntgi_request_failure{err="dropped"} 0\n' in text
    assert '\ntgi_batch_next_size_bucket{le="1"} 0\n' in text  # TGI writes whole bounds without a point


def test_buckets() -> None:
    found = families(Metrics(LIMITS, Board()).expose(0).decode())
    seconds = [0.0001 * 1.5**i for i in range(1, 36)]
    assert bounds(found["tgi_request_duration"]) == pytest.approx([*seconds, float("inf")])
    assert bounds(found["tgi_batch_inference_duration"]) == pytest.approx([*seconds, float("inf")] * 2)
    assert bounds(found["tgi_request_input_length"]) == [*range(1, 101), float("inf")]
    assert bounds(found["tgi_request_generated_tokens"]) == [*range(2, 202, 2), float("inf")]
    assert bounds(found["tgi_request_max_new_tokens"]) == [*range(2, 202, 2), float("inf")]
    assert bounds(found["tgi_batch_next_size"]) == [*range(1, 1025), float("inf")]
    assert bounds(found["tgi_request_skipped_tokens"])[:2] == [0, 1]


def test_content_type(router: Router) -> None:
    response = router.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert router.metric("tgi_batch_max_total_tokens") == LIMITS.max_batch_total_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_counts_once(router: Router, stream: bool) -> None:
    ids = router.says("the dog</s>")
    assert router.http.post("/", json={"inputs": "hello", "stream": stream}).status_code == 200
    assert router.chat(stream=stream).status_code == 200
    assert router.complete(prompt=["a", "dog"], stream=stream).status_code == 200
    assert router.metric("tgi_request_count") == router.metric("tgi_request_success") == 4
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration"):
        assert router.metric(f"tgi_request_{name}_count") == 4
    assert router.metric("tgi_request_mean_time_per_token_duration_count") == 4
    assert router.metric("tgi_request_generated_tokens_sum") == 4 * len(ids)
    assert router.metric("tgi_request_input_length_count") == 4
    assert router.metric("tgi_request_max_new_tokens_count") == 4
    assert router.metric("tgi_request_skipped_tokens_count") == 4 * len(ids)
    assert router.metric("tgi_request_skipped_tokens_sum") == 0
    assert router.metric('tgi_request_failure{err="validation"}') == 0


def test_best_of_is_one_request(router: Router) -> None:
    router.says("a</s>")
    assert router.generate(best_of=2, do_sample=True).status_code == 200
    for name in ("count", "success", "duration_count", "input_length_count"):
        assert router.metric(f"tgi_request_{name}") == 1


def test_failures_by_cause(router: Router) -> None:
    router.generate(top_k=0)
    router.generate(best_of=9)
    router.http.post("/generate_stream", json={"inputs": "x", "parameters": {"best_of": 2}})
    router.complete(suffix="x")
    router.complete(prompt=list("abcde"))
    router.chat(adapter_id="x")
    assert router.metric('tgi_request_failure{err="validation"}') == 6
    router.chat(continue_final_message=True, messages=[])
    assert router.metric('tgi_request_failure{err="template"}') == 1
    assert router.metric("tgi_request_count") == 6 + 4 + 1
    assert router.metric("tgi_request_success") == 0


def test_what_tells_nothing_of_requests_counts_none(router: Router) -> None:
    for path in ("/health", "/info", "/v1/models"):
        router.http.get(path)
    router.http.post("/tokenize", json={"inputs": "x"})
    router.http.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "x"}]})
    assert router.metric("tgi_request_count") == 0


def test_queue_size_is_that_of_the_moment(router: Router) -> None:
    router.engine.pause()
    with router.http.stream("POST", "/v1/completions", json={"prompt": ["a", "dog"], "stream": True}) as response:
        assert router.metric("tgi_queue_size") == 2
        router.engine.resume()
        response.read()
    assert router.metric("tgi_queue_size") == 0


def test_steps() -> None:
    metrics = Metrics(LIMITS, Board())
    metrics.stepped(
        StepStats(
            prefill_rows=2,
            decode_rows=3,
            duration=1.0,
            forward=0.5,
            sample=0.25,
            running=5,
            admitted=2,
            planning=0.125,
            preempted=1,
            forced=7,
        )
    )
    metrics.stepped(StepStats(decode_rows=5, duration=0.5, forward=0.5, running=4, batch_tokens=64))
    lines = series(metrics)
    for method in ("prefill", "decode"):
        assert lines[f'tgi_batch_inference_count{{method="{method}"}}'] == 1.0
        assert lines[f'tgi_batch_inference_success{{method="{method}"}}'] == 1.0
    assert lines['tgi_batch_inference_duration_sum{method="prefill"}'] == 1.0
    assert lines['tgi_batch_forward_duration_sum{method="prefill"}'] == 0.5
    assert lines['tgi_batch_decode_duration_sum{method="prefill"}'] == 0.25
    assert lines['tgi_batch_filter_duration_sum{method="prefill"}'] == 0.125
    assert lines['tgi_batch_filter_duration_sum{method="decode"}'] == 0.0
    assert lines["tgi_batch_next_size_count"] == 1.0
    assert lines["tgi_batch_next_size_sum"] == 2.0
    assert lines['tgi_batch_concat{reason="chunking"}'] == 1
    assert lines['tgi_batch_concat_duration_sum{method="decode"}'] == 0.125
    assert lines['tgi_batch_concat_duration_count{method="decode"}'] == 1
    assert lines["tgi_batch_preempted"] == 1
    assert lines["tgi_grammar_forced_tokens"] == 7
    assert lines["tgi_batch_current_size"] == 4.0
    assert lines["tgi_batch_current_max_tokens"] == 64.0
    metrics.stepped(StepStats())
    lines = series(metrics)
    assert lines["tgi_batch_current_size"] == lines["tgi_batch_current_max_tokens"] == 0.0
    assert lines['tgi_batch_inference_count{method="decode"}'] == 1.0


def test_speculated_tokens_are_those_beyond_the_first(tmp_path: Path) -> None:
    with Router(settings(tmp_path), per_step=3) as router:
        assert router.generate(max_new_tokens=6).status_code == 200
        assert router.metric("tgi_request_skipped_tokens_count") == 2
        assert router.metric("tgi_request_skipped_tokens_sum") == 4


def test_every_panel_of_tgi_s_dashboard_has_data(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        assert len(empty_panels(router.http.get("/metrics").text)) == len(PANELS) - 3
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 100}}
        with router.http.stream("POST", "/generate_stream", json=body) as response:
            until(lambda: router.metric("tgi_request_skipped_tokens_count") > 1)
            assert router.generate(max_new_tokens=2).status_code == 200
            assert router.metric("tgi_batch_current_size") == 1
            response.read()
        assert router.generate(top_k=0).status_code == 422
        assert empty_panels(router.http.get("/metrics").text) == []


def test_times_to_the_first_token_and_between_tokens(tmp_path: Path) -> None:
    with Router(settings(tmp_path), cached=3, delay=0.001) as router:
        assert router.generate(max_new_tokens=5).status_code == 200
        assert router.metric("tgi_request_time_to_first_token_duration_count") == 1
        assert router.metric("tgi_request_inter_token_duration_count") == 4
        first = router.metric("tgi_request_time_to_first_token_duration_sum")
        between = router.metric("tgi_request_inter_token_duration_sum")
        assert first > 0.001 and between > 0.004
        assert first + between <= router.metric("tgi_request_duration_sum")
        assert router.metric("tgi_request_cached_tokens") == 3


def test_an_engine_that_is_lost_has_failed_a_batch(tmp_path: Path) -> None:
    with Router(settings(tmp_path), die_after=2) as router:
        with router.send_raw("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 5}}):
            until(lambda: not router.service.client.connected)
        until(lambda: router.service.client.open == 0)
        assert router.metric('tgi_batch_inference_failure{method="decode"}') == 1
        assert router.metric('tgi_batch_inference_success{method="decode"}') == 1
        assert router.metric('tgi_batch_inference_count{method="decode"}') == 2
        assert router.metric("tgi_batch_current_size") == router.metric("tgi_batch_current_max_tokens") == 0
        assert router.metric("tgi_engine_restarts") == 0
        router.engine.start()
        until(lambda: router.service.client.connected)
        assert router.metric("tgi_engine_restarts") == 1


def test_the_document_has_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
    assert re.findall(r"^\| `(tgi_\w+)` \|", page, re.MULTILINE) == list(TABLE)
