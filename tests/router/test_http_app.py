"""What holds for all routes: keys, bodies, limits, errors, and clients and engines that go away."""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import huggingface_hub
import openai
import pytest
from msgspec.structs import replace

from tests.router.serving import LIMITS, Router, events, settings, until
from tgi.router.app import build
from tgi.router.dialects import native
from tgi.router.routes import ROUTES

PROTECTED = sorted({re.sub("{.*?}", "x", row.path) for row in ROUTES if row.body is not None})
OTHER_ERRORS = {row.path for row in ROUTES if row.errors is not native.ERRORS}
OPEN = [
    "/",
    "/health",
    "/livez",
    "/readyz",
    "/ping",
    "/info",
    "/metrics",
    "/v1/models",
    "/docs/",
    "/api-doc/openapi.json",
]

LONG_ANSWER = {"inputs": "hello", "parameters": {"max_new_tokens": 150}}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"))) as router:
        router.says("a</s>")
        yield router


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"), api_key="Käse-1")) as router:
        yield router


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer käse-1", "Bearer Käse-12", "Käse-1", "Basic Käse-1"])
def test_no_key_no_answer(locked: Router, path: str, value: str | None) -> None:
    headers = {} if value is None else {b"authorization": value.encode()}
    response = locked.http.post(path, content=b"not even read", headers=headers)
    assert response.status_code == 401
    if path not in OTHER_ERRORS:
        assert response.content == b""


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_the_body_is_read(locked: Router, path: str, scheme: str) -> None:
    headers = {b"authorization": f"{scheme} Käse-1".encode(), b"content-type": b"application/json"}
    assert locked.http.post(path, content=b"{", headers=headers).status_code == 400


@pytest.mark.parametrize("path", OPEN)
def test_open_routes_need_no_key_and_answer_head(locked: Router, path: str) -> None:
    response = locked.http.get(path)
    assert response.status_code == 200
    head = locked.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.get("content-type") == response.headers.get("content-type")


def test_every_route_that_takes_a_body_is_protected() -> None:
    assert all(row.protected for row in ROUTES if row.body is not None)


