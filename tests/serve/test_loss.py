"""What clients see when the engine is lost under load: nothing, but for a pause. Real processes, a tiny model."""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kernels.conftest import native as native_only
from tests.serve.conftest import Server
from tests.tiny import write_model

FRAGILE = (sys.executable, "-m", "tests.serve.fragile")
ENGINE = "tests.serve.fragile"
ROOT = Path(__file__).parents[2]

SAMPLED = {"do_sample": True, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 60, "maxLength": 90},
        "of_all_these_numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 9, "maxItems": 30},
    },
    "required": ["name", "of_all_these_numbers"],
    "additionalProperties": False,
}
CHAT = {"messages": [{"role": "user", "content": "a cat and a dog"}], "max_tokens": 150}
LONG = "the quick brown fox jumps over the lazy dog " * 4

Body = dict[str, Any]


def native(inputs: str, tokens: int = 300, **parameters: Any) -> Body:
    return {"inputs": inputs, "parameters": {"max_new_tokens": tokens, "details": True, **parameters}}


ASKED: list[tuple[str, Body]] = [
    ("/generate_stream", native("hello world")),
    ("/generate_stream", native("hello world", **SAMPLED, temperature=1.3)),
    ("/generate_stream", native("a cat", **SAMPLED, top_k=40, top_p=0.9, typical_p=0.9, top_n_tokens=3)),
    ("/generate", native(LONG, 200, **SAMPLED, decoder_input_details=True, top_n_tokens=2)),
    ("/generate", native("the dog", **SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4)),
    ("/generate", native("the mat", **SAMPLED, watermark=True)),
    ("/v1/completions", {"prompt": "the fox", "best_of": 2, "seed": 4, "max_tokens": 150, "logprobs": 2}),
    ("/generate_stream", native("x", **SAMPLED, grammar={"type": "regex", "value": "(ab|cde|[f-k]{3}lmnop){30,50}"})),
    ("/generate", native("a cat", **SAMPLED, grammar={"type": "json", "value": SCHEMA})),
    ("/generate_stream", native("a dog", **SAMPLED, stop=["qu", "brown fox jumps"], min_tokens=150)),
    ("/v1/chat/completions", {**CHAT, "stream": True, "temperature": 0, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "n": 2, "seed": 3, "presence_penalty": 0.5, "logit_bias": {"50": 3}}),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "stream": True,
            "seed": 5,
            "messages": [*CHAT["messages"], {"role": "assistant", "content": "<think>"}],  # type: ignore[misc]
            "continue_final_message": True,
            "thinking_budget": 60,
        },
    ),
    ("/v1/completions", {"prompt": [LONG, "x"], "echo": True, "logprobs": 1, "max_tokens": 120, "seed": 2}),
    ("/v1/messages", {**CHAT, "stream": True, "model": "m", "temperature": 0.0}),
    ("/v1/responses", {"input": "hello", "stream": True, "max_output_tokens": 200, "temperature": 0}),
    ("/v1/embeddings", {"input": [LONG, "a cat"], "model": "m"}),
]
OF_THE_MOMENT = {
    *("created", "created_at", "completed_at", "prompt_tokens_details", "input_tokens_details"),
    *("input_tokens", "cache_read_input_tokens", "item_id"),
}


class Asking:
    """One request on its way."""

    def __init__(self, server: Server, path: str, body: Body) -> None:
        self.events = 0
        self._url = f"{server.url}{path}"
        self._body = body

    def answer(self) -> Any:
        """What of it is the same each time."""
        if not (self._body.get("stream") or self._url.endswith("_stream")):
            response = httpx.post(self._url, json=self._body, timeout=120)
            assert response.status_code == 200, response.text
            return lasting(response.json())
        told = []
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data:") and line != "data: [DONE]":
                    self.events += 1
                    told.append(lasting(json.loads(line[5:])))
        return told


def lasting(value: Any) -> Any:
    if isinstance(value, list):
        return [lasting(item) for item in value]
    if isinstance(value, dict):
        return {
            key: lasting(item)
            for key, item in value.items()
            if key not in OF_THE_MOMENT and not (key == "id" and isinstance(item, str))
        }
    return value


class Load:
    """All of it at once."""

    def __init__(self, server: Server, asked: list[tuple[str, Body]] = ASKED) -> None:
        self._asking = [Asking(server, path, body) for path, body in asked]
        self._clients = ThreadPoolExecutor(len(asked))
        self._answers: list[Future[Any]] = [self._clients.submit(asking.answer) for asking in self._asking]

    @property
    def events(self) -> int:
        return sum(asking.events for asking in self._asking)

    @property
    def done(self) -> bool:
        return all(answer.done() for answer in self._answers)

    def grow(self, events: int) -> None:
        """Wait until so many more have come."""
        goal = self.events + events
        until(lambda: self.events >= goal)

    def answers(self) -> list[Any]:
        with self._clients:
            return [answer.result(120) for answer in self._answers]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def healthy(server: Server) -> bool:
    return httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def end_engine(server: Server, number: signal.Signals = signal.SIGKILL, module: str = ENGINE, rank: int = 0) -> int:
    """Returns the pid of the next one."""
    before = server.children(rank)[module]
    os.kill(before, number)
    until(lambda: server.children(rank).get(module, before) != before)
    return server.children(rank)[module]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


