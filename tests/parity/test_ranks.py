"""A model held by several processes computes what one does. More families: test_more.py."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from socket import SHUT_WR, socket, socketpair
from typing import Any, cast

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.kernels.conftest import native
from tests.parity.conftest import Engine, load, logits, tokens
from tests.parity.ranks import meet, rank_logits, same_in_ranks, together
from tests.serve.conftest import free_port
from tests.tiny import FAMILIES, write_model
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.messages import Delta, Sampling, Submit, Token
from tgi.layers.checkpoint import _Run
from tgi.parallel import Group
from tgi.runtime.ranks import Follower, Leader, fingerprint
from tgi.runtime.runner import Runner


@native
@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path: Path, name: str) -> None:
    same_in_ranks(write_model(tmp_path, name))


@native
@pytest.mark.parametrize("heads", [(9, 3), (6, 6), (5, 1), (8, 2)])
def test_heads_that_divide_and_that_dont(tmp_path: Path, heads: tuple[int, int]) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": heads[0] * 8}
    same_in_ranks(write_model(tmp_path, "llama", **sizes, intermediate_size=70, vocab_size=431))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_without_kernels_of_ours(tmp_path: Path, name: str) -> None:
    folder, sequences = write_model(tmp_path, name), (tokens(30), tokens(11, seed=1))
    alone = logits(load(folder, max_total_tokens=64), *sequences)
    found = rank_logits(folder, 2, *sequences, port=free_port())
    assert (found - alone).abs().max() < 1e-5 * max(1, alone.abs().max())


SUBMITS = [
    Submit(number, tokens(length, seed=number).tolist(), length, 12, [], sampling, 0.0, prompt_logprobs=number == 2)
    for number, (length, sampling) in enumerate(
        [
            (70, Sampling()),
            (33, Sampling(greedy=False, seed=7, temperature=0.8)),
            (21, Sampling(greedy=False, seed=8, top_k=20, top_p=0.9, repetition_penalty=1.3, top_n_tokens=3)),
        ]
    )
]


def told(folder: Path, group: Group, lines: Sequence[socket], *, ahead: bool = False) -> dict[int, list[Delta]]:
    """What an engine makes of these in chunks, preempting, and once more with what the cache has."""
    engine = Engine(folder, group=group, max_total_tokens=128, blocks=10, step_tokens=24, ahead=ahead)
    meet(group, lines)
    if group.rank:
        Follower(lines[0]).run(engine.runner, b"same", 0)
        return {}
    if lines:
        engine.runner.leader = Leader(lines)
        engine.runner.leader.wait(b"same")
    engine.run(*SUBMITS)
    assert engine.preempted
    engine.run(*(msgspec.structs.replace(submit, id=submit.id + 100) for submit in SUBMITS))
    assert not engine.faults
    return engine.deltas


@native
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("count", [2, 3])
def test_an_engine_of_several_ranks_says_what_one_says(tmp_path: Path, name: str, count: int) -> None:
    folder = write_model(tmp_path, name)
    same(told(folder, Group(), []), together(count, partial(told, folder)))


@pytest.mark.usefixtures("without_kernels")
def test_ranks_get_what_the_first_has_drawn_before_it_reads_it(tmp_path: Path) -> None:
    """As GPUs do, which run by themselves."""
    folder = write_model(tmp_path, "llama")
    same(told(folder, Group(), []), together(2, partial(told, folder, ahead=True), port=free_port()))


def same(alone: dict[int, list[Delta]], found: dict[int, list[Delta]]) -> None:
    assert found.keys() == alone.keys() and len(alone) == 2 * len(SUBMITS)
    for number, deltas in alone.items():
        for one, other in zip(_tokens(deltas), _tokens(found[number]), strict=True):
            assert one.id == other.id and abs(one.logprob - other.logprob) < 1e-5
            assert [id for id, _ in one.top] == [id for id, _ in other.top]
        scores, others = (
            [score.logprob for delta in each for score in delta.prompt] for each in (deltas, found[number])
        )
        assert others == pytest.approx(scores, abs=1e-5)


def _tokens(deltas: Sequence[Delta]) -> list[Token]:
    return [token for delta in deltas for token in delta.tokens]


def test_ranks_of_different_weights_dont_go_together() -> None:
    ours, theirs = socketpair()
    with ours, theirs:
        theirs.sendall(b"other")
        with pytest.raises(StartupError, match="rank 1 has loaded other weights than rank 0"):
            Leader([ours]).wait(b"these")


def test_ranks_capture_when_the_first_does() -> None:
    """A graph holds sums over all of them."""

    class Captures:
        captured = 0

        def capture(self) -> None:
            self.captured += 1

    ours, theirs = socketpair()
    runner = Captures()
    with ours, theirs:
        Leader([ours]).capture()
        ours.shutdown(SHUT_WR)
        Follower(theirs).run(cast(Runner, runner), b"same", 0)
    assert runner.captured == 1


def test_a_fingerprint_is_that_of_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    before = fingerprint(files)
    assert fingerprint(files) == before
    os.utime(folder / "model.safetensors", (1, 1))
    assert fingerprint(files) != before


@native
@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_reads_its_own_bytes_and_no_others(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices; norms, which are small, are read by all."""
    folder = write_model(tmp_path, "llama", num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    read = 0
    real = _Run.__getitem__

    def counted(run: _Run, rows: slice) -> Any:
        nonlocal read
        part = real(run, rows)
        assert isinstance(part, torch.Tensor)
        read += part.nbytes
        return part

    monkeypatch.setattr(_Run, "__getitem__", counted)
    shares = []
    for rank in range(count):
        read = 0
        load(folder, max_total_tokens=64, group=Group(rank, count))
        shares.append(read)
    matrices = [tensor.nbytes for tensor in load_file(folder / "model.safetensors").values() if tensor.dim() == 2]
    assert 1 <= sum(shares) / sum(matrices) < 1.03  # the first row of each is looked at twice
    assert max(shares) < 1.2 * sum(matrices) / count
