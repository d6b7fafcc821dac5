"""The lines that requests leave in the log."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.router.serving import Router, settings, until
from tgi.core.telemetry import ROUTER, Formatter
from tgi.router.journal import MOST

FORMAT = Formatter(ROUTER, json_output=False)
SERVER = "tgi.router.server"


@pytest.fixture
def router(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Router]:
    caplog.set_level(logging.INFO, SERVER)
    with Router(settings(tmp_path)) as router:
        yield router


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was written about requests, without the time."""
    return [FORMAT.format(record).partition("Z ")[2] for record in caplog.records if record.name == SERVER]


PLACE = r"text_generation_router::server: tgi/router/journal\.py:\d+: "
DURATION = r'"\d+(\.\d+)?(ns|µs|ms|s)"'
TIMES = " ".join(
    f"{name}={DURATION}" for name in ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token")
)


def test_success_in_tgi_s_words(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    assert router.generate(max_new_tokens=2, temperature=0.5, seed=7, stop=["a\nb"], details=True).status_code == 200
    (line,) = lines(caplog)
    parameters = (
        "GenerateParameters { best_of: None, temperature: Some(0.5), repetition_penalty: None, "
        "frequency_penalty: None, top_k: None, top_p: None, typical_p: None, do_sample: false, "
        r'max_new_tokens: Some(2), return_full_text: None, stop: ["a\nb"], truncate: None, watermark: false, '
        "details: true, decoder_input_details: false, seed: Some(7), top_n_tokens: None, grammar: None, "
        "adapter_id: None }"
    )
    assert re.fullmatch(
        rf' INFO generate{{parameters={re.escape(parameters)} {TIMES} seed="Some\(7\)"}}: {PLACE}Success', line
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_for_each_generation_under_the_route_s_name(
    router: Router, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    router.http.post("/", json={"inputs": "x", "stream": stream, "parameters": {"max_new_tokens": 2}})
    router.chat(stream=stream, max_tokens=2, temperature=0)
    router.complete(prompt=["a", "dog"], stream=stream, max_tokens=2)
    found = lines(caplog)
    assert [line.partition("{")[0] for line in found] == [
        " INFO compat_generate",
        " INFO chat_completions",
        " INFO completions",
        " INFO completions",
    ]
    assert all(line.endswith(": Success") for line in found)
    assert 'seed="None"' in found[1] and 'seed="Some(' in found[2]


def test_best_of_is_one_generation(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    assert router.generate(best_of=2, do_sample=True, max_new_tokens=1).status_code == 200
    assert len(lines(caplog)) == 1


def test_the_client_s_error_is_a_warning_and_the_server_s_an_error(
    router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    router.generate(top_k=0)
    router.http.post("/generate_stream", json={"inputs": ""})
    router.reply = lambda submit: "no\nway"
    router.generate(max_new_tokens=3)
    router.http.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 3})
    first, second, third, fourth = lines(caplog)
    assert re.fullmatch(rf" WARN generate: {PLACE}Input validation error: `top_k` must be strictly positive", first)
    assert re.fullmatch(rf" WARN generate_stream: {PLACE}Input validation error: `inputs` cannot be empty", second)
    failure = r"Request failed during generation: Server error: no\\nway"
    assert re.fullmatch(rf"ERROR generate{{parameters=GenerateParameters {{ .*}}}}: {PLACE}{failure}", third)
    assert re.fullmatch(rf"ERROR completions{{parameters=GenerateParameters {{ .*}}}}: {PLACE}{failure}", fourth)


def test_a_client_that_leaves(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    router.engine.pause()
    connection = router.send_raw("/generate", {"inputs": "x"})
    until(lambda: bool(router.engine.submits))
    connection.close()
    until(lambda: router.service.client.open == 0)
    router.engine.resume()
    (line,) = lines(caplog)
    assert line.startswith(" INFO generate{parameters=") and line.endswith(": Dropped after 0 tokens")


def test_what_tells_nothing_of_requests_leaves_no_line(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/info", "/metrics", "/nowhere"):
        router.http.get(path)
    router.http.post("/tokenize", json={"inputs": "x"})
    router.http.post("/generate", content=b"{")
    assert lines(caplog) == []


def test_neither_prompts_nor_answers_nor_secrets(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    router.says("the dog</s>")
    for request in ({}, {"top_p": 7}, {"stream": True}, {"cache_salt": "sesame"}):
        router.chat(messages=[{"role": "user", "content": "quick brown"}], **request)
    router.generate("quick brown", cache_salt="sesame")
    router.http.post("/generate", content=b'{"inputs": "quick', headers={"content-type": "application/json"})
    router.reply = lambda submit: "broken"
    router.generate("quick brown")
    assert len(lines(caplog)) == 6
    text = "\n".join(FORMAT.format(record) for record in caplog.records if record.name.startswith("tgi"))
    assert not re.search("quick|brown|dog|sesame", text)


def test_nobody_writes_lines_of_their_own(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    evil = "\n2026-01-01T00:00:00Z  INFO fine\x1b[2J"
    router.generate(stop=[evil], max_new_tokens=1)
    router.generate(adapter_id=evil)
    router.generate(max_new_tokens=1, stop=["x" * 90_000])
    router.chat(max_tokens=1, model=evil, user=evil)
    for line in lines(caplog):
        assert "\n" not in line and "\x1b" not in line and len(line) < 3000
    assert len(lines(caplog)) == 4


def test_a_call_with_thousands_of_parts_fills_no_log(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    response = router.http.post("/v1/embeddings", json={"input": ["a", "dog"] * 50})
    assert response.status_code == 200
    assert [line.partition("{")[0] for line in lines(caplog)] == [" INFO embeddings"] * MOST
