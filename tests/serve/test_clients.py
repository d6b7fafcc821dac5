"""The official clients against the real server."""

import json
import subprocess
from pathlib import Path

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.serve.conftest import Server

pytestmark = pytest.mark.real

QUESTION = "What is the opposite of hot?"
TEXT_GENERATION = Path(__file__).parents[2] / ".venv-clients" / "text-generation" / "bin" / "python"


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
    assert "`temperature` must be strictly positive" in error.value.response.json()["error"]
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.chat.completions.create(model="tgi", messages=[{"role": "user", "content": "x"}], n=3)
    assert "`n`" in error.value.response.text


def test_huggingface_hub(server: Server):
    client = InferenceClient(base_url=server.url)
    answer = client.chat_completion([{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40)
    assert "cold" in answer.choices[0].message.content.lower()
    streamed = client.chat_completion(
        [{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40, stream=True
    )
    assert "".join(part.choices[0].delta.content for part in streamed) == answer.choices[0].message.content


def test_huggingface_hub_text_generation(server: Server):
    client = InferenceClient(model=server.url)
    # A model without a pipeline tag answers the base URL with the whole text, as TGI does, unless told otherwise.
    assert client.text_generation("The opposite of hot is", max_new_tokens=8).startswith("The opposite of hot is cold")
    request = {"prompt": "The opposite of hot is", "max_new_tokens": 8, "return_full_text": False}
    text = client.text_generation(**request)
    details = client.text_generation(**request, details=True)
    assert details.generated_text == text
    assert details.details.generated_tokens == 8
    assert details.details.finish_reason == "length"
    stream = list(client.text_generation(**request, details=True, stream=True))
    assert "".join(event.token.text for event in stream) == text
    assert stream[-1].generated_text == text
    assert stream[-1].details.generated_tokens == 8
    with pytest.raises((HfHubHTTPError, Exception), match="top_p"):
        client.text_generation("x", top_p=2.0)


SCRIPT = """
import asyncio, json, sys
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

url, question = sys.argv[1:]
client = Client(url, timeout=60)
answer = client.generate("The opposite of hot is", max_new_tokens=8)
events = list(client.generate_stream("The opposite of hot is", max_new_tokens=8))
best = client.generate("Hello", max_new_tokens=4, best_of=2, do_sample=True)
chat = client.chat([{"role": "user", "content": question}], max_tokens=40, temperature=0.0)
parts = []
try:
    for part in client.chat([{"role": "user", "content": question}], max_tokens=40, temperature=0.0, stream=True):
        parts.append(part)
except json.JSONDecodeError:
    pass  # this client can't read the [DONE] that TGI and OpenAI end a stream with
try:
    client.generate("x", temperature=0.5, max_new_tokens=10**6)
    refused = ""
except ValidationError as error:
    refused = str(error)

async def stream():
    return [event.token.text async for event in AsyncClient(url).generate_stream("One two", max_new_tokens=5)]

print(json.dumps({
    "text": answer.generated_text,
    "tokens": answer.details.generated_tokens,
    "streamed": "".join(event.token.text for event in events),
    "last": events[-1].generated_text,
    "best": len(best.details.best_of_sequences or []),
    "chat": chat.choices[0].message.content,
    "parts": "".join(part.choices[0].delta.content for part in parts),
    "refused": refused,
    "asynchronous": len(asyncio.run(stream())),
}))
"""


def test_text_generation(server: Server):
    """Its own environment, which scripts/test makes: it wants a hub library older than ours."""
    run = subprocess.run(
        [TEXT_GENERATION, "-c", SCRIPT, server.url, QUESTION], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert got["text"] == got["streamed"] == got["last"] != ""
    assert got["tokens"] == 8
    assert got["best"] == 1
    assert "cold" in got["chat"].lower()
    assert got["parts"] == got["chat"]
    assert "max_new_tokens" in got["refused"]
    assert got["asynchronous"] == 5
