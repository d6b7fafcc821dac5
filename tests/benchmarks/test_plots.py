"""Plots are written, and the same data give the same file."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from plots import bars, curves, grouped
from records import Data
from tests.benchmarks.test_report import cell


def test_bars_and_curves_are_written(tmp_path: Path) -> None:
    data = Data([cell("tgi", 2.0), cell("tgi", 3.0, 1), cell("vllm", 1.0)])
    for name in ("a.svg", "b.svg"):
        bars(data, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    curves(tmp_path / "c.svg", [("rows", "rows", "ms", {"8-bit": [(1, 2.0), (2, 3.0)], "4-bit": [(1, 1.0)]})])
    assert (tmp_path / "c.svg").stat().st_size > 1000


def test_points_of_the_same_place_become_their_median() -> None:
    records = [{"by": "x", "at": at, "value": value} for at, value in ((1, 5.0), (0, 1.0), (1, 7.0), (1, 6.0))]
    assert grouped(records, "by", "at", "value") == {"x": [(0, 1.0), (1, 6.0)]}
