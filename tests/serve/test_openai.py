"""OpenAI's routes against the real model: what only a real engine can show of a field's effect."""

from typing import Any

import httpx
import openai
import pytest
import torch

from tests.serve.conftest import Server

pytestmark = pytest.mark.real

STORY = "Once upon a time, in a small village by the sea, there lived an old fisherman who"


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"prompt": STORY, "max_tokens": 16, "temperature": 0, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text(server: Server, **fields: Any) -> str:
    answer: str = complete(server, **fields)["choices"][0]["text"]
    return answer


def ids_of(server: Server, prompt: str) -> list[int]:
    return [token["id"] for token in httpx.post(f"{server.url}/tokenize", json={"inputs": prompt}).json()]


def test_the_same_prompt_again_is_cached(client: openai.OpenAI):
    request: dict[str, Any] = {
        "model": "tgi",
        "messages": [{"role": "user", "content": "The cache is asked twice. " * 10}],
        "max_tokens": 4,
        "extra_body": {"cache_salt": "a test of its own"},
    }
    cached = []
    for _ in range(2):
        usage = client.chat.completions.create(**request).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    first, second = cached
    assert first == 0
    assert 16 <= (second or 0) < usage.prompt_tokens
    assert second == usage.prompt_tokens // 16 * 16 or second == (usage.prompt_tokens - 1) // 16 * 16
    request["extra_body"] = {"cache_salt": "another tenant"}
    usage = client.chat.completions.create(**request).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_echoed_logprobs_equal_the_references(server: Server, reference: Any):
    prompts = [STORY, "def fibonacci(n):\n    ", "🙂 emoji and ünïcode"]
    ids = [ids_of(server, prompt) for prompt in prompts]
    for asked in (prompts, ids):
        answer = complete(server, prompt=asked, echo=True, logprobs=1, max_tokens=1)
        for choice, prompt, own in zip(answer["choices"], prompts, ids, strict=True):
            with torch.inference_mode():
                expected = reference(torch.tensor([own])).logits[0].log_softmax(-1)
            logprobs = choice["logprobs"]
            assert choice["text"].startswith(prompt)
            assert logprobs["token_logprobs"][0] is None
            for at, id in enumerate(own[1:], 1):
                assert logprobs["token_logprobs"][at] == pytest.approx(float(expected[at - 1, id]), abs=1e-3)
                best = float(expected[at - 1].max())
                assert max(logprobs["top_logprobs"][at].values()) == pytest.approx(best, abs=1e-3)
            # Greedy: the token that follows is the likeliest, and told as such.
            assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    nothing = complete(server, prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    for whole, choice in zip(answer["choices"], nothing["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            whole["logprobs"]["token_logprobs"][:-1], abs=1e-3, nan_ok=True
        )


def test_choices_differ_and_can_be_had_again(server: Server):
    request: dict[str, Any] = {"n": 2, "seed": 11, "temperature": 1.0}
    first = [choice["text"] for choice in complete(server, **request)["choices"]]
    assert first[0] != first[1]
    assert [choice["text"] for choice in complete(server, **request)["choices"]] == first
    assert text(server, seed=11, temperature=1.0) == first[0]
    one, other = complete(server, n=2)["choices"]
    assert one["text"] == other["text"]


def test_the_best_of_two_is_the_likelier(server: Server):
    request: dict[str, Any] = {"seed": 5, "temperature": 1.5, "logprobs": 0}

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values) / len(values))

    both = complete(server, n=2, **request)["choices"]
    (best,) = complete(server, best_of=2, **request)["choices"]
    assert mean(best) == pytest.approx(max(map(mean, both)), abs=1e-4)


def test_what_ends_a_text(server: Server):
    plain = text(server)
    ids = ids_of(server, plain)
    third = ids[2]
    cut = complete(server, stop_token_ids=[third])
    assert cut["usage"]["completion_tokens"] == 3
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert plain.startswith(cut["choices"][0]["text"])
    shown = text(server, stop_token_ids=[third], include_stop_str_in_output=True)
    assert plain.startswith(shown)
    assert len(shown) > len(cut["choices"][0]["text"])
    later = complete(server, stop_token_ids=[third], min_tokens=8)
    assert later["usage"]["completion_tokens"] >= 8


def test_what_changes_the_choice_of_tokens(server: Server):
    plain = text(server)
    first = ids_of(server, plain)[0]
    assert ids_of(server, text(server, logit_bias={str(first): -100}))[0] != first
    assert text(server, watermark=True) != plain
    # Nothing but the likeliest token has its own likelihood.
    assert text(server, temperature=1.0, min_p=1.0, seed=3) == plain
    assert text(server, temperature=1.0, top_k=1, seed=3) == plain


def test_openais_stream_helper_reads_the_role_once(client: openai.OpenAI):
    request: dict[str, Any] = {
        "model": "tgi",
        "messages": [{"role": "user", "content": "What is the opposite of hot?"}],
        "temperature": 0,
        "max_tokens": 40,
        "stop": ["."],  # this helper takes no answer that its length ended
    }
    with client.chat.completions.stream(**request, n=2, logprobs=True) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    whole = client.chat.completions.create(**request)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == whole.choices[0].message.content


def test_one_model_by_its_name(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.created > 1_600_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
