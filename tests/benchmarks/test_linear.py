"""What the machine allows a linear layer, and a matrix of every form."""

import pytest
import torch

from linear import NATIVE, allowed, made, table
from tests.kernels.conftest import native


def cell(form: str, rows: int, seconds: float) -> dict[str, object]:
    return {"form": form, "out": 1000, "inner": 1000, "rows": rows, "seconds": seconds, "bytes": 2_000_000}


CEILING = {"read_gb_s": 20.0, "gemm_gflop_s": 200.0, "threads": 2}


def test_one_row_is_bound_by_reading_and_many_by_arithmetic() -> None:
    assert allowed(cell("bf16", 1, 1), CEILING) == pytest.approx(1e-4)
    assert allowed(cell("bf16", 100, 1), CEILING) == pytest.approx(1e-3)


def test_the_table_has_the_medians_of_rounds() -> None:
    rounds = [cell("bf16", 1, 9.0), cell("bf16", 1, 4e-4), cell("bf16", 1, 1e-5), cell("int8", 2, 1e-4)]
    told = table(rounds, [CEILING, CEILING | {"read_gb_s": 1.0}, CEILING])
    assert "medians of 3 rounds" in told
    assert "| bf16 | 16 | 400 (25%) | - |" in told
    assert "| int8 | 16 | - | 100 (100%) |" in told


@native
@pytest.mark.parametrize("form", NATIVE)
def test_every_form_is_made(form: str) -> None:
    method, size = made(form, 64, 128)
    assert method(torch.randn(2, 128)).isfinite().all()
    assert 4 <= 8 * size / (64 * 128) <= 32
