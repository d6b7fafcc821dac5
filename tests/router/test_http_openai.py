"""OpenAI's routes, over HTTP."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import tgi
from tests.router.serving import LIMITS, TEMPLATE, Router, events, settings


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"))) as router:
        yield router


def count(router: Router, text: str) -> int:
    return len(router.service.tokenizer.encode(text, add_special_tokens=False))


def test_chat(router: Router) -> None:
    ids = router.says("the dog</s>")
    response = router.chat()
    assert response.status_code == 200
    assert response.headers["x-generated-tokens"] == str(len(ids))
    assert response.headers["x-compute-characters"] == str(len("<user>hello;<assistant>"))
    answer = response.json()
    assert list(answer) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["object"] == "chat.completion"
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", answer["id"])
    assert answer["model"] == "a/model"
    assert answer["system_fingerprint"] == f"{tgi.__version__}-native"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "the dog"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = count(router, "<user>hello;<assistant>")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(ids),
        "total_tokens": prompt + len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_chat_stream_bytes(router: Router) -> None:
    router.says("the dog</s>")
    response = router.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["x-accel-buffering"] == "no"
    pattern = "".join(
        r'data: \{"object":"chat.completion.chunk","id":"(chatcmpl-\w+)","created":\d+,"model":"a/model",'
        rf'"system_fingerprint":"[^"]+","choices":\[\{{"index":0,"delta":\{{"role":"assistant","content":"{text}",'
        rf'"tool_calls":null\}},"logprobs":null,"finish_reason":{finish}\}}\],"usage":null\}}\n\n'
        for text, finish in (("the", "null"), (" dog", "null"), ("", '"stop"'))
    )
    match = re.fullmatch(pattern + r"data: \[DONE\]\n\n", response.text)
    assert match, response.text
    assert len(set(match.groups())) == 1


def test_chat_stream_with_usage(router: Router) -> None:
    ids = router.says("the dog</s>")
    *chunks, last, done = events(router.chat(stream=True, stream_options={"include_usage": True}).content)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ids) == len(chunks)
    assert all(chunk["usage"] is None for chunk in chunks)


def test_usage_on_each_chunk(router: Router) -> None:
    ids = router.says("the dog</s>")
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(router.chat(stream=True, stream_options=options).content)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, len(ids) + 1), len(ids)]


def test_chat_choices(router: Router) -> None:
    texts = iter(("the dog", "a cat", "the dog", "a cat"))
    router.reply = lambda submit: [*router.service.tokenizer.encode(next(texts), add_special_tokens=False), 2]
    response = router.chat(n=2, seed=5, logprobs=True)
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the dog", "a cat"]
    one, other = router.engine.submits[-2:]
    assert one.token_ids == other.token_ids
    assert one.sampling.seed == 5 != other.sampling.seed
    generated = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
    assert answer["usage"]["prompt_tokens"] == len(one.token_ids) == int(response.headers["x-prompt-tokens"])
    assert answer["usage"]["completion_tokens"] == generated == int(response.headers["x-generated-tokens"])
    *chunks, last, _ = events(router.chat(n=2, stream=True, stream_options={"include_usage": True}).content)
    for index, text in enumerate(("the dog", "a cat")):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert last["usage"] == answer["usage"]


def test_the_role_is_on_each_delta_but_for_those_who_add_them_up(router: Router) -> None:
    """text-generation reads no delta without one; OpenAI's Python library would read "assistantassistant"."""
    router.says("the dog</s>")
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "n": 2}
    for agent, repeated in (("python-requests/2.34.2", True), ("AsyncOpenAI/Python 3.54.0", False)):
        response = router.http.post("/v1/chat/completions", json=body, headers={"user-agent": agent})
        *chunks, _ = events(response.content)
        for index in (0, 1):
            deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
            assert deltas[0]["role"] == "assistant"
            assert all(delta.get("role") == ("assistant" if repeated else None) for delta in deltas[1:])
            assert all("tool_calls" in delta for delta in deltas)


def test_an_error_in_a_stream_has_its_true_status(router: Router) -> None:
    router.reply = lambda submit: "no such luck"
    *_, error, done = events(router.chat(stream=True).content)
    message = "Request failed during generation: Server error: no such luck"
    assert (error, done) == ({"error": {"message": message, "http_status_code": 424}}, "[DONE]")


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"stream_options": None},
    {"stream_options": {"include_usage": None, "include_obfuscation": False}},
    {"stream": None},
    {"n": 1},
    {"user": "me"},
    {"metadata": {"a": "b"}},
    {"service_tier": "flex"},
    {"safety_identifier": "x"},
    {"prediction": {"type": "content", "content": "x"}},
    {"prompt_cache_key": "x", "prompt_cache_retention": "24h"},
    {"store": False, "modalities": ["text"], "verbosity": "medium", "audio": None, "web_search_options": None},
    {"nobody_knows": ["this"]},
]


