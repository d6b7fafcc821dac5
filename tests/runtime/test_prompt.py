"""What prompts yield, in bounded memory."""

from typing import Any

import pytest
import torch

from tgi.core.config import SCORED_ROWS
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime.prompt import pool, score

VOCABULARY = 50


def work(prompt: int, start: int, length: int, **fields: Any) -> Work:
    ids = [n % VOCABULARY for n in range(prompt)]
    return Work(Submit(0, ids, prompt, 5, [], Sampling(top_n_tokens=2), 0.0, **fields), ids, start, length, [], {})


def test_logits_are_made_for_a_few_rows_at_a_time():
    seen: list[int] = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows @ torch.ones(8, VOCABULARY)

    count = 3 * SCORED_ROWS + 5
    scored = score(work(count + 1, 0, count + 1, prompt_logprobs=True), torch.rand(count + 1, 8), logits)
    assert scored is not None
    assert seen == [SCORED_ROWS] * 3 + [5]
    assert [len(token.top) for token in scored.tokens()] == [2] * count


@pytest.mark.parametrize(("start", "length"), [(10, 1), (9, 1), (12, 5)])
def test_the_last_prompt_token_and_those_behind_it_score_nothing(start: int, length: int):
    chunk = work(10, start, length, prompt_logprobs=True)
    assert score(chunk, torch.rand(length, 8), lambda rows: pytest.fail("nothing was asked")) is None


def test_who_asks_for_nothing_pays_nothing():
    chunk = work(10, 0, 10)
    assert score(chunk, torch.rand(10, 8), lambda rows: pytest.fail("nothing was asked")) is None
    assert pool(chunk, torch.rand(10, 8)) is None
    assert not chunk.scratch


def test_a_mean_begins_anew_at_the_first_token_and_is_the_same_however_it_is_cut():
    hidden = torch.randn(10, 8) * 100
    scratch: dict[str, Any] = {}
    for start, length in ((0, 4), (4, 3), (0, 6), (6, 4)):
        part = work(10, start, length, pooling="mean")
        part = Work(part.submit, part.tokens, start, length, [], scratch)
        vector = pool(part, hidden[start : start + length])
        assert (vector is None) == (start + length < 10)
    assert vector is not None
    torch.testing.assert_close(vector, hidden.mean(0))
    whole = pool(work(10, 0, 10, pooling="mean"), hidden)
    assert whole is not None and torch.equal(vector, whole)
