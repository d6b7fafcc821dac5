"""Prompts have their lengths and come out the same; steady gaps are those while all streams were busy."""

from pathlib import Path

import pytest

from client import Answer, BenchmarkError
from quality import TEXT
from tests import small_tokenizers
from workloads import Prompts, steady


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    small_tokenizers.byte_level().save(str(path))
    return path


@pytest.mark.parametrize("tokens", [16, 128, 1000])
def test_prompts_have_their_length(tokenizer: Path, tokens: int) -> None:
    text = Prompts(tokenizer, "seed").text(tokens)
    assert abs(len(small_tokenizers.byte_level().encode(text).ids) - tokens) <= 1


def test_prompts_follow_from_their_seed(tokenizer: Path) -> None:
    def drawn(seed: str) -> list[str]:
        prompts = Prompts(tokenizer, seed)
        return [prompts.text(50), prompts.conversation(), prompts.text(50)]

    assert drawn("a") == drawn("a")
    assert len({*drawn("a"), *drawn("b")}) == 6


def test_steady_gaps_begin_with_the_last_first_token_and_end_with_the_last_arrival() -> None:
    first = Answer(0.0, [1.0, 2.0, 5.0, 5.5], 5.5, 1, 0, 4)
    second = Answer(0.0, [4.0, 6.0], 6.0, 1, 0, 2)
    late = Answer(5.6, [7.0, 9.0], 9.0, 1, 0, 2)
    figures = steady([first, second, late], 2)
    assert figures["itl_p99_ms"] == pytest.approx(500)
    with pytest.raises(BenchmarkError, match="too few"):
        steady([first, second], 2)


def test_the_text_ships_and_is_long_enough() -> None:
    assert 2400 < len(TEXT.read_text().split()) < 2800
