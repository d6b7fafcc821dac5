"""One model over several processes: clients can't tell. Real processes."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.conftest import native as native_only
from tests.serve.conftest import Server
from tests.serve.test_loss import ASKED, Load, end_engine, healthy, native, serving, until
from tests.tiny import write_model

pytestmark = native_only


def alike(one: Any, other: Any) -> bool:
    """But for rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-4 * max(1, abs(one))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return bool(one == other)


def test_the_loss_of_any_rank_is_that_of_the_engine(tmp_path: Path) -> None:
    """And what three ranks say is what one says."""
    tiny = write_model(tmp_path / "model", "llama")
    with serving(tiny, tmp_path / "alone") as server:
        alone = Load(server).answers()
    with serving(tiny, tmp_path / "log", "--num-shard", "3") as server:
        undisturbed = Load(server).answers()
        for (path, body), expected, answer in zip(ASKED, alone, undisturbed, strict=True):
            assert alike(answer, expected), (path, body)
        load = Load(server)
        for rank, number in ((1, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL), (2, signal.SIGKILL)):
            load.grow(100)
            end_engine(server, number, rank=rank)
        until(lambda: healthy(server))
        for (path, body), expected, answer in zip(ASKED, undisturbed, load.answers(), strict=True):
            assert answer == expected, (path, body)
        assert server.metric("tgi_engine_restarts") == 4
        for rank in range(3):
            assert f"Shard {rank} crashed" in server.output


def test_a_rank_that_cant_start_says_why_once(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "model", "llama")
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    server = Server("--model-id", str(tiny), "--num-shard", "2", "--device", "cpu", log=tmp_path / "log")
    assert server.process.wait(60) == 1
    last = server.output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "model.safetensors" in last
    assert server.output.count(last.removeprefix("Error: ").partition(": ")[2]) <= 2
    assert not server.session()


@pytest.mark.real
def test_three_ranks_of_the_real_model_say_what_one_says(server: Server, tmp_path: Path) -> None:
    """9 heads in 3 groups."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    asked = [
        ("/generate", native("The capital of France is", 24)),
        ("/generate", native("Once upon a time", 24, do_sample=True, seed=11, temperature=0.8)),
        ("/generate", native("A city as JSON:", 24, grammar={"type": "json", "value": schema})),
        ("/generate_stream", native("def add(a, b):", 24, do_sample=True, seed=12, top_p=0.9, repetition_penalty=1.2)),
    ]
    alone = Load(server, asked).answers()
    ranks = Server("--num-shard", "3", "--device", "cpu", "--dtype", "float32", log=tmp_path / "log").wait_ready()
    for _ in range(2):  # the second time out of the prefix cache
        for expected, answer in zip(alone, Load(ranks, asked).answers(), strict=True):
            assert alike(answer, expected)
    assert ranks.stop() == 0 and not ranks.session()