@pytest.mark.parametrize("fields", WITHOUT_EFFECT)
def test_neutral_values_are_accepted(router: Router, fields: dict[str, Any]) -> None:
    router.says("a</s>")
    assert router.chat(**fields).json()["choices"][0]["message"]["content"] == "a"
    assert router.complete(**fields).json()["choices"][0]["text"] == "a"


def test_stop_string_over_several_tokens_is_removed(router: Router) -> None:
    router.says("the quick brown fox jumps")
    for stop in ("n fo", ["n fo", "zzz"]):
        answer = router.chat(stop=stop).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("the quick brow", "stop")
        *chunks, _ = events(router.chat(stop=stop, stream=True).content)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "the quick brow"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert router.complete(stop=stop).json()["choices"][0]["text"] == "the quick brow"


def test_what_looked_like_a_stop_string_is_not_lost(router: Router) -> None:
    router.says("the quick</s>")
    *chunks, _ = events(router.chat(stop="quickly", stream=True).content)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "the quick"


def test_chat_logprobs_spell_out_the_text(router: Router) -> None:
    ids = router.says("cat ☃</s>")
    content = router.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-(n + 1) / 8 for n in range(len(ids))]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "cat ☃"
    assert list(content[0]) == ["token", "logprob", "bytes", "top_logprobs"]
    assert [list(top) for top in content[0]["top_logprobs"]] == [["token", "logprob", "bytes"]] * 2
    *chunks, _ = events(router.chat(logprobs=True, top_logprobs=2, stream=True).content)
    assert [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks] == [[entry] for entry in content]


def test_top_logprobs_alone_are_judged_but_not_shown(router: Router) -> None:
    """As TGI; OpenAI refuses them without ``logprobs``."""
    router.says("a</s>")
    assert router.chat(top_logprobs=2).json()["choices"][0]["logprobs"] is None
    assert router.chat(top_logprobs=6).status_code == 422


def test_sampling_of_a_bare_request(router: Router) -> None:
    router.says("a</s>")
    for send in (router.chat, router.complete):
        assert send().status_code == 200
        submit = router.engine.submits[-1]
        assert not submit.sampling.greedy
        assert submit.sampling.temperature == submit.sampling.top_p == 1
        assert submit.stop_token_ids == [2]
        assert submit.max_new_tokens == 200 - len(submit.token_ids)


def test_every_field_reaches_the_engine(router: Router) -> None:
    router.says("a</s>")
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "repetition_penalty": 1.5,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": 9,
        "ignore_eos": True,
    }
    for answer in (router.chat(**fields, max_completion_tokens=1), router.complete(**fields, max_tokens=1)):
        assert answer.status_code == 200
        submit = router.engine.submits[-1]
        sampling = submit.sampling
        assert (sampling.greedy, sampling.temperature, sampling.top_p, sampling.top_k) == (False, 0.5, 0.9, 7)
        assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -2, 2)
        assert sampling.logit_bias == {5: -100, 6: 1.5}
        assert sampling.seed == 9
        assert submit.stop_token_ids == []
        assert submit.max_new_tokens == 1


@pytest.mark.parametrize("penalty", [0, 1, -1])
def test_a_presence_penalty_is_no_repetition_penalty(router: Router, penalty: int) -> None:
    router.says("a</s>")
    assert router.chat(presence_penalty=penalty).status_code == 200
    sampling = router.engine.submits[-1].sampling
    assert (sampling.presence_penalty, sampling.repetition_penalty) == (penalty, 1)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.5, "top_k": 3}, {"top_p": 0}])
def test_greedy(router: Router, fields: dict[str, Any]) -> None:
    router.says("a</s>")
    assert router.chat(**fields).status_code == 200
    sampling = router.engine.submits[-1].sampling
    assert (sampling.greedy, sampling.top_p, sampling.top_k) == (True, 1, 0)


