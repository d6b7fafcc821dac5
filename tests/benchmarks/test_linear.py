"""What the machine allows a linear layer, and a matrix of every form."""

import pytest

from linear import FORMS, allowed, measure, table
from tests.kernels.conftest import native


def cell(form: str, rows: int, seconds: float) -> dict[str, object]:
    return {"form": form, "out": 1000, "inner": 1000, "rows": rows, "seconds": seconds, "bytes": 2_000_000}


CEILING = {"read_gb_s": 20.0, "gemm_gflop_s": 200.0, "threads": 2}


def test_one_row_is_bound_by_reading_and_many_by_arithmetic() -> None:
    assert allowed(cell("bf16", 1, 1), CEILING) == pytest.approx(1e-4)
    assert allowed(cell("bf16", 100, 1), CEILING) == pytest.approx(1e-3)


def test_the_table_has_the_medians_of_rounds() -> None:
    rounds = [*(cell("bf16", 1, seconds) for seconds in (9.0, 4e-4, 1e-4)), cell("int8", 2, 1e-4)]
    told = table(rounds, [CEILING, CEILING | {"read_gb_s": 1.0}, CEILING])
    assert "float32, with 2 threads" in told and "medians of 3 rounds" in told
    assert "bfloat16 on H100" in table(rounds, [{"read_gb_s": 3e3, "gemm_gflop_s": 8e5, "gpu": "H100"}])
    assert "| bf16 | 16 | 400 (25%) | - |" in told
    assert "| int8 | 16 | - | 100 (100%) |" in told


@native
@pytest.mark.parametrize("form", FORMS["cpu"])
def test_every_form_is_made_and_is_right(form: str) -> None:
    cells: list[dict[str, float]] = []
    measure(form, 64, 128, [1, 2], "cpu", lambda kind, **cell: cells.append(cell), 10_000)
    assert [cell["rows"] for cell in cells] == [1, 2]
    assert all(4 <= 8 * cell["bytes"] / (64 * 128) <= 36 for cell in cells)
