"""Losses of distributions, and the page about them."""

from pathlib import Path

import pytest
import torch
from torch import log_softmax

from formats import document
from quality import Loss, figures


def test_a_distribution_loses_nothing_to_itself() -> None:
    rows = log_softmax(torch.randn(5, 30), 1)
    loss = Loss()
    loss.add(rows, rows, torch.arange(5))
    told = figures(loss, loss)
    assert told["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert told["same_choice"] == 1
    assert told["perplexity_ratio"] == 1


def test_a_known_divergence_and_perplexity() -> None:
    mine, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    loss, other = Loss(), Loss()
    loss.add(mine, reference, torch.tensor([1]))
    other.add(reference, reference, torch.tensor([1]))
    told = figures(loss, other)
    assert told["kl_mean"] == pytest.approx(0.9 * 0.5878 + 0.1 * -1.6094, rel=1e-3)
    assert told["perplexity"] == pytest.approx(2)
    assert told["perplexity_ratio"] == pytest.approx(0.2)


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "quantization.md"
    assert page.read_text() == document(), "run: python benchmarks/quality.py --document > docs/quantization.md"
