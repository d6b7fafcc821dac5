"""OpenAI's legacy completions, over HTTP: several choices, echo, log-probabilities, prompts of token ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests import small_tokenizers
from tests.router.serving import LIMITS, Router, events, settings
from tgi.core.messages import Submit


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    limits = replace(LIMITS, max_best_of=3, max_concurrent_requests=12)
    with Router(settings(tmp_path_factory.mktemp("model"), limits)) as router:
        yield router


def encode(router: Router, text: str) -> list[int]:
    return router.service.tokenizer.encode(text, add_special_tokens=False)


def echoing(router: Router) -> None:
    """Every prompt is answered by itself."""
    router.reply = lambda submit: [*submit.token_ids, 2]


def latest(router: Router, count: int) -> list[Submit]:
    return router.engine.submits[-count:]


def streamed(router: Router, **fields: Any) -> tuple[list[Any], dict[int, str]]:
    """The chunks, and each choice's text."""
    *chunks, done = events(router.complete(stream=True, **fields).content)
    assert done == "[DONE]"
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return chunks, texts


def joined(parts: list[Any]) -> dict[str, list[Any]]:
    """The logprobs of a stream, put together."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


# --- n and best_of


def test_choices_come_prompt_by_prompt(router: Router) -> None:
    echoing(router)
    answer = router.complete(prompt=["the cat", "a dog"], n=3).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == ["the cat"] * 3 + ["a dog"] * 3
    _, texts = streamed(router, prompt=["the cat", "a dog"], n=3)
    assert texts == dict(enumerate(["the cat"] * 3 + ["a dog"] * 3))


def test_a_prompt_counts_once_and_its_choices_each(router: Router) -> None:
    echoing(router)
    response = router.complete(prompt=["the cat", "a dog"], n=2)
    prompt = len(encode(router, "the cat")) + len(encode(router, "a dog"))
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == 2 * (prompt + 2)
    assert response.headers["x-prompt-tokens"] == str(prompt)
    assert response.headers["x-generated-tokens"] == str(2 * (prompt + 2))
    assert response.headers["x-compute-characters"] == str(len("the cata dog"))


def test_seeds_of_choices(router: Router) -> None:
    router.says("a</s>")
    assert router.complete(prompt=["the cat", "a dog"], n=3, seed=7).status_code == 200
    seeds = [submit.sampling.seed for submit in latest(router, 6)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert seeds[:3] == seeds[3:]
    assert router.complete(n=3).status_code == 200
    assert len({submit.sampling.seed for submit in latest(router, 3)}) == 3


def test_negative_seeds(router: Router) -> None:
    router.says("a</s>")
    assert router.complete(seed=-1).status_code == 200
    assert latest(router, 1)[0].sampling.seed == 2**64 - 1


def test_greedy_choices_are_equal(router: Router) -> None:
    router.says("a</s>")
    answer = router.complete(n=2, temperature=0).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", "a"]
    one, other = (submit.sampling for submit in latest(router, 2))
    assert one == other


def test_best_of_returns_the_likeliest_first(router: Router) -> None:
    texts = iter(("the lazy dog jumps", "a", "the cat"))  # the fake engine's logprobs fall: shorter is likelier
    router.reply = lambda submit: encode(router, next(texts))
    response = router.complete(best_of=3, n=2)
    answer = response.json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", "the cat"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    generated = sum(len(encode(router, text)) for text in ("the lazy dog jumps", "a", "the cat"))
    assert answer["usage"]["completion_tokens"] == generated


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 0}, "`n` must be > 0 and <= 3. Given: 0"),
        ({"n": 4}, "`n` must be > 0 and <= 3. Given: 4"),
        ({"n": 2**32 - 1}, "`n` must be > 0 and <= 3. Given: 4294967295"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 3. Given: 0"),
        ({"best_of": 4}, "`best_of` must be > 0 and <= 3. Given: 4"),
        ({"best_of": 1, "n": 2}, "`best_of` must be >= `n`. Given: 1 and 2"),
        ({"best_of": 2, "stream": True}, "`best_of` != 1 is not supported when streaming tokens"),
    ],
)
def test_counts_out_of_bounds(router: Router, fields: dict[str, Any], text: str) -> None:
    before = len(router.engine.submits)
    counted = router.metric("tgi_request_count")
    response = router.complete(**fields)
    assert response.status_code == 422
    assert response.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}
    assert len(router.engine.submits) == before
    assert router.metric("tgi_request_count") == counted + 1


def test_no_choices_where_there_are_none(tmp_path: Path) -> None:
    with Router(settings(tmp_path, replace(LIMITS, max_best_of=1))) as router:
        router.says("a</s>")
        assert router.complete(n=1, best_of=1).status_code == 200
        for name in ("n", "best_of"):
            error = router.complete(**{name: 2}).json()["error"]
            assert error == f"Input validation error: `{name}` != 1 is not allowed for this endpoint"


def test_each_choice_needs_a_permit(tmp_path: Path) -> None:
    with Router(settings(tmp_path, replace(LIMITS, max_concurrent_requests=3))) as router:
        router.says("a</s>")
        assert router.complete(n=2).status_code == 200
        assert router.complete(prompt=["a", "b"], n=2).json()["error_type"] == "overloaded"
        assert router.complete(best_of=2).status_code == 200
        assert router.complete(prompt=["a", "b", "c"]).status_code == 200


# --- Prompts of token ids


def test_prompts_of_token_ids(router: Router) -> None:
    echoing(router)
    the_cat, dog = encode(router, "the cat"), encode(router, "dog")
    assert router.complete(prompt=the_cat).json()["choices"][0]["text"] == "the cat"
    assert latest(router, 1)[0].token_ids == the_cat
    response = router.complete(prompt=[the_cat, dog], echo=True)
    assert [choice["text"] for choice in response.json()["choices"]] == ["the catthe cat", "dogdog"]
    assert response.headers["x-compute-characters"] == str(len("the catdog"))


@pytest.mark.parametrize(
    ("prompt", "status", "text"),
    [
        ([], 422, "Empty array detected. Do not use an empty array for the prompt."),
        (["a", 1], 422, "a prompt is one text, several texts, one list of token ids or several of those"),
        ([[1], "a"], 422, "a prompt is one text, several texts, one list of token ids or several of those"),
        ([1.5], 422, "Failed to deserialize the JSON body into the target type"),
        ([True], 422, "Failed to deserialize the JSON body into the target type"),
        ([-1], 422, "Failed to deserialize the JSON body into the target type"),
        ([10**30], 422, "Failed to deserialize the JSON body into the target type"),
        ([10**6], 422, "Input validation error: `prompt` names token 1000000, which the model doesn't have"),
        ([[1], []], 422, "Input validation error: `inputs` cannot be empty"),
        ([[1]] * 5, 422, "Number of prompts exceeds the maximum allowed batch size of 4"),
        ([1] * 101, 422, "Input validation error: `inputs` must have less than 100 tokens. Given: 101"),
    ],
)
def test_what_is_no_prompt(router: Router, prompt: list[Any], status: int, text: str) -> None:
    response = router.complete(prompt=prompt)
    assert response.status_code == status
    assert text in response.text.replace('\\"', '"')


# --- Echo and log-probabilities


def test_echo(router: Router) -> None:
    router.says(" dog</s>")
    answer = router.complete(prompt="the", echo=True).json()
    assert answer["choices"][0]["text"] == "the dog"
    assert answer["usage"]["completion_tokens"] == 2
    chunks, texts = streamed(router, prompt="the", echo=True)
    assert texts == {0: "the dog"}
    assert chunks[0]["choices"][0]["text"] == "the"
    assert chunks[0]["choices"][0]["finish_reason"] is None


def test_nothing_but_the_echo(router: Router) -> None:
    fields: dict[str, Any] = {"prompt": ["the cat", "dog"], "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = router.complete(**fields).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [
        ("the cat", "length"),
        ("dog", "length"),
    ]
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["logprobs"]["tokens"] == [
        router.service.tokenizer.piece(i) for i in encode(router, "the cat")
    ]
    chunks, texts = streamed(router, **fields)
    assert texts == {0: "the cat", 1: "dog"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == ["length", "length"]
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [choice["logprobs"] for choice in answer["choices"]]
    assert router.complete(max_tokens=0).json()["error"] == (
        "Input validation error: `max_new_tokens` must be strictly positive"
    )


def test_logprobs_are_parallel_lists(router: Router) -> None:
    ids = router.says(" dog ☃!</s>")
    choice = router.complete(prompt="the", logprobs=2).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert logprobs["token_logprobs"] == [-(n + 1) / 8 for n in range(len(ids))]
    assert {len(items) for items in logprobs.values()} == {len(ids)}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert len(top) == 2
        assert list(top.values()) == sorted(top.values(), reverse=True)


def spelled(tokens: list[str]) -> bytes:
    """The bytes of tokens as the legacy route writes them."""
    return b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )


def test_tokens_and_offsets_lead_back_to_the_text(router: Router) -> None:
    router.says(" größe ☃!</s>")
    for prompt in ("the ☃ 你好 x", "<s>the cat"):
        choice = router.complete(prompt=prompt, logprobs=0, echo=True).json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
        assert text == prompt + " größe ☃!"
        assert spelled(logprobs["tokens"]).decode() == text + "</s>"
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[-1] == len(text)
        for token, offset in zip(logprobs["tokens"], offsets, strict=True):
            if not token.startswith("bytes:") and token != "</s>":
                assert text[offset : offset + len(token)] == token
        assert any(token.startswith("bytes:") for token in logprobs["tokens"])


def test_logprobs_of_an_echoed_prompt(router: Router) -> None:
    router.says("a</s>")
    choice = router.complete(prompt="the dog", logprobs=1, echo=True).json()["choices"][0]
    logprobs, length = choice["logprobs"], len(encode(router, "the dog"))
    assert logprobs["token_logprobs"] == [None, *(-float(n) for n in range(1, length)), -0.125, -0.25]
    assert logprobs["top_logprobs"][0] is None
    for token, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert top == {token: logprob}
    assert latest(router, 1)[0].prompt_logprobs
    assert router.complete(prompt="the dog", logprobs=1).status_code == 200
    assert not latest(router, 1)[0].prompt_logprobs
    assert router.complete(prompt="the dog", echo=True).json()["choices"][0]["logprobs"] is None
    assert not latest(router, 1)[0].prompt_logprobs


def test_special_tokens_that_nobody_wrote_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = small_tokenizers.write
    monkeypatch.setattr(small_tokenizers, "write", lambda folder, **files: write(folder, "llama", **files))
    with Router(settings(tmp_path)) as router:
        router.says("dog</s>")
        choice = router.complete(prompt="the cat", logprobs=0, echo=True).json()["choices"][0]
        assert choice["text"] == "the cat dog"
        assert choice["logprobs"]["tokens"][0] == "<s>"
        assert choice["logprobs"]["text_offset"][:2] == [0, 0]
        assert choice["logprobs"]["text_offset"][-1] == len("the cat dog")


def test_of_several_tokens_with_one_text_the_likeliest_is_told(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    router.says("a</s>")
    monkeypatch.setattr(type(router.service.tokenizer), "token_bytes", lambda *_, **__: b"x")
    choice = router.complete(logprobs=3).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"][0] == {"x": -0.125}


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_are_the_same(router: Router, echo: bool) -> None:
    router.says(" größe ☃</s>")
    fields: dict[str, Any] = {"prompt": ["the cat", "a"], "n": 2, "logprobs": 2, "echo": echo}
    whole = router.complete(**fields).json()
    chunks, texts = streamed(router, **fields)
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert joined([part["logprobs"] for part in own]) == choice["logprobs"]
        assert texts[choice["index"]] == choice["text"]


@pytest.mark.parametrize("fields", [{"logprobs": 6}, {"logprobs": 6, "echo": True, "stream": True}])
def test_too_many_logprobs(router: Router, fields: dict[str, Any]) -> None:
    error = router.complete(**fields).json()["error"]
    assert error == "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 6"


# --- Usage in streams


def test_usage_of_each_choice_as_tgi(router: Router) -> None:
    echoing(router)
    chunks, _ = streamed(router, prompt=["the cat", "a"], n=2)
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert len(ends) == 4
    for end in ends:
        assert list(end) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
        length = len(encode(router, ["the cat", "a"][end["choices"][0]["index"] // 2]))
        assert (end["usage"]["prompt_tokens"], end["usage"]["completion_tokens"]) == (length, length + 1)
    assert all("usage" not in chunk for chunk in chunks if chunk not in ends)


def test_continuous_usage(router: Router) -> None:
    ids = router.says("the lazy dog</s>")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks, _ = streamed(router, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, len(ids) + 1), len(ids)]
    assert list(chunks[0]) == ["object", "id", "created", "choices", "model", "system_fingerprint", "usage"]
    assert chunks[-1]["choices"] == []
    chunks, _ = streamed(router, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, len(ids) + 1)]


def test_usage_at_the_end_of_many(router: Router) -> None:
    echoing(router)
    chunks, _ = streamed(router, prompt=["the cat", "a"], n=2, stream_options={"include_usage": True})
    prompt = len(encode(router, "the cat")) + len(encode(router, "a"))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["prompt_tokens"] == prompt
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * (prompt + 2) == len(chunks) - 1


# --- Where a text ends


def test_a_token_that_ends_the_text_is_not_shown_unless_asked(router: Router) -> None:
    ids = router.says("the lazy dog</s>")
    end = encode(router, " lazy")[-1]
    at = ids.index(end)
    before = router.service.tokenizer.decode(ids[:at], skip_special_tokens=True)
    for fields, text in (
        ({}, before),
        (
            {"include_stop_str_in_output": True},
            router.service.tokenizer.decode(ids[: at + 1], skip_special_tokens=True),
        ),
    ):
        choice = router.complete(stop_token_ids=[end], **fields).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        assert streamed(router, stop_token_ids=[end], **fields)[1] == {0: text}


def test_no_stop_string_before_min_tokens(router: Router) -> None:
    router.says("a cat a cat a dog</s>")
    assert router.complete(stop="cat").json()["choices"][0]["text"] == "a "
    text = router.complete(stop="cat", min_tokens=len(encode(router, "a cat a"))).json()["choices"][0]["text"]
    assert text == "a cat a "
    assert latest(router, 1)[0].sampling.min_tokens == len(encode(router, "a cat a"))


def test_one_failing_choice_ends_the_others(router: Router) -> None:
    count = iter(range(9))
    router.reply = lambda submit: "no such luck" if next(count) == 2 else encode(router, "the dog") * 20
    response = router.complete(n=3)
    assert response.status_code == 424
    assert response.json()["error"] == "Request failed during generation: Server error: no such luck"
    router.says("a</s>")
    assert router.complete(n=3).status_code == 200
