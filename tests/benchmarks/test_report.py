"""Tables from records: medians, ratios, ceilings and verdicts; which records count."""

import json
from pathlib import Path
from typing import Any

import pytest

from records import Data, Journal
from report import ROWS, Shape, Target, markdown, spread, verdict

SMOLLM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    return Shape.read(tmp_path)


def cell(server: str, rate: float, number: int = 0, *, clean: bool = True, workload: str = "W1") -> dict[str, Any]:
    return {
        "kind": "cell",
        "round": number,
        "server": server,
        "precision": "16-bit",
        "workload": workload,
        "clean": clean,
        "requests": 32,
        "prompt_tokens": 32 * 128,
        "cached_tokens": 0,
        "tokens": 32 * 128,
        "tokens_s": rate,
        "decode_tokens_s": rate,
        **{f"{name}_{p}_ms": 1.0 for name in ("ttft", "itl") for p in ("p50", "p99")},
    }


CEILING = {"kind": "ceiling", "round": 0, "read_gb_s": 42.0, "gemm_gflop_s": 198.0}


def lines(records: list[dict[str, Any]], shape: Shape) -> dict[str, list[str]]:
    """Cells of the main table by row and precision."""
    told = [line.strip("| ").split(" | ") for line in markdown(Data(records), shape).splitlines() if "tok/s" in line]
    return {row[0]: row[1:] for row in told}


def test_a_shape_knows_what_a_token_costs(shape: Shape) -> None:
    assert shape.weights == 134_479_872
    assert shape.flop(1, 0, 1) == pytest.approx(0.27e9, rel=0.01)
    assert shape.cached == 30 * 2 * 3 * 64
    # A prompt of 4,000 tokens at 198 GFLOP/s, with its attention
    assert 198e9 * 4000 / shape.flop(1, 4000, 0) == pytest.approx(565, rel=0.02)


def test_a_row_has_medians_ratios_and_the_share_of_the_ceiling(shape: Shape) -> None:
    ours = [cell("tgi", rate, number) for number, rate in enumerate((140.0, 120.0, 130.0))]
    row = lines([CEILING, *ours, cell("llama.cpp", 65.0)], shape)["1 stream, decode, tok/s"]
    assert row == ["16-bit", "130 (120 to 140)", "65", "2.00", "83%", "≥ 1.5x, ≥ 80%", "PASS"]


def test_the_gemm_bounds_many_streams(shape: Shape) -> None:
    records = [CEILING, cell("tgi", 200.0, workload="W3"), cell("vllm", 160.0, workload="W3")]
    row = lines(records, shape)["32 streams, tok/s"]
    assert row[4] == f"{200 / 406:.0%}"  # 412 without the prompts' attention
    assert row[-1] == "short"


def test_a_ceiling_is_that_before_the_cell(shape: Shape) -> None:
    records = [CEILING, cell("tgi", 100.0), CEILING | {"read_gb_s": 84.0}, cell("tgi", 100.0, 1)]
    shares = [100 * 0.134479872 * 2 / read for read in (42, 84)]
    assert lines(records, shape)["1 stream, decode, tok/s"][2] == f"{sum(shares) / 2:.0%}"


def test_disturbed_cells_count_only_where_there_are_no_others(shape: Shape) -> None:
    title = "1 stream, decode, tok/s"
    disturbed = cell("tgi", 10.0, clean=False)
    assert lines([CEILING, disturbed, cell("tgi", 90.0, 1)], shape)[title][1] == "90"
    assert lines([CEILING, disturbed], shape)[title][1] == "10 *"


def test_an_error_is_told_until_its_cell_is_measured(shape: Shape) -> None:
    error = {"kind": "error", "server": "tgi", "precision": "16-bit", "workload": "W1", "error": "lost its way"}
    assert "lost its way" in markdown(Data([error]), shape)
    assert "lost its way" not in markdown(Data([error, CEILING, cell("tgi", 1.0)]), shape)


@pytest.mark.parametrize(
    ("title", "against", "share", "told"),
    [
        ("8 streams", {"llama.cpp": 1.6, "vllm": 1.5}, None, "PASS"),
        ("8 streams", {"llama.cpp": 1.6, "vllm": 1.49}, None, "short"),
        ("8 streams", {}, None, "-"),
        ("1 stream, decode", {"vllm": 3.0}, 0.9, "-"),  # llama.cpp counts
        ("1 stream, decode", {"vllm": 1.0, "llama.cpp": 1.5}, 0.8, "PASS"),
        ("1 stream, decode", {"llama.cpp": 1.5}, 0.79, "short"),
        ("1 stream, decode", {"llama.cpp": 1.5}, None, "short"),
        ("small, first run", {"llama.cpp": 0.5, "vllm": 0.7}, None, "PASS"),
        ("small, first run", {"llama.cpp": 0.5, "vllm": 0.71}, None, "short"),
    ],
)
def test_the_best_peer_decides(title: str, against: dict[str, float], share: float | None, told: str) -> None:
    [row] = [row for row in ROWS if row.title == title]
    assert row.targets is not None
    assert verdict(row, row.targets["16-bit"], against, share) == told


def test_targets_are_those_of_the_issue() -> None:
    by_title = {row.title: row.targets or {} for row in ROWS}
    assert by_title["32 streams"] == {"16-bit": Target(1.5, 0.75), "8-bit": Target(2.0), "4-bit": Target(1.7)}
    assert "4-bit" not in by_title["long, first run"]


def test_a_spread_tells_median_and_bounds() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert spread([1234.5]) == "1,234"


def test_a_journal_goes_on_where_it_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    Journal(path).write("cell", **{k: v for k, v in cell("tgi", 1.0).items() if k != "kind"})
    again = Journal(path)
    again.write("ceiling", round=1)
    assert [len(again.data.of(kind)) for kind in ("cell", "ceiling")] == [1, 1]
    assert len(Data.read([path, path]).cells("tgi", "16-bit", "W1")) == 2
