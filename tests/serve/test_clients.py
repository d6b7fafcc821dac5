"""The official clients against the real server."""

import json

import httpx
import openai
import pytest
import torch

from tests.serve.clients.environments import Client, table
from tests.serve.conftest import Server
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store

pytestmark = pytest.mark.real

QUESTION = "What is the opposite of hot?"
CONTINUATIONS = [
    ("The capital of France is", " Paris"),
    ("The opposite of hot is", " banana split"),
    ("One, two, three, four,", " five, six"),
    ("def add(a, b):\n    return", " a + b"),
]
"""What lm-eval asks the likelihood of: the second text behind the first."""


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tgi", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40, logprobs=True
    )
    (choice,) = answer.choices
    assert "cold" in (choice.message.content or "").lower()
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or []) == answer.usage.completion_tokens


def test_openai_chat_streams_the_same_text(client: openai.OpenAI):
    request = {"model": "tgi", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_stop_strings_are_found_and_removed(client: openai.OpenAI):
    answer = client.completions.create(
        model="tgi", prompt="1 2 3 4 5 6 7", stop=["12", "nothing"], temperature=0, max_tokens=60
    )
    assert "12" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.rstrip().endswith("11")


def test_openai_models_and_errors(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert "SmolLM2" in model.id
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.completions.create(model="tgi", prompt="x", temperature=-1)
    assert "`temperature` must be strictly positive" in str(error.value)


@pytest.fixture(scope="module")
def folder() -> str:
    """Where clients that count tokens find the model's tokenizer."""
    return resolve_model(flags.DEFAULT_MODEL, None, store(flags.cache_options())).folder


@pytest.mark.parametrize("client", list(table()), ids=lambda client: client.name)
def test_client(client: Client, server: Server, folder: str, request: pytest.FixtureRequest):
    if client.heavy and not client.installed:
        pytest.skip("a heavy one: scripts/clients installs and runs it")
    arguments = [server.url]
    if client.name in ("guidellm", "lm-eval"):
        arguments.append(folder)
    if client.name != "lm-eval":
        client.run(*arguments)
        return
    reference = request.getfixturevalue("reference")
    found = json.loads(client.run(*arguments, json.dumps(CONTINUATIONS)))
    for (context, continuation), (logprob, greedy) in zip(CONTINUATIONS, found, strict=True):
        ids = [_ids(server, context), _ids(server, context + continuation)]
        tokens = torch.tensor(ids[1])
        with torch.inference_mode():
            logits = reference(tokens[None]).logits[0].log_softmax(-1)
        at = range(len(ids[0]) - 1, len(ids[1]) - 1)
        assert logprob == pytest.approx(sum(float(logits[i, tokens[i + 1]]) for i in at), abs=1e-3)
        assert greedy == all(int(logits[i].argmax()) == tokens[i + 1] for i in at)


def _ids(server: Server, text: str) -> list[int]:
    return [token["id"] for token in httpx.post(f"{server.url}/tokenize", json={"inputs": text}).json()]
