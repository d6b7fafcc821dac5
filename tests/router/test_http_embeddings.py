"""/v1/embeddings over HTTP, with the official client and without. The fake engine's vector is the prompt's ids."""

import base64
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from msgspec.structs import replace

from tests import small_tokenizers
from tests.router.serving import LIMITS, Router, settings, until
from tgi.core.config import Settings


def with_specials(folder: Path, **changes: Any) -> Settings:
    """A tokenizer that puts <s> before each text."""
    made = settings(folder, **changes)
    small_tokenizers.write(folder, "llama")
    return made


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(with_specials(tmp_path_factory.mktemp("model"))) as router:
        yield router


@pytest.fixture
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def embed(router: Router, given: Any = "a cat", **fields: Any) -> httpx.Response:
    return router.http.post("/v1/embeddings", json={"input": given, **fields})


def ids_of(router: Router, text: str, *, special: bool = True) -> list[int]:
    return router.service.tokenizer.encode(text, add_special_tokens=special)


def unit(ids: list[int]) -> Any:
    return pytest.approx([id / math.hypot(*ids) for id in ids], abs=1e-7)


def test_the_answer_is_openais(router: Router) -> None:
    ids = ids_of(router, "a cat")
    response = embed(router)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-prompt-tokens"] == str(len(ids))
    answer = response.json()
    assert list(answer) == ["object", "data", "model", "usage"]
    (item,) = answer["data"]
    assert list(item) == ["object", "index", "embedding"]
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": unit(ids)}],
        "model": "a/model",
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
    }


@pytest.mark.parametrize(
    "given",
    [
        ["a cat", "the dog"],
        [[5, 6, 7], [8]],
        ["a cat", [5, 6, 7]],
        [5, 6, 7],
        ["the dog"] * 20,
    ],
)
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "base64"}, {"encoding_format": "float"}])
def test_the_official_client_reads_every_input_in_order(
    router: Router, client: openai.OpenAI, given: Any, encoding: dict[str, Any]
) -> None:
    """Unless told otherwise, it asks for base64 itself."""
    prompts = [given] if isinstance(given[0], int) else given
    expected = [ids_of(router, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    answer = client.embeddings.create(model="any", input=given, user="u", **encoding)
    assert [item.index for item in answer.data] == list(range(len(expected)))
    for item, ids in zip(answer.data, expected, strict=True):
        vector: Any = item.embedding
        if encoding == {"encoding_format": "base64"}:
            data = base64.b64decode(vector)
            vector = list(struct.unpack(f"<{len(data) // 4}f", data))
        assert vector == unit(ids)
    total = sum(map(len, expected))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (total, total)


def test_wishes_reach_the_engine(router: Router) -> None:
    embed(router).raise_for_status()
    plain = router.engine.submits[-1]
    ids = ids_of(router, "a cat")
    assert (plain.token_ids, plain.prompt_length, plain.max_new_tokens) == (ids, len(ids), 0)
    assert (plain.pooling, plain.priority, plain.cache_salt) == ("mean", 0, b"")
    embed(router, pooling="last", priority=-3, cache_salt="x", add_special_tokens=False).raise_for_status()
    wished = router.engine.submits[-1]
    assert wished.token_ids == ids_of(router, "a cat", special=False) != ids
    assert (wished.pooling, wished.priority) == ("last", -3)
    assert wished.cache_salt
    embed(router, truncate_prompt_tokens=2).raise_for_status()
    assert router.engine.submits[-1].token_ids == ids[-2:]


def test_dimensions_are_the_models(router: Router) -> None:
    size = len(ids_of(router, "a cat"))
    assert embed(router, dimensions=size).status_code == 200
    response = embed(router, dimensions=size - 1)
    assert response.status_code == 422
    assert response.json() == {
        "error": f"Input validation error: `dimensions` must be {size}, the model's own. Given: {size - 1}",
        "error_type": "validation",
    }


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"input": []}, "`input` must have between 1 and 2048 items. Given: 0"),
        ({"input": [[1]] * 2049}, "`input` must have between 1 and 2048 items. Given: 2049"),
        ({"input": ""}, "cannot be empty"),
        ({"input": ["a", ""]}, "cannot be empty"),
        ({"input": [[]]}, "cannot be empty"),
        ({"input": [1, "a"]}, "`input` must be all token ids"),
        ({"input": [1, [2]]}, "`input` must be all token ids"),
        ({"input": [99999]}, "names token 99999"),
        ({"input": "cat " * 120}, "must have less than 100 tokens. Given:"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "`truncate_prompt_tokens` must be > 0 and <= 100"),
        ({"input": "a", "truncate_prompt_tokens": 101}, "`truncate_prompt_tokens` must be > 0 and <= 100"),
    ],
)
def test_what_cannot_be_embedded_is_told_by_name(router: Router, body: dict[str, Any], text: str) -> None:
    response = router.http.post("/v1/embeddings", json=body)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert text in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": -1}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
    ],
)
def test_what_is_of_another_type_is_told_by_name(router: Router, body: dict[str, Any], field: str) -> None:
    response = router.http.post("/v1/embeddings", json=body)
    assert response.status_code == 422
    assert field in response.text