def test_top_p_of_one_is_off(router: Router) -> None:
    router.says("a</s>")
    assert router.chat(top_p=1).status_code == 200
    assert router.engine.submits[-1].sampling.top_p == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream_options": {"include_obfuscation": True}}, "`stream_options.include_obfuscation` is not supported"),
    ({"adapter_id": "x"}, "`adapter_id` is not supported"),
    ({"logit_bias": [1.0]}, "`logit_bias` as a list is not supported: send an object of token ids and biases"),
    ({"logit_bias": {"100000": 1}}, "`logit_bias` names token 100000, which the model doesn't have"),
    ({"logit_bias": {"5": 101}}, "`logit_bias` must be >= -100.0 and <= 100.0. Given: 101.0 for token 5"),
    ({"top_p": 1.5}, "`top_p` must be >= 0.0 and <= 1.0"),
    ({"presence_penalty": 3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"temperature": -1}, "`temperature` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
]
REFUSED_IN_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "`n` must be > 0 and <= 2. Given: 0"),
    ({"n": 3}, "`n` must be > 0 and <= 2. Given: 3"),
    ({"audio": {"voice": "x", "format": "wav"}}, "`audio` is not supported"),
    ({"reasoning_effort": "low"}, "`reasoning_effort` is not supported: the model's chat template doesn't read it"),
    ({"modalities": ["text", "audio"]}, "`modalities` is not supported"),
    ({"moderation": {"model": "x"}}, "`moderation` is not supported"),
    ({"store": True}, "`store` is not supported"),
    ({"verbosity": "low"}, "`verbosity` is not supported"),
    ({"web_search_options": {}}, "`web_search_options` is not supported"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "`continue_final_message` and `add_generation_prompt` must not both be true",
    ),
    ({"best_of": 2}, "`best_of` is not supported"),
    ({"functions": [{}]}, "`functions` is not supported"),
    ({"function_call": "auto"}, "`function_call` is not supported"),
    ({"chat_template": "x"}, "`chat_template` is not supported"),
    ({"logprobs": True, "top_logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"max_tokens": 1, "max_completion_tokens": 1},
        "`max_tokens` and `max_completion_tokens` must not both be set",
    ),
    (
        {"chat_template_kwargs": {"messages": []}},
        "`chat_template_kwargs` must not set `messages`: the model's chat template has `suffix`",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "`image_url` content is not supported",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "text"), REFUSED + REFUSED_IN_CHAT)
def test_chat_refuses_by_name(router: Router, fields: dict[str, Any], text: str, stream: bool) -> None:
    response = router.chat(**fields, stream=stream)
    assert response.status_code == 422
    assert response.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "text"), REFUSED)
def test_completions_refuse_by_name(router: Router, fields: dict[str, Any], text: str, stream: bool) -> None:
    response = router.complete(**fields, stream=stream)
    assert response.status_code == 422
    assert response.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}


def test_tools_that_must_not_be_used_are_not_shown(router: Router) -> None:
    router.says("a</s>")
    response = router.chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")
    assert response.json()["choices"][0]["message"]["content"] == "a"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "<user>hi;<assistant>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            "<user>ab;<assistant>",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}]},
            "<user>hi;<assistant>well,",
        ),
        ({"add_generation_prompt": False}, "<user>hi;"),
        ({"chat_template_kwargs": {"suffix": "!"}}, "<user>hi;<assistant>!"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x":1}'}}],
                    },
                    {"role": "tool", "content": "2", "tool_call_id": "1"},
                ]
            },
            '<assistant>[{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}];'
            "<tool>2;<assistant>",
        ),
    ],
)
def test_chat_tokenize_shows_what_the_template_makes(router: Router, fields: dict[str, Any], text: str) -> None:
    answer = router.http.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "hi"}], **fields}).json()
    assert list(answer) == ["tokenize_response", "templated_text"]
    assert answer["templated_text"] == text
    assert "".join(token["text"] for token in answer["tokenize_response"]) == text


def test_arguments_nested_too_deeply(router: Router) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "[" * 20_000}}
    response = router.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 422
    assert "`tool_calls`" in response.json()["error"]


def test_template_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", "{{ raise_exception('no systems here') }}" + TEMPLATE)
    with Router(settings(tmp_path)) as router:
        for response in (router.chat(), router.chat(stream=True)):
            assert response.status_code == 422
            assert response.json() == {"error": "Template error: no systems here", "error_type": "template_error"}


def test_a_model_without_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.serving.TEMPLATE", None)
    with Router(settings(tmp_path)) as router:
        router.says("a</s>")
        assert router.chat().json()["error"] == "Template error: template not found"
        assert router.complete().status_code == 200


