"""TGI's own routes, over HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.router.serving import LIMITS, Router, events, settings


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"), compute_type="2-cpu")) as router:
        yield router


def test_generate_without_details_is_just_the_text(router: Router) -> None:
    router.says(" world</s>")
    response = router.generate()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.content == b'{"generated_text":" world"}'


def test_generate_with_details(router: Router) -> None:
    ids = router.says("a cat</s>")
    answer = router.generate(details=True).json()
    assert list(answer) == ["generated_text", "details"]
    details = answer["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(ids)
    assert details["seed"] is None
    assert details["prefill"] == []
    assert [token["id"] for token in details["tokens"]] == ids
    assert details["tokens"][-1] == {"id": 2, "text": "</s>", "logprob": -len(ids) / 8, "special": True}
    assert "".join(token["text"] for token in details["tokens"][:-1]) == answer["generated_text"] == "a cat"


def test_answer_headers(router: Router) -> None:
    ids = router.says("a cat</s>")
    headers = router.generate("größe").headers
    prompt = router.service.tokenizer.encode("größe", add_special_tokens=True)
    assert headers["x-compute-type"] == "2-cpu"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == str(len(prompt))
    assert headers["x-generated-tokens"] == str(len(ids))
    assert float(headers["x-compute-time"]) >= 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert int(headers["x-time-per-token"]) >= 0


def test_length_and_seed(router: Router) -> None:
    router.says("the quick brown fox")
    details = router.generate(details=True, max_new_tokens=2, do_sample=True, seed=2**64 - 1).json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 2
    assert details["seed"] == 2**64 - 1


def test_as_many_tokens_as_were_asked_for(tmp_path: Path) -> None:
    """TGI's chunks of 1024: each began with a new tokenization, and the last was always full."""
    limits = replace(LIMITS, max_total_tokens=4000, max_batch_total_tokens=4000)
    with Router(settings(tmp_path, limits), per_step=50) as router:
        details = router.generate(max_new_tokens=1500, details=True).json()["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 1500)
        (the,) = router.says("the")
        router.reply = lambda submit: [the] * 1023 + [2] + [the] * 1000
        answer = router.generate(max_new_tokens=1500, details=True).json()
        assert answer["generated_text"] == "the" * 1023
        assert (answer["details"]["finish_reason"], answer["details"]["generated_tokens"]) == ("eos_token", 1024)
        assert [submit.max_new_tokens for submit in router.engine.submits] == [1500, 1500]


def test_prefill_holds_the_prompt_with_null_for_its_first_token(router: Router) -> None:
    router.says("a</s>")
    details = router.generate("the dog", decoder_input_details=True).json()["details"]
    prompt = router.service.tokenizer.encode("the dog", add_special_tokens=True)
    assert [token["id"] for token in details["prefill"]] == prompt
    assert "".join(token["text"] for token in details["prefill"]) == "the dog"
    assert [token["logprob"] for token in details["prefill"]] == [None, *(-float(n) for n in range(1, len(prompt)))]


def test_top_tokens(router: Router) -> None:
    ids = router.says("a</s>")
    details = router.generate(details=True, top_n_tokens=2).json()["details"]
    assert [[token["id"] for token in top] for top in details["top_tokens"]] == [[id, id + 1] for id in ids]
    assert list(details["top_tokens"][0][0]) == ["id", "text", "logprob", "special"]


def test_best_of_returns_the_likelier_first_and_the_others_behind_it(router: Router) -> None:
    encode = router.service.tokenizer.encode
    texts = iter(("the lazy dog jumps", "a"))  # the fake engine's logprobs fall: the shorter answer wins
    router.reply = lambda submit: encode(next(texts), add_special_tokens=False)
    answer = router.generate(best_of=2, do_sample=True, details=True).json()
    assert answer["generated_text"] == "a"
    (other,) = answer["details"]["best_of_sequences"]
    assert list(other) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert other["generated_text"] == "the lazy dog jumps"
    assert other["seed"] != answer["details"]["seed"]


def test_no_best_of_is_one_but_not_in_streams(router: Router) -> None:
    """As TGI."""
    router.says("a</s>")
    assert router.generate(best_of=0, details=True).json()["details"]["generated_tokens"] == 2
    body = {"inputs": "x", "parameters": {"best_of": 0}}
    (error,) = events(router.http.post("/generate_stream", json=body).content)
    assert error["error"] == "Input validation error: `best_of` != 1 is not supported when streaming tokens"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/tokenize"])
def test_images_in_a_prompt_are_text(router: Router, path: str) -> None:
    router.says("a</s>")
    inputs = "![](http://127.0.0.1:1/a.png) cat ![](data:image/png;base64,AAAA)"
    response = router.http.post(path, json={"inputs": inputs})
    ids = router.service.tokenizer.encode(inputs, add_special_tokens=True)
    seen = [token["id"] for token in response.json()] if path == "/tokenize" else router.engine.submits[-1].token_ids
    assert seen == ids


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [
        ("/generate", None, " b"),
        ("/generate", True, "hello b"),
        ("/", None, "hello b"),
        ("/", False, " b"),
    ],
)
def test_full_text(router: Router, path: str, asked: bool | None, expected: str) -> None:
    router.says(" b</s>")
    answer = router.http.post(path, json={"inputs": "hello", "parameters": {"return_full_text": asked}}).json()
    assert answer == ([{"generated_text": expected}] if path == "/" else {"generated_text": expected})


