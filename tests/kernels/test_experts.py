"""Mixtures of experts: routing beside torch's, products beside the linear kernel's, for every instruction set."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.kernels.conftest import native
from tests.kernels.test_linear import KINDS, panels_of
from tgi.core.model_config import Routing
from tgi.kernels import experts
from tgi.kernels.library import Library
from tgi.kernels.linear import linear
from tgi.kernels.ops import Act, Finish
from tgi.kernels.panels import Panels, assemble
from tgi.kernels.program import Program
from tgi.layers.moe import GroupedExperts, SeparateExperts
from tgi.parallel import Group

pytestmark = native

ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "normalised": {"norm": 1.0, "factor": 2.5},
    "p-norm": {"norm": 3.0},
    "norm of some size at least": {"norm": 1.0, "norm_least": 0.9},
    "groups": {"groups": 4, "groups_per_token": 2, "factor": 16.0},
    "sigmoid, groups, bias": {
        "score": "sigmoid",
        "bias": "there is one",
        "groups": 4,
        "groups_per_token": 2,
        "group_best": 2,
        "norm": 1.0,
    },
    "sparse mixer": {"score": "sparse_mixer", "jitter": 0.2},
    "sparse mixer of many": {"score": "sparse_mixer", "jitter": 0.7},
    "bias": {"bias": "there is one"},
}


@pytest.fixture
def any_threads() -> Iterator[None]:
    """Restores their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def grouped(kernels: Library, gate_up: Panels, down: Panels) -> GroupedExperts:
    return GroupedExperts(kernels, Group(), gate_up, down, "gelu_tanh")


def stacks(count: int, kind: str, hidden: int, inner: int, chance: random.Random) -> tuple[list[Panels], list[Panels]]:
    """Experts' matrices: gate and up by turns, and down; quantized ones alike in form."""
    seed = chance.random()
    gate_ups, downs = [], []
    for _ in range(count):
        alike = random.Random(seed)
        gate_ups.append(panels_of(kind, 2 * inner, hidden, alike)[0])
        downs.append(panels_of(kind, hidden, inner, alike)[0])
    return gate_ups, downs


def joined(matrices: Sequence[Panels]) -> Panels:
    return assemble(matrices, matrices[0].outs, len(matrices))


@pytest.mark.parametrize("way", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize(("count", "per_token"), [(8, 2), (16, 3), (20, 4), (72, 6)])
def test_routing(kernels: Library, way: dict[str, Any], count: int, per_token: int) -> None:
    torch.manual_seed(count)
    routing = Routing(**{"per_token": per_token} | way)
    products = (torch.randn(57, count + 3) * 3)[:, :count]
    bias = torch.randn(count) / 4 if routing.bias else None
    none = panels_of("fp32", 32, 1, random.Random(0))[0]
    weights, chosen = grouped(kernels, none, none).route(products, routing, bias)
    expected, theirs = SeparateExperts([]).route(products, routing, bias)
    assert torch.equal(chosen, theirs)
    assert (weights / expected - 1).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_pairs_are_in_the_order_of_experts(kernels: Library, tokens: int) -> None:
    torch.manual_seed(tokens)
    chosen = torch.rand(tokens, 9).argsort(1)[:, :4].int()
    pairs = experts.arrange(kernels, chosen, 9)
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(pairs.row, (order // 4).int())
    assert torch.equal(pairs.place.flatten()[order], torch.arange(4 * tokens).int())
    assert torch.equal(pairs.first.diff(), chosen.flatten().bincount(minlength=9).int())
    assert pairs.first[0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_each_row_goes_through_the_matrix_of_its_expert(
    kernels: Library, kind: str, seed: int, any_threads: None
) -> None:
    """Bit-equal to the linear kernel; some experts have no row."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 3)
    hidden, inner = chance.choice([(96, 48), (64, 176), (192, 32)])
    gate_ups, downs = stacks(5, kind, hidden, inner, chance)
    counts = [chance.choice([0, 1, 2, 7, 30]) for _ in range(5)]
    first = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(sum(counts), hidden)
    gated = experts.linear(kernels, joined(gate_ups), x, first, finish=Finish.GATE, act=Act.SILU)
    out = experts.linear(kernels, joined(downs), gated, first)
    for expert, rows in enumerate(x.split(counts)):
        own = slice(int(first[expert]), int(first[expert + 1]))
        expected = linear(kernels, gate_ups[expert], rows, finish=Finish.GATE, act=Act.SILU)
        assert torch.equal(gated[own], expected)
        assert torch.equal(out[own], linear(kernels, downs[expert], expected))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_token_does_not_depend_on_the_others(kernels: Library, kind: str, any_threads: None) -> None:
    """Recorded or not, for any number of tokens and threads; what is recorded lends its memory to who comes next."""
    torch.manual_seed(1)
    block = grouped(kernels, *map(joined, stacks(7, kind, 96, 48, random.Random(1))))
    routing = Routing(per_token=3, norm=1.0)
    x, products = torch.randn(40, 96), torch.randn(40, 7)

    def run(x: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            block.add(x, x, *block.route(products, routing), 0.5)
        return x

    alone = torch.cat([run(row[None].clone(), score[None]) for row, score in zip(x, products, strict=True)])
    room, scores = torch.empty(40, 96), torch.empty(40, 7)
    program = Program(kernels, 40)
    program.record(lambda: run(room, scores))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (slice(0, 40), slice(3, 4), slice(5, 7), slice(11, 33)):
            count = rows.stop - rows.start
            assert torch.equal(run(x[rows].clone(), products[rows]), alone[rows])
            room[:count], scores[:count] = x[rows], products[rows]
            program.run(count)
            assert torch.equal(room[:count], alone[rows])


@pytest.mark.parametrize("size", [1, 16, 23, 96])
def test_the_sum_of_a_tokens_experts(kernels: Library, size: int) -> None:
    torch.manual_seed(size)
    into, x, weights = torch.randn(9, size), torch.randn(36, size), torch.randn(9, 4)
    place = torch.randperm(36).int().view(9, 4)
    expected = into + 0.25 * (x[place.long()] * weights[..., None]).sum(1)
    experts.mix(kernels, x, weights, place, into=into, factor=0.25)
    torch.testing.assert_close(into, expected)
    experts.mix(kernels, x[:9], weights[:, :1].contiguous(), into=into)
    torch.testing.assert_close(into, expected + x[:9] * weights[:, :1])
