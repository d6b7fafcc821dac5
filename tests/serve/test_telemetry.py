"""What operators see of a whole server: traces at a collector, the log as JSON, every panel of their dashboard."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.dashboard import empty_panels
from tests.router.collector import Collector
from tests.serve.conftest import Server

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def stopped(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The last scrape and the whole log of a server that had requests of several kinds, two of them at once."""
    options = ["--device", "cpu", "--json-output", "--otlp-endpoint", collector.url, "--otlp-service-name", "mine"]
    server = Server(*options, log=tmp_path_factory.mktemp("telemetry") / "log").wait_ready()
    joined = threading.Thread(target=server.generate, args=("Water boils",), kwargs={"max_new_tokens": 4})
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 48, "ignore_eos": True}}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=120) as response:
        for event in response.iter_lines():
            if event and joined.ident is None:
                joined.start()
    joined.join()
    server.generate("The capital of France is", max_new_tokens=2, do_sample=True, seed=3)
    assert httpx.post(f"{server.url}/generate", json={"inputs": "", "parameters": {}}).status_code == 422
    scrape = httpx.get(f"{server.url}/metrics").text
    assert server.stop() == 0, server.output
    return scrape, server.output


def test_every_panel_of_tgi_s_dashboard_has_data(stopped: tuple[str, str]) -> None:
    assert empty_panels(stopped[0]) == []


def test_traces(stopped: tuple[str, str], collector: Collector) -> None:
    roots = [span for span in collector.spans if not span.parent]
    assert sorted(root.name for root in roots) == ["generate", "generate", "generate", "generate_stream"]
    assert {span.service for span in collector.spans} == {"mine"}
    assert collector.named("generate_stream").attributes["gen_ai.usage.output_tokens"] == 48
    known = {span.id: span for span in collector.spans}
    inner = [span for span in collector.spans if span.parent]
    assert len(inner) == 3 * 5
    for span in inner:  # times of two processes, which have one clock
        assert known[span.parent].begin <= span.begin <= span.end <= known[span.parent].end


def test_the_log_is_json_in_two_shapes(stopped: tuple[str, str]) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in stopped[1].splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"]) for line in lines)
    launcher = [line for line in lines if line["target"] == "text_generation_launcher"]
    assert all(line.keys() == {"timestamp", "level", "fields", "target"} for line in launcher)
    assert any(line["fields"]["message"].startswith("Connected") for line in launcher)
    requests = [line for line in lines if line["target"] == "text_generation_router::server"]
    assert [line["message"] for line in requests] == ["Success"] * 3 + [
        "Input validation error: `inputs` cannot be empty"
    ]
    assert [line["level"] for line in requests] == ["INFO"] * 3 + ["WARN"]
    last = requests[2]
    assert last["filename"] == "tgi/router/journal.py" and last["spans"] == [last["span"]]
    assert last["span"]["name"] == "generate" and last["span"]["seed"] == "Some(3)"
    assert "France" not in stopped[1] and "Water" not in stopped[1]