def test_compat_does_not_repeat_the_prompt_for_models_of_another_task(tmp_path: Path) -> None:
    with Router(settings(tmp_path, pipeline_tag="text2text-generation")) as router:
        router.says(" b</s>")
        assert router.http.post("/", json={"inputs": "hello"}).json() == [{"generated_text": " b"}]


def test_stream_bytes(router: Router) -> None:
    a, b, end = router.says("the dog</s>")
    body = {"inputs": "hello", "parameters": {"details": True}}
    response = router.http.post("/generate_stream", json=body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-type"] == "2-cpu"
    assert response.headers["x-compute-characters"] == "5"
    assert not {"x-total-time", "x-compute-time", "content-length"} & set(response.headers)
    length = len(router.service.tokenizer.encode("hello", add_special_tokens=True))
    assert response.content.decode() == (
        f'data: {{"index":1,"token":{{"id":{a},"text":"the","logprob":-0.125,"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data: {{"index":2,"token":{{"id":{b},"text":" dog","logprob":-0.25,"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data: {{"index":3,"token":{{"id":{end},"text":"</s>","logprob":-0.375,"special":true}},'
        '"generated_text":"the dog","details":{"finish_reason":"eos_token","generated_tokens":3,"seed":null,'
        f'"input_length":{length}}}}}\n\n'
    )


def test_stream_has_top_tokens_only_when_asked(router: Router) -> None:
    router.says("a</s>")
    body = {"inputs": "x", "parameters": {"top_n_tokens": 1}}
    first, *_ = events(router.http.post("/generate_stream", json=body).content)
    assert list(first) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert first["details"] is None


def test_compat_streams_with_the_full_text_at_the_end(router: Router) -> None:
    router.says(" b</s>")
    *_, last = events(router.http.post("/", json={"inputs": "hello", "stream": True}).content)
    assert last["generated_text"] == "hello b"


@pytest.mark.parametrize("per_step", [1, 3])
def test_stop_string_over_several_tokens_is_kept_and_ends_the_request(tmp_path: Path, per_step: int) -> None:
    with Router(settings(tmp_path), per_step=per_step) as router:
        ids = router.says("the quick brown fox jumps over the lazy dog")
        body = {"inputs": "x", "parameters": {"stop": ["n fo"], "details": True}}
        got = events(router.http.post("/generate_stream", json=body).content)
        assert got[-1]["generated_text"] == "the quick brown fo"
        assert "".join(event["token"]["text"] for event in got) == "the quick brown fo"
        assert got[-1]["details"]["finish_reason"] == "stop_sequence"
        assert got[-1]["details"]["generated_tokens"] == len(got) < len(ids)
        assert router.generate(stop=["n fo"]).json() == {"generated_text": "the quick brown fo"}


def test_an_incomplete_character_at_the_end_loses_nothing(router: Router) -> None:
    ids = router.says("cat ☃")
    router.reply = lambda submit: ids[:-1]
    answer = router.generate(details=True).json()
    assert answer["generated_text"] == "cat \ufffd"
    assert "".join(token["text"] for token in answer["details"]["tokens"]) == answer["generated_text"]


def test_tokenize_counts_bytes(router: Router) -> None:
    text = "größe 你好 cat"
    tokens = router.http.post("/tokenize", json={"inputs": text}).json()
    assert list(tokens[0]) == ["id", "text", "start", "stop"]
    assert [token["id"] for token in tokens] == router.service.tokenizer.encode(text, add_special_tokens=True)
    for token in tokens:
        assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]


def test_tokenize_truncates_as_generate_does(router: Router) -> None:
    router.says("a</s>")
    inputs, parameters = "the quick brown fox", {"truncate": 2, "add_special_tokens": False}
    tokens = router.http.post("/tokenize", json={"inputs": inputs, "parameters": parameters}).json()
    assert router.generate(inputs, **parameters).status_code == 200
    assert [token["id"] for token in tokens] == router.engine.submits[-1].token_ids
    assert "".join(token["text"] for token in tokens) == " brown fox"
    for wrong in (0, LIMITS.max_input_tokens + 1):
        response = router.http.post("/tokenize", json={"inputs": "a", "parameters": {"truncate": wrong}})
        assert response.json() == router.generate("a", truncate=wrong).json()
        assert response.status_code == 422


def test_info(router: Router) -> None:
    info = router.http.get("/info").json()
    assert list(info)[:14] == [
        "model_id",
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]
    assert info["model_id"] == "a/model"
    assert info["max_input_tokens"] == LIMITS.max_input_tokens
    assert info["router"] == "text-generation-router"
    assert info["memory"] == {"weights": 1, "cache": 2}
    assert info["implementation"] is None, "the fake engine is none of ours"


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/livez", "/readyz"])
def test_health(router: Router, path: str) -> None:
    response = router.http.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_health_knows_an_engine_that_listens_but_does_not_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Router(settings(tmp_path), pong=False) as router:
        client = router.service.client
        healthy = client.healthy
        monkeypatch.setattr(type(client), "healthy", lambda _, timeout=0.05: healthy(timeout))
        monkeypatch.setattr(client, "_longest_step", 0)
        for path in ("/health", "/readyz"):
            response = router.http.get(path)
            assert response.status_code == 503
            assert response.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        assert router.http.get("/livez").status_code == 200


def test_a_long_prompt_is_tokenised_beside_the_event_loop(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_input_tokens=9000, max_total_tokens=9999)
    with Router(settings(tmp_path, limits)) as router:
        router.says("a</s>")
        assert router.generate("cat " * 2000).json() == {"generated_text": "a"}
