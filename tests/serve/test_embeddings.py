"""Embeddings of the demo model: transformers' hidden states, through the whole server and the official client."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from torch.nn.functional import normalize

from tests.serve.conftest import Server

pytestmark = pytest.mark.real

TEXTS = [
    "The cat sat on the mat.",
    "A kitten is lying on the rug.",
    "Quarterly revenue grew by four percent.",
    "🙂 emoji and ünïcode",
    "x",
    " ".join(f"Sentence number {n} says nothing." for n in range(80)),
]
"""The last one takes more than one step on a CPU."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def tokens(server: Server, text: str) -> list[int]:
    return [token["id"] for token in httpx.post(f"{server.url}/tokenize", json={"inputs": text}).json()]


@pytest.fixture(scope="module")
def expected(server: Server, reference: Any) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Of each text: its number of tokens, and the vector by pooling."""
    found = []
    for text in TEXTS:
        ids = tokens(server, text)
        with torch.inference_mode():
            states = reference.model(torch.tensor([ids])).last_hidden_state[0]
        vectors = {"mean": states.mean(0), "last": states[-1]}
        found.append((len(ids), {name: normalize(vector, dim=0) for name, vector in vectors.items()}))
    assert found[-1][0] > 512
    return found


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
def test_vectors_equal_the_references(
    client: openai.OpenAI,
    expected: list[tuple[int, dict[str, torch.Tensor]]],
    pooling: str,
    encoding: dict[str, Any],
) -> None:
    answer = client.embeddings.create(model="tgi", input=TEXTS, extra_body={"pooling": pooling}, **encoding)
    assert answer.usage.prompt_tokens == sum(count for count, _ in expected)
    for item, (_, vectors) in zip(answer.data, expected, strict=True):
        torch.testing.assert_close(torch.tensor(item.embedding), vectors[pooling], atol=1e-4, rtol=0)


def test_like_texts_lie_close(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tgi", input=TEXTS[:3])
    cat, kitten, revenue = (torch.tensor(item.embedding) for item in answer.data)
    assert float(cat @ kitten) > float(cat @ revenue)


def test_a_vector_is_the_same_alone_among_others_and_beside_generations(server: Server, client: openai.OpenAI) -> None:
    alone = [client.embeddings.create(model="tgi", input=text).data[0].embedding for text in TEXTS]
    with client.completions.create(model="tgi", prompt="Count: 1 2 3", max_tokens=2000, stream=True) as stream:
        next(stream)
        together = client.embeddings.create(model="tgi", input=TEXTS * 2)
    for item, vector in zip(together.data, alone * 2, strict=True):
        torch.testing.assert_close(torch.tensor(item.embedding), torch.tensor(vector), atol=1e-5, rtol=0)
    server.generate("still fine", max_new_tokens=2)