def special(folder: Path, token: str) -> str:
    """Its id."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return str(next(entry["id"] for entry in added if entry["content"] == token))


@contextmanager
def serving(folder: Path, log: Path, *more: str, **environment: str) -> Iterator[Server]:
    """Leaves nothing behind."""
    options = ("--model-id", str(folder), "--device", "cpu", "--dtype", "float32", "--reasoning-parser", "think")
    server = Server(*options, *more, log=log, program=FRAGILE, PYTHONPATH=str(ROOT), **environment).wait_ready()
    command = Path(f"/proc/{server.children()[ENGINE]}/cmdline").read_text().split("\0")
    run_dir = Path(command[command.index("--settings") + 1]).parent
    try:
        yield server
    finally:
        server.stop()
        if server.session():
            raise AssertionError(f"{server.session()} outlive the launcher")
    assert not run_dir.exists()


def test_requests_end_as_if_nothing_had_happened(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log") as server:
        router = server.children()["tgi.router.app"]
        undisturbed = Load(server).answers()
        load = Load(server)
        time.sleep(0.05)
        os.kill(end_engine(server), signal.SIGKILL)  # in their prompts; and the next one as it starts
        load.grow(100)
        end_engine(server, signal.SIGSTOP)
        load.grow(500)
        end_engine(server)
        until(lambda: healthy(server))
        assert not load.done
        end_engine(server)
        for (path, body), expected, answer in zip(ASKED, undisturbed, load.answers(), strict=True):
            assert answer == expected, (path, body)
        assert healthy(server)
        assert server.children()["tgi.router.app"] == router
        assert server.metric("tgi_engine_restarts") == 4
        assert all(server.metric(f'tgi_request_failure{{err="{kind}"}}') == 0 for kind in ("generation", "dropped"))
        assert "Shard 0 crashed: killed by SIGKILL" in server.output
        assert "Shard 0 crashed: stopped by SIGSTOP" in server.output
        assert server.output.count("Restarting the engine") == 5


def test_a_request_that_ends_the_engine_each_time_fails_alone(tiny: Path, tmp_path: Path) -> None:
    mark = "<|im_end|>"
    with serving(tiny, tmp_path / "log", POISON=special(tiny, mark)) as server:
        asked = ASKED[:6]
        undisturbed = Load(server, asked).answers()
        load = Load(server, asked)
        load.grow(10)
        url, body = f"{server.url}/generate_stream", native(f"{mark} a cat")
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            *tokens, error = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
        assert (len(tokens), error["error_type"]) == (10, "crash")
        assert load.answers() == undisturbed
        assert healthy(server)
        assert server.output.count("Shard 0 crashed") == server.metric("tgi_engine_restarts") == 3
        assert server.metric('tgi_request_failure{err="generation"}') == 1


def test_a_step_that_hangs_says_where_and_is_done_again(tiny: Path, tmp_path: Path) -> None:
    mark = "<|im_end|>"
    with serving(tiny, tmp_path / "log", HANG=special(tiny, mark)) as server:
        time.sleep(2.5)  # idle for longer than a step may take
        body = native(f"{mark} a cat", 20)
        first = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
        assert "Shard 0 crashed: it hung in a step; where, stands above\n" in server.output
        assert "in weakly\n" in server.output
        assert httpx.post(f"{server.url}/generate", json=body, timeout=60).json() == first


@pytest.mark.parametrize("by", ["signal", "failure"])
def test_open_requests_get_clean_errors_when_there_will_be_no_engine(tmp_path: Path, by: str) -> None:
    folder = write_model(tmp_path / "model", "llama")
    with serving(folder, tmp_path / "log") as server:
        answers: list[httpx.Response] = []
        body = native("hello world", 400)
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/generate", json=body, timeout=60))
        )
        waiting.start()
        with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            if by == "failure":
                (folder / "model.safetensors").rename(folder / "gone")
            end_engine(server)
            if by == "signal":
                server.process.send_signal(signal.SIGTERM)
                begin = time.monotonic()
            events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
        waiting.join(30)
        assert events[-1]["error_type"] == "generation"
        assert (answers[0].status_code, answers[0].json()["error_type"]) == (424, "generation")
        code = server.process.wait(30)
        if by == "signal":
            assert code == 0
            assert time.monotonic() - begin < 5
        else:
            assert code == 1
            last = server.output.strip().splitlines()[-1]
            assert last.startswith("Error: ShardCannotStart: ") and "model.safetensors" in last
            assert server.output.count("Restarting the engine") == 3


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=native_only)])
def test_twenty_losses_of_the_real_model(tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long it takes from the loss until the server is ready, and until the first token comes."""
    prompts = ["The capital of France is", "Once upon a time", "def add(a, b):", "One, two, three,"]
    ways: list[Body] = [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.2}, {**SAMPLED, "top_n_tokens": 3}]
    asked = [("/generate_stream", native(prompt, 100, **way)) for prompt in prompts for way in ways]
    server = Server("--device", "cpu", "--num-shard", str(ranks), log=tmp_path / "log").wait_ready()
    undisturbed = Load(server, asked).answers()
    readies, tokens = [], []
    for turn, rank in product(range(20), range(ranks)):
        time.sleep(10)  # what is lost again sooner waits
        load = Load(server, asked)
        load.grow(1 + 60 * turn)  # from the first token to three quarters of all
        begin = time.monotonic()
        end_engine(server, module="tgi.engine.process", rank=rank)
        time.sleep(0.2)  # what was on its way has come
        load.grow(1)
        tokens.append(time.monotonic() - begin)
        until(lambda: healthy(server))
        readies.append(time.monotonic() - begin)
        assert load.answers() == undisturbed
    assert server.metric("tgi_engine_restarts") == 20 * ranks
    assert server.stop() == 0
    assert not server.session()
    with capsys.disabled():
        for name, seconds in (("ready", readies), ("first token", tokens)):
            middle = statistics.median(seconds)
            print(f"\n{ranks} ranks, {name}: {min(seconds):.2f} to {max(seconds):.2f} s, median {middle:.2f} s")
