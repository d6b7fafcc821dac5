"""Sums between GPUs, by size: no GPU is here, so the kernels are stood in for."""

from types import SimpleNamespace

import pytest
import torch

from tests.serve.conftest import free_port
from tgi.parallel import Collective, SymmetricMemory


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
