"""What known tokens yield, in bounded memory."""

from array import array
from typing import Any

import pytest
import torch

from tgi.core.config import SCORED_ROWS
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime.batch import Batch
from tgi.runtime.prompt import pool, score

VOCABULARY = 50


def work(known: int, start: int, length: int, told: int, top: int = 2, **fields: Any) -> Work:
    """One that has ``known`` tokens, all of them prompt."""
    ids = [n % VOCABULARY for n in range(known)]
    submit = Submit(0, ids, known, 5, [], Sampling(top_n_tokens=top), 0.0, **fields)
    return Work(submit, ids, start, length, told, start + length == known, array("i"), {})


@pytest.mark.parametrize("sampling", [0, 3, SCORED_ROWS - 1, SCORED_ROWS, SCORED_ROWS + 20])
@pytest.mark.parametrize("scoring", [0, 1, 3 * SCORED_ROWS + 5])
def test_logits_are_made_for_a_few_rows_at_a_time_and_those_that_sample_come_first(sampling: int, scoring: int):
    seen: list[int] = []
    weight = torch.randn(8, VOCABULARY)

    def head(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows @ weight

    hidden = torch.randn(sampling + scoring, 8)
    targets = torch.randint(VOCABULARY, (scoring,))
    logits, scores = score(hidden, targets, 2, head)
    assert max(seen) <= max(sampling, SCORED_ROWS)
    torch.testing.assert_close(logits, hidden[:sampling] @ weight)
    assert (scores is None) == (scoring == 0)
    if scores is None:
        return
    expected = (hidden[sampling:] @ weight).log_softmax(-1)
    torch.testing.assert_close(scores.logprobs, expected.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(scores.top_logprobs, expected.topk(2).values)
    assert torch.equal(scores.top_ids, expected.topk(2).indices)


def test_each_work_gets_its_own_scores_with_as_many_alternatives_as_it_asks_for():
    works = [work(10, 0, 4, 1, top=1), work(10, 3, 7, 6), work(5, 2, 3, 5), work(8, 4, 3, 6, top=0)]
    batch = Batch.build(works, torch.device("cpu"))
    assert batch.logit_rows.tolist() == [10, 13, 0, 1, 2, 3, 6, 7, 8, 9, 15, 16]
    assert batch.scored_ids.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 6, 7]
    weight = torch.randn(8, VOCABULARY)
    rows = torch.randn(len(batch.token_ids), 8)[batch.logit_rows]
    _, scores = score(rows, batch.scored_ids, 2, lambda hidden: hidden @ weight)
    assert scores is not None
    tokens = scores.tokens(works)
    assert [[token.id for token in own] for own in tokens] == [[1, 2, 3, 4], [6, 7, 8, 9], [], [6, 7]]
    assert [{len(token.top) for token in own} for own in tokens] == [{1}, {2}, set(), {0}]
    expected = (rows[2:] @ weight).log_softmax(-1)
    for token, row in zip((token for own in tokens for token in own), expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)


@pytest.mark.parametrize(("start", "length", "told"), [(9, 1, 10), (5, 1, 10), (0, 10, 10), (3, 4, 8)])
def test_what_was_told_or_is_not_reached_scores_nothing(start: int, length: int, told: int):
    assert not work(10, start, length, told).scored


def test_who_asks_for_nothing_pays_nothing():
    chunk = work(10, 0, 10, 10)
    assert pool(chunk, torch.rand(10, 8)) is None
    assert not chunk.scratch


def test_a_mean_begins_anew_at_the_first_token_and_is_the_same_however_it_is_cut():
    hidden = torch.randn(10, 8) * 100
    scratch: dict[str, Any] = {}
    for start, length in ((0, 4), (4, 3), (0, 6), (6, 4)):
        part = work(10, start, length, 10, pooling="mean")
        part = Work(part.submit, part.tokens, start, length, 10, False, array("i"), scratch)
        vector = pool(part, hidden[start : start + length])
        assert (vector is None) == (start + length < 10)
    assert vector is not None
    torch.testing.assert_close(vector, hidden.mean(0))
    whole = pool(work(10, 0, 10, 10, pooling="mean"), hidden)
    assert whole is not None and torch.equal(vector, whole)