@pytest.mark.parametrize("path", ["/nothing", "/generate/", "/v1", "/v2/models/x", "/docs/nothing"])
def test_unknown_paths(router: Router, path: str) -> None:
    response = router.http.get(path)
    assert (response.status_code, response.content) == (404, b"")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/generate", "POST"),
        ("POST", "/health", "GET,HEAD"),
        ("DELETE", "/", "GET,HEAD,POST"),
        ("OPTIONS", "/info", "GET,HEAD"),
    ],
)
def test_wrong_method(router: Router, method: str, path: str, allow: str) -> None:
    response = router.http.request(method, path)
    assert (response.status_code, response.content, response.headers["allow"]) == (405, b"", allow)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_other_content_types(router: Router, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = router.http.post("/generate", content=b'{"inputs":"x"}', headers=headers)
    assert response.status_code == 415
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "Expected request with `Content-Type: application/json`"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_content_types(router: Router, kind: str) -> None:
    response = router.http.post("/generate", content=b'{"inputs":"x"}', headers={"content-type": kind})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"inputs":"x"} y', b'{"inputs":"\xff"}', b'{"inputs":NaN}', b'{"x":' + b"[" * 90_000]
)
def test_what_is_not_json(router: Router, body: bytes) -> None:
    response = router.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text.startswith("Failed to parse the request body as JSON: ")


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/generate", {}, "Object missing required field `inputs`"),
        ("/generate", [], "Expected `object`, got `array`"),
        ("/generate", {"inputs": None}, "inputs: "),
        ("/generate", {"inputs": 5}, "inputs: "),
        ("/generate", {"inputs": "x", "parameters": None}, "parameters: "),
        ("/generate", {"inputs": "x", "parameters": {"top_k": "5"}}, "parameters.top_k: "),
        ("/generate", {"inputs": "x", "parameters": {"top_k": 1.0}}, "parameters.top_k: "),
        ("/generate", {"inputs": "x", "parameters": {"top_k": 2**31}}, "parameters.top_k: "),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": -1}}, "parameters.max_new_tokens: "),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2**32}}, "parameters.max_new_tokens: "),
        ("/generate", {"inputs": "x", "parameters": {"seed": -1}}, "parameters.seed: "),
        ("/generate", {"inputs": "x", "parameters": {"temperature": 1e39}}, "parameters.temperature: "),
        ("/generate", {"inputs": "x", "parameters": {"temperature": "1"}}, "parameters.temperature: "),
        ("/generate", {"inputs": "x", "parameters": {"details": 1}}, "parameters.details: "),
        ("/generate", {"inputs": "x", "parameters": {"do_sample": None}}, "parameters.do_sample: "),
        ("/generate", {"inputs": "x", "parameters": {"watermark": None}}, "parameters.watermark: "),
        ("/generate", {"inputs": "x", "parameters": {"stop": None}}, "parameters.stop: "),
        ("/generate", {"inputs": "x", "parameters": {"stop": "a"}}, "parameters.stop: "),
        ("/generate", {"inputs": "x", "parameters": {"stop": ["a", 1]}}, "parameters.stop[1]: "),
        ("/", {"inputs": "x", "stream": None}, "stream: "),
        ("/v1/chat/completions", {"messages": None}, "messages: "),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0]: "),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content",
        ),
        ("/v1/chat/completions", {"messages": [], "logit_bias": {"x": 1}}, "logit_bias: "),
        ("/v1/completions", {"prompt": []}, "Empty array detected. Do not use an empty array for the prompt."),
    ],
)
def test_json_of_another_type(router: Router, path: str, body: Any, where: str) -> None:
    response = router.http.post(path, json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text.startswith(f"Failed to deserialize the JSON body into the target type: {where}")


def test_integers_are_floats_and_unknown_fields_are_nobodys_business(router: Router) -> None:
    body = {"inputs": "x", "parameters": {"temperature": 2, "unheard_of": [1]}, "more": None}
    assert router.http.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/generate", '{"inputs": "a", "inputs": "b"}', "inputs"),
        ("/generate", '{"inputs": "a", "parameters": {"seed": 1, "top_k": 3, "s\\u0065ed": 1}}', "seed"),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a", "role": "system"}]}', "role"),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}', "5"),
        ("/v1/completions", '{"prompt": "a", "prompt": "b", "guided_json": {}}', "prompt"),
        ("/invocations", '{"inputs": "a", "stream": false, "stream": true}', "stream"),
        ("/vertex", '{"instances": [{"inputs": "a", "inputs": "b"}]}', "inputs"),
    ],
)
def test_a_key_that_comes_twice(router: Router, path: str, body: str, key: str) -> None:
    before = len(router.engine.submits)
    response = router.http.post(path, content=body.encode(), headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.text == f"Failed to deserialize the JSON body into the target type: duplicate field `{key}`"
    assert len(router.engine.submits) == before


def test_what_nobody_reads_must_be_json_and_nothing_else(router: Router) -> None:
    headers = {"content-type": "application/json"}
    number, text = b"1" + b"0" * 5000, b'"\xff"'
    for unread, status in ((number, 200), (b"-0.1e400", 200), (text, 400), (b"[" * 40_000 + b"]" * 40_000, 400)):
        response = router.http.post("/generate", content=b'{"inputs": "a", "x": %b}' % unread, headers=headers)
        assert response.status_code == status


@pytest.mark.parametrize("chunked", [False, True])
def test_payload_limit(router: Router, chunked: bool) -> None:
    body = b'{"inputs":"' + b"x" * LIMITS.payload_limit + b'"}'
    content = iter([body[:1000], body[1000:]]) if chunked else body
    response = router.http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.text == "Failed to buffer the request body: length limit exceeded"
    assert router.generate().status_code == 200


@pytest.mark.parametrize("pieces", [1, 2])
def test_an_offer_to_upgrade_is_not_heard(router: Router, pieces: int) -> None:
    """As Java's HttpClient sends it."""
    body = b'{"inputs":"hello"}'
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n"
    kind = b"Host: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    head = b"POST /generate HTTP/1.1\r\n" + offer + kind
    with socket.create_connection(router.address, 5) as client:
        for _ in range(2):
            for piece in (head + body,) if pieces == 1 else (head, body):
                client.sendall(piece)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_headers_without_end(router: Router) -> None:
    with socket.create_connection(router.address, 5) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(b"x" * 100_000)
    assert router.http.get("/health").status_code == 200


def test_cors_for_everybody(router: Router) -> None:
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type, authorization",
    }
    response = router.http.options("/generate", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-methods"] == "GET, POST, DELETE"
    allowed = response.headers["access-control-allow-headers"].lower()
    assert "content-type" in allowed
    assert "authorization" in allowed
    assert router.http.get("/info", headers={"origin": "x"}).headers["access-control-allow-origin"] == "*"
    assert router.http.get("/nothing", headers={"origin": "x"}).headers["access-control-allow-origin"] == "*"


def test_cors_for_some(tmp_path: Path) -> None:
    with Router(settings(tmp_path, cors_allow_origin=["https://a.example"]), engine=False) as router:
        allowed = router.http.get("/info", headers={"origin": "https://a.example"})
        other = router.http.get("/info", headers={"origin": "https://b.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in other.headers


def ask_in_background(router: Router, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{router.url}/generate", json=body, timeout=20))
    )
    thread.start()
    return thread, answers


def test_concurrency_limit(tmp_path: Path) -> None:
    with Router(settings(tmp_path, replace(LIMITS, max_concurrent_requests=2))) as router:
        overloaded = {"error": "Model is overloaded", "error_type": "overloaded"}
        router.says("a</s>")
        router.engine.pause()
        thread, answers = ask_in_background(router, {"inputs": "x"})
        until(lambda: bool(router.engine.submits))
        response = router.complete(prompt=["a", "b"])
        assert (response.status_code, response.json()) == (429, overloaded)
        response = router.generate(best_of=2, do_sample=True)
        assert (response.status_code, response.json()) == (429, overloaded)
        body = {"inputs": "x", "stream": True}
        with router.http.stream("POST", "/", json=body) as open_stream:
            until(lambda: len(router.engine.submits) == 2)
            for response in (router.chat(), router.chat(stream=True), router.complete()):
                assert (response.status_code, response.json()) == (429, overloaded)
            response = router.http.post("/generate_stream", json={"inputs": "x"})
            assert (response.status_code, events(response.content)) == (200, [overloaded])
            assert router.http.post("/tokenize", json={"inputs": "x"}).status_code == 200
            router.engine.resume()
            open_stream.read()
        thread.join()
        assert answers[0].status_code == 200
        assert router.generate(best_of=2, do_sample=True).status_code == 200
        assert router.metric('tgi_request_failure{err="overloaded"}') == 6


@pytest.mark.parametrize(
    "path",
    [
        *("/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"),
        *("/v1/responses", "/v1/messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(tmp_path: Path, path: str, stream: bool) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        body = {
            "inputs": "hello",
            "prompt": ["hello", "there"],
            "model": "m",
            "max_tokens": 50,
            "messages": [{"role": "user", "content": "hello"}],
            "stream": stream,
        }
        if path == "/v1/responses":
            body = {"input": "hello", "stream": stream}
        expected = 2 if path == "/v1/completions" else 1
        with router.send_raw(path, body) as connection:
            until(lambda: len(router.engine.submits) == expected)
            if stream and path.startswith("/v1"):
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        until(lambda: len(router.engine.cancels) == expected)
        assert sorted(router.engine.cancels) == [submit.id for submit in router.engine.submits]
        assert router.service.client.open == 0
        assert router.metric('tgi_request_failure{err="dropped"}') == expected
        with router.service.permits.take(LIMITS.max_concurrent_requests):
            pass


def test_a_stop_string_ends_the_work_of_the_engine(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        assert router.complete(stop="hello", max_tokens=100).status_code == 200
        until(lambda: len(router.engine.cancels) == 1)


def test_requests_outlive_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.router.call.KEEP_ALIVE", 0.05)
    with Router(settings(tmp_path), delay=0.01) as router:
        undisturbed = router.generate(max_new_tokens=150).json()
        thread, answers = ask_in_background(router, LONG_ANSWER)
        until(lambda: len(router.engine.submits) == 2)
        with router.http.stream("POST", "/generate_stream", json=LONG_ANSWER) as native:
            parts = native.iter_raw()
            first = next(parts)
            router.engine.die()
            while (part := next(parts)) != b":\n\n":
                first += part
            for path, status in (("/health", 503), ("/readyz", 503), ("/livez", 200)):
                assert router.http.get(path).status_code == status
            late_thread, late_answers = ask_in_background(router, {"inputs": "hello"})
            until(lambda: router.service.client.open == 3)
            assert router.metric("tgi_queue_size") == 3
            router.engine.start()
            rest = b"".join(parts).replace(b":\n\n", b"")
        thread.join()
        late_thread.join()
        told = events(first + rest)
        assert [event["index"] for event in told] == list(range(1, 151))
        assert told[-1]["generated_text"] == undisturbed["generated_text"]
        assert (answers[0].status_code, answers[0].json()) == (200, undisturbed)
        assert late_answers[0].status_code == 200
        assert router.http.get("/health").status_code == 200
        assert router.metric("tgi_engine_restarts") == 1
        assert router.metric('tgi_request_failure{err="generation"}') == 0


def openai_chat(url: str) -> Iterator[str]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        for chunk in client.chat.completions.create(model="m", messages=messages, max_tokens=30, stream=True):
            yield chunk.choices[0].delta.content or ""


def openai_response(url: str) -> Iterator[str]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        for event in client.responses.create(model="m", input="hello", max_output_tokens=30, stream=True):
            if event.type == "response.output_text.delta":
                yield event.delta


def anthropic_message(url: str) -> Iterator[str]:
    with (
        anthropic.Anthropic(base_url=url, api_key="-", max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=30, messages=[{"role": "user", "content": "hello"}]) as stream,
    ):
        yield from stream.text_stream


def hub_text(url: str) -> Iterator[str]:
    with huggingface_hub.InferenceClient(url) as client:
        yield from client.text_generation("hello", max_new_tokens=30, stream=True)


@pytest.mark.parametrize("ask", [openai_chat, openai_response, anthropic_message, hub_text])
def test_clients_see_a_pause_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], Iterator[str]]
) -> None:
    monkeypatch.setattr("tgi.router.call.KEEP_ALIVE", 0.01)
    with Router(settings(tmp_path), delay=0.005) as router:
        undisturbed = "".join(ask(router.url))
        texts = ask(router.url)
        first = next(texts)
        router.engine.die()
        time.sleep(0.1)
        router.engine.start()
        assert first + "".join(texts) == undisturbed
        assert router.metric("tgi_engine_restarts") == 1


def test_who_waits_for_the_engine_holds_a_place(tmp_path: Path) -> None:
    with Router(settings(tmp_path, replace(LIMITS, max_concurrent_requests=1))) as router:
        router.engine.die()
        until(lambda: not router.service.client.connected)
        thread, answers = ask_in_background(router, {"inputs": "hello"})
        until(lambda: router.service.client.open == 1)
        assert router.generate().status_code == 429
        router.engine.start()
        thread.join()
        assert answers[0].status_code == 200


def test_a_server_that_stops_ends_what_waits_for_the_engine(tmp_path: Path) -> None:
    with Router(settings(tmp_path), delay=0.01) as router:
        thread, answers = ask_in_background(router, LONG_ANSWER)
        until(lambda: bool(router.engine.submits))
        with router.http.stream("POST", "/generate_stream", json=LONG_ANSWER) as native:
            lines = native.iter_raw()
            first = next(lines)
            with router.http.stream("POST", "/v1/completions", json={"prompt": "hello", "stream": True}) as completion:
                chunks = completion.iter_raw()
                assert next(chunks).startswith(b"data: {")
                router.engine.die()
                until(lambda: not router.service.client.connected)
                router.drain()
                *_, last, done = events(b"".join(chunks))
            *_, error = events(first + b"".join(lines))
        thread.join()
        assert error["error_type"] == "generation"
        assert error["error"].startswith("Request failed during generation: Server error: ")
        assert (last["error"]["http_status_code"], done) == (424, "[DONE]")
        assert answers[0].status_code == 424
        assert answers[0].json() == error


def test_a_request_that_ends_the_engine_gets_an_error_of_its_own(tmp_path: Path) -> None:
    *_, poison = build(settings(tmp_path)).tokenizer.encode("fox", add_special_tokens=False)
    with Router(settings(tmp_path), poison=poison, delay=0.02) as router:
        thread, answers = ask_in_background(router, LONG_ANSWER)
        until(lambda: bool(router.engine.submits))
        response = router.generate("fox")
        assert (response.status_code, response.json()["error_type"]) == (500, "crash")
        thread.join()
        assert answers[0].status_code == 200


def test_a_fault_of_one_request(tmp_path: Path) -> None:
    with Router(settings(tmp_path)) as router:
        router.reply = lambda submit: "out of luck"
        response = router.generate()
        assert response.status_code == 424
        assert response.json() == {
            "error": "Request failed during generation: Server error: out of luck",
            "error_type": "generation",
        }
        assert "x-compute-type" not in response.headers
        assert router.metric('tgi_request_failure{err="generation"}') == 1


def test_requests_wait_for_an_engine_that_loads(tmp_path: Path) -> None:
    with Router(settings(tmp_path), engine=False) as router:
        assert router.http.get("/health").status_code == 503
        assert router.http.get("/info").status_code == 200
        thread, answers = ask_in_background(router, {"inputs": "hello", "parameters": {"max_new_tokens": 1}})
        with router.engine:
            thread.join()
        assert answers[0].status_code == 200


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.router.pipeline.ENGINE_PATIENCE", 0.02)
    message = "The model is not ready: its engine is loading or starting again"
    with Router(settings(tmp_path), engine=False) as router:
        for response in (router.generate(), router.complete(stream=True)):
            assert response.status_code == 503
            assert response.json() == {"error": message, "error_type": "unavailable"}
        response = router.http.post("/generate_stream", json={"inputs": "x"})
        assert events(response.content) == [{"error": message, "error_type": "unavailable"}]


def test_validation_errors_of_native_streams_are_events(router: Router) -> None:
    for path in ("/", "/generate_stream"):
        body = {"inputs": "x", "stream": True, "parameters": {"best_of": 2}}
        response = router.http.post(path, json=body)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        text = "Input validation error: `best_of` != 1 is not supported when streaming tokens"
        assert events(response.content) == [{"error": text, "error_type": "validation"}]


def test_a_bug_ends_one_request(
    router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("what a bug")

    told = {"error": "Internal server error", "error_type": "internal"}
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(router.service.validator, "validate", bug)
        response = router.generate()
        assert (response.status_code, response.json()) == (500, told)
        assert events(router.http.post("/generate_stream", json={"inputs": "x"}).content) == [told]
    assert "what a bug" in caplog.text
    assert router.generate().status_code == 200


def test_a_silent_stream_says_that_it_lives(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi.router.call.KEEP_ALIVE", 0.02)
    router.engine.pause()
    with router.http.stream("POST", "/generate_stream", json={"inputs": "x"}) as response:
        parts = response.iter_raw()
        assert next(parts) == next(parts) == b":\n\n"
        router.engine.resume()
        rest = b"".join(parts).replace(b":\n\n", b"")
    assert events(rest)[-1]["generated_text"] == "a"


def test_what_one_step_brings_is_sent_at_once(tmp_path: Path) -> None:
    with Router(settings(tmp_path), per_step=4, delay=0.05) as router:
        body = {"inputs": "the quick fox", "parameters": {"max_new_tokens": 10}}
        with router.send_raw("/generate_stream", body) as client:
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += client.recv(65536)
    _, _, rest = answer.partition(b"\r\n\r\n")
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert [chunk.count(b"data:") for chunk in chunks] == [4, 4, 2, 0]
