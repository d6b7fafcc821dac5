"""Adapters of many rows by Triton's kernels: on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

test_triton_lora.py runs these in a process of their own.
"""

import pytest
import torch

from tgi.kernels.triton.experts import Pairs, arrange
from tgi.kernels.triton.lora import Adapters, add

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def some(count: int, rank: int, inner: int, outs: int, dtype: torch.dtype) -> Adapters:
    a = torch.randn(count, rank, inner, device=DEVICE).mul_(inner**-0.5).to(dtype)
    return Adapters(a, torch.randn(count, outs, rank, device=DEVICE).to(dtype), torch.rand(count, device=DEVICE) + 0.5)


def arranged(which: torch.Tensor, count: int) -> Pairs:
    return arrange(which.int()[:, None].to(DEVICE), count)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("tokens, count, rank", [(1, 1, 8), (9, 3, 16), (23, 40, 5), (70, 4, 72)])
def test_each_row_by_its_own_adapter(tokens: int, count: int, rank: int, dtype: torch.dtype, error: float) -> None:
    """To columns of a tensor; to rows that have none nothing is added, to the bit."""
    adapters = some(count, rank, 100, 67, dtype)
    which = torch.randint(-1, count, (tokens,))
    x, all_outs = torch.randn(tokens, 100, device=DEVICE).to(dtype), torch.randn(tokens, 90, device=DEVICE).to(dtype)
    before = all_outs.clone()
    add(all_outs[:, 11:78], x, adapters, arranged(which, count))
    expected = before.double()
    for token, adapter in enumerate(which.tolist()):
        if adapter >= 0:
            small = adapters.a[adapter].double() @ x[token].double()
            expected[token, 11:78] += adapters.scale[adapter] * (adapters.b[adapter].double() @ small)
    assert (all_outs - expected).norm() <= error * expected.norm()
    assert torch.equal(all_outs[which < 0], before[which < 0])
    assert torch.equal(all_outs[:, :11], before[:, :11]) and torch.equal(all_outs[:, 78:], before[:, 78:])


def test_rows_do_not_know_each_other() -> None:
    adapters, which = some(3, 16, 600, 40, torch.float16), torch.randint(-1, 3, (40,))
    x, outs = torch.randn(40, 600, device=DEVICE).half(), torch.zeros(40, 40, device=DEVICE).half()
    add(outs, x, adapters, arranged(which, 3))
    alone = torch.zeros(5, 40, device=DEVICE).half()
    add(alone, x[7:12], adapters, arranged(which[7:12], 3))
    assert torch.equal(outs[7:12], alone)


def test_nobody_has_an_adapter() -> None:
    outs = torch.ones(5, 40, device=DEVICE)
    add(outs, torch.ones(5, 64, device=DEVICE), some(2, 8, 64, 40, torch.float32), arranged(torch.full((5,), -1), 2))
    assert bool((outs == 1).all())