def test_a_call_takes_its_share_of_the_permits_and_no_more(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path)) as router:
        router.engine.pause()
        responses: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: responses.append(embed(router, ["a cat"] * 10)))
        thread.start()
        most = LIMITS.max_client_batch_size
        until(lambda: len(router.engine.submits) == most)
        router.http.post("/tokenize", json={"inputs": "a round through the event loop"}).raise_for_status()
        assert len(router.engine.submits) == most
        router.engine.resume()
        thread.join()
        assert responses[0].status_code == 200
        assert len(responses[0].json()["data"]) == len(router.engine.submits) == 10


def test_a_small_server_takes_the_inputs_one_by_one(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path, limits=replace(LIMITS, max_concurrent_requests=1))) as router:
        assert len(embed(router, ["a cat"] * 10).json()["data"]) == 10
        router.engine.pause()
        body = {"input": "a cat"}
        with router.send_raw("/v1/embeddings", body):
            until(lambda: len(router.engine.submits) == 11)
            response = embed(router)
            assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")


def test_a_client_that_leaves_takes_its_inputs_along(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path)) as router:
        router.engine.pause()
        with router.send_raw("/v1/embeddings", {"input": ["a cat"] * 10}):
            until(lambda: len(router.engine.submits) == LIMITS.max_client_batch_size)
        until(lambda: len(router.engine.cancels) == LIMITS.max_client_batch_size)
        router.engine.resume()
        assert len(embed(router, ["a cat"] * LIMITS.max_concurrent_requests).json()["data"]) == 8
        assert len(router.engine.submits) == LIMITS.max_client_batch_size + 8
        assert router.metric('tgi_request_failure{err="dropped"}') == LIMITS.max_client_batch_size


def test_a_failure_of_one_input_is_the_calls(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path)) as router:
        router.reply = lambda submit: "it broke" if submit.token_ids == [7] else []
        response = embed(router, [[5], [6], [7], [8], [9], [10]])
        assert response.status_code == 424
        assert response.json()["error"] == "Request failed during generation: Server error: it broke"
        assert embed(router, [[5]] * 8).status_code == 200


def test_each_input_counts_as_a_request(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path)) as router:
        embed(router, [[5, 6], [7]]).raise_for_status()
        embed(router, [])
        assert router.metric("tgi_request_count") == 2
        assert router.metric("tgi_request_success") == 2
        assert router.metric("tgi_request_input_length_sum") == 3
        assert router.metric("tgi_request_duration_count") == 2
        assert router.metric("tgi_request_mean_time_per_token_duration_count") == 0
        assert router.metric('tgi_request_failure{err="validation"}') == 1


def test_the_key_is_asked_for(tmp_path: Path) -> None:
    with Router(with_specials(tmp_path, api_key="k")) as router:
        assert embed(router).status_code == 401


def test_a_vector_of_zeros_stays_one(router: Router) -> None:
    (item,) = embed(router, [0]).json()["data"]
    assert item["embedding"] == [0.0]
