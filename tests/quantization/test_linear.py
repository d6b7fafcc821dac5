"""The packed linear computes what torch's own does, each row by itself."""

import pytest
import torch

from tgi.quantization.base import PackedLinear, PlainLinear, dense

SIZES = [(960, 576), (576, 1536), (431, 64), (100, 48), (1, 7)]
"""(out, in)"""


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0)) / request.param[1] ** 0.5


def rows(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_it_is_the_plain_product(weight: torch.Tensor, biased: bool):
    bias = rows(1, len(weight))[0] if biased else None
    x = rows(33, weight.shape[1])
    packed, plain = PackedLinear(weight, bias), PlainLinear(weight, bias)
    for count in (1, 2, 33):
        assert torch.allclose(packed(x[:count]), plain(x[:count]), atol=1e-5)


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(weight: torch.Tensor):
    linear = PackedLinear(weight, None)
    x = rows(70, weight.shape[1])
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (2, 3, 8, 17, 33, 70):
        assert torch.equal(linear(x[:count]), alone[:count])
    assert torch.equal(linear(x[20:55]), alone[20:55])


def test_other_dtypes_take_the_plain_one(weight: torch.Tensor):
    assert isinstance(dense(weight, None), PackedLinear)
    assert isinstance(dense(weight.bfloat16(), None), PlainLinear)
