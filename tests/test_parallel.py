"""Sums between GPUs, by size: no GPU is here, so the kernels are stood in for."""

import socket
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from tests.parity.ranks import together
from tests.serve.conftest import free_port
from tgi.parallel import Collective, Group, SymmetricMemory


@pytest.mark.parametrize(
    ("numbers", "multicast", "way"),
    [(64, False, "one_shot"), (1 << 18, False, "two_shot"), (64, True, "multimem"), (7, True, ""), (1 << 23, True, "")],
)
def test_the_way_of_a_sum(numbers: int, multicast: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, called = torch.zeros(SymmetricMemory.MOST, dtype=torch.uint8), []

    def double(name: str) -> object:
        def run(shared: torch.Tensor, operation: str, group: str) -> torch.Tensor:
            assert (operation, group) == ("sum", "all") and shared.data_ptr() == buffer.data_ptr()
            called.append(name)
            return shared.clone().mul_(2) if name == "one_shot" else shared.mul_(2)

        return run

    names = {"one_shot_all_reduce": "one_shot", "two_shot_all_reduce_": "two_shot", "multimem_all_reduce_": "multimem"}
    fake = SimpleNamespace(**{full: double(name) for full, name in names.items()})
    monkeypatch.setattr(torch.ops, "symm_mem", fake, raising=False)
    x = torch.arange(numbers, dtype=torch.bfloat16)
    expected = 2 * x if way else x.clone()
    assert SymmetricMemory(buffer, "all", multicast=multicast).sum(x) == bool(way)
    assert called == ([way] if way else [])
    assert torch.equal(x, expected)


def test_sums_in_the_order_of_ranks() -> None:
    """In float32, rounded once: so they are the same whatever else is summed."""
    parts = torch.randn(4, 5, 33, generator=torch.Generator().manual_seed(0)).bfloat16()

    def work(group: Group, lines: Sequence[socket.socket]) -> tuple[torch.Tensor, torch.Tensor]:
        own, into = parts[group.rank].clone(), torch.ones(5, 33, dtype=torch.bfloat16)
        group.add(into, own.clone(), 0.5)
        return group.all_reduce(own), into

    whole, into = together(4, work, port=free_port(), fixed=True)
    expected = (((parts[0].float() + parts[1]) + parts[2]) + parts[3]).bfloat16()
    assert torch.equal(whole, expected)
    assert torch.equal(into, torch.ones_like(expected).add_(expected, alpha=0.5))


@pytest.mark.gpu
def test_one_gpu_by_itself() -> None:
    """What can be run without a second one."""
    device = torch.device("cuda", 0)
    exchange = Collective(0, 1, device, ("127.0.0.1", free_port()))
    try:
        for rows in (1, 64, 4096):
            x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
            assert torch.equal(exchange.total(x.clone()), x)
            assert torch.equal(exchange.total(x.clone(), x.clone(), 2.0), x.clone().add_(x, alpha=2.0))
            assert torch.equal(exchange.joined(x, [4096]), x)
    finally:
        torch.distributed.destroy_process_group()
