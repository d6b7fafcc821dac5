"""GPTQ: what it is for."""

import pytest
import torch

from tgi.quantizer.gptq import hessian, quantize

OUTS, INNER = 48, 128


def inputs(skew: float = 0.0) -> torch.Tensor:
    """Correlated: there are fewer sources than inputs. ``skew``: how much larger some are than others."""
    torch.manual_seed(0)
    sizes = torch.exp(torch.randn(INNER) * skew)
    return (torch.randn(2000, INNER // 4) @ torch.randn(INNER // 4, INNER) + 0.3 * torch.randn(2000, INNER)) * sizes


def error(x: torch.Tensor, weight: torch.Tensor, seen: torch.Tensor | None, **options: object) -> float:
    settings = {"bits": 4, "group": 32, "sym": True, "damp": 0.01, "act_order": False} | options
    made = quantize(weight, seen, **settings)  # type: ignore[arg-type]  # of the names above
    assert int(made.stored.max()) < 1 << made.bits
    return float((x @ (made.values - weight).T).square().mean())


@pytest.mark.parametrize(
    "options", [{}, {"bits": 8}, {"sym": False}, {"group": INNER}, {"group": 16}, {"act_order": True}]
)
def test_the_product_changes_much_less_than_by_rounding(options: dict[str, object]) -> None:
    x, weight = inputs(), torch.randn(OUTS, INNER)
    assert error(x, weight, hessian(x), **options) < 0.35 * error(x, weight, None, **options)


def test_independent_inputs_of_one_size_leave_nothing_to_gain() -> None:
    weight = torch.randn(OUTS, INNER)
    made = [
        quantize(weight, seen, bits=4, group=32, sym=True, damp=0.01, act_order=False)
        for seen in (None, torch.eye(INNER))
    ]
    assert torch.equal(made[0].values, made[1].values)


def test_large_inputs_first_is_better_where_sizes_differ() -> None:
    x, weight = inputs(skew=2.0), torch.randn(OUTS, INNER)
    assert error(x, weight, hessian(x), act_order=True) < 0.9 * error(x, weight, hessian(x))


def test_first_tokens_of_sequences_count_as_many() -> None:
    x, weight = inputs(), torch.randn(OUTS, INNER)
    x[::100] = torch.randn(INNER)
    first, others = x[::100], x[torch.arange(len(x)) % 100 > 0]
    alike, weighed = hessian(x), hessian(x, 100)
    assert error(first, weight, weighed) < 0.6 * error(first, weight, alike)
    assert error(others, weight, weighed) < 1.1 * error(others, weight, alike)


def test_inputs_that_are_never_there_or_too_few() -> None:
    """Their Hessian has no inverse."""
    x, weight = inputs(), torch.randn(OUTS, INNER)
    x[:, [5, 77]] = 0
    assert error(x, weight, hessian(x)) < error(x, weight, None)
    few = x[:3]
    assert error(few, weight, hessian(few), damp=1e-9) < error(few, weight, None)


def test_inputs_that_are_not_finite() -> None:
    x = inputs()
    x[7, 7] = float("inf")
    with pytest.raises(ArithmeticError, match="not finite"):
        quantize(torch.randn(OUTS, INNER), hessian(x), bits=4, group=32, sym=True, damp=0.01, act_order=False)