def test_completion(router: Router) -> None:
    ids = router.says("the dog</s>")
    response = router.complete()
    answer = response.json()
    assert list(answer) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["object"] == "text_completion"
    assert re.fullmatch("cmpl-[0-9a-f]{32}", answer["id"])
    assert answer["choices"] == [{"index": 0, "text": "the dog", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["completion_tokens"] == len(ids)
    assert "x-compute-time" not in response.headers
    assert response.headers["x-generated-tokens"] == str(len(ids))


def echoing(router: Router) -> None:
    router.reply = lambda submit: [*submit.token_ids, 2]


def test_several_prompts_are_answered_in_order(router: Router) -> None:
    echoing(router)
    prompts = ["the quick brown fox", "a", "dog"]
    response = router.complete(prompt=prompts)
    answer = response.json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(prompts))
    lengths = [count(router, prompt) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert answer["usage"]["completion_tokens"] == sum(lengths) + 3
    assert response.headers["x-compute-characters"] == str(sum(map(len, prompts)))
    assert response.headers["x-prompt-tokens"] == str(sum(lengths))


def test_several_prompts_streamed(router: Router) -> None:
    echoing(router)
    prompts = ["the quick brown fox", "a", "dog"]
    *chunks, done = events(router.complete(prompt=prompts, stream=True).content)
    assert done == "[DONE]"
    assert list(chunks[0]) == ["object", "id", "created", "choices", "model", "system_fingerprint"]
    for index, prompt in enumerate(prompts):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["choices"][0]["text"] for chunk in own) == prompt
        assert [chunk["choices"][0]["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1]["usage"]["completion_tokens"] == len(own)
        assert all("usage" not in chunk for chunk in own[:-1])


def test_several_prompts_streamed_with_usage(router: Router) -> None:
    echoing(router)
    fields = {"prompt": ["a", "dog"], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = events(router.complete(**fields).content)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], len(chunks))


def test_completion_errors(router: Router) -> None:
    assert router.complete(prompt=list("abcde")).json() == {
        "error": "Number of prompts exceeds the maximum allowed batch size of 4",
        "error_type": "batch size exceeded",
    }
    assert router.complete(suffix="x").json() == {
        "error": "Suffix is not supported and can be achieved by preprocessing the prompt.",
        "error_type": "suffix not supported",
    }
    before = len(router.engine.submits)
    assert router.complete(prompt=["a", ""]).json()["error"] == "Input validation error: `inputs` cannot be empty"
    assert len(router.engine.submits) == before


def test_one_failing_prompt_ends_the_others(router: Router) -> None:
    ids = router.service.tokenizer.encode("the dog", add_special_tokens=False)
    router.reply = lambda submit: ids * 20 if submit.token_ids == ids else "no such luck"
    for stream in (False, True):
        response = router.complete(prompt=["the dog", "a cat"], stream=stream)
        message = "Request failed during generation: Server error: no such luck"
        if stream:
            *_, error, done = events(response.content)
            assert (error, done) == ({"error": {"message": message, "http_status_code": 424}}, "[DONE]")
        else:
            assert response.status_code == 424
            assert response.json() == {"error": message, "error_type": "generation"}


def test_models(router: Router) -> None:
    (model,) = router.http.get("/v1/models").json()["data"]
    assert list(model) == ["id", "object", "created", "owned_by"]
    assert model == {"id": "a/model", "object": "model", "created": model["created"], "owned_by": "a/model"}
    assert 0 <= time.time() - model["created"] < 600  # the test has just written its files
    assert router.http.get("/v1/models/a/model").json() == model
    assert router.http.get("/v1/models/a%2Fmodel").json() == model


@pytest.mark.parametrize("name", ["x", "a", "a/model/", "a/model/x", "A/model"])
def test_a_model_that_is_not_served(router: Router, name: str) -> None:
    response = router.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json() == {"error": f"The model `{name}` does not exist", "error_type": "not_found"}


@pytest.mark.parametrize("name", [None, "tgi", "dummy", "gpt-4o"])
def test_any_model_name_is_served_by_the_one_model(router: Router, name: str | None) -> None:
    router.says("a</s>")
    assert router.chat(model=name).json()["model"] == "a/model"
    assert router.complete(model=name).json()["model"] == "a/model"


def test_a_long_conversation(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_input_tokens=9000, max_total_tokens=9999)
    with Router(settings(tmp_path, limits)) as router:
        router.says("a</s>")
        answer = router.chat(messages=[{"role": "user", "content": "x"}] * 200).json()
        assert answer["usage"]["prompt_tokens"] == count(router, "<user>x;" * 200 + "<assistant>")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_openai_s_library_finds_errors_where_it_looks(router: Router, path: str) -> None:
    """It shows its user the message of an error object, and nothing of TGI's error, which is a string."""
    theirs = {"user-agent": "AsyncOpenAI/Python 3.54.0"}
    for body in (
        {"messages": 5, "prompt": 5, "input": 5},
        {"messages": [], "prompt": "x", "input": "x", "priority": 0.5},
    ):
        error = router.http.post(path, json=body, headers=theirs)
        assert error.status_code == 422
        assert error.json()["error"]["type"] == "invalid_request_error"
        assert error.json()["error"]["message"] == router.http.post(path, json=body).text
    refused = {"messages": [{"role": "user", "content": "x"}], "prompt": "", "input": ""}
    told = router.http.post(path, json={**refused, "top_p": 7}, headers=theirs).json()["error"]["message"]
    assert told == router.http.post(path, json={**refused, "top_p": 7}).json()["error"]
