"""What known tokens yield, in bounded memory."""

from typing import Any

import pytest
import torch

from tgi.core.config import SCORED_ROWS
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.kernels.library import library
from tgi.runtime.batch import Batch
from tgi.runtime.forward import Forward
from tgi.runtime.prompt import pool, score, told
from tgi.runtime.runner import Runner

VOCABULARY = 50


def work(known: int, start: int, length: int, told: int, top: int = 2, **fields: Any) -> Work:
    """One that has ``known`` tokens, all of them prompt."""
    ids = [n % VOCABULARY for n in range(known)]
    submit = Submit(0, ids, known, 5, [], Sampling(top_n_tokens=top), 0.0, **fields)
    return Work(submit, ids, start, length, told, start + length == known, [], {})


class Tiny(Forward):
    """A model whose hidden states are rows of a table, and whose head counts the rows that it is asked for at once."""

    vocab_size = VOCABULARY
    head = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table, self.weight = torch.randn(1000, 8), torch.randn(8, VOCABULARY)
        self.seen: list[int] = []

    def __call__(self, batch: Batch, then: object = None) -> torch.Tensor:
        assert then is None
        return self.table[: len(batch.token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(hidden))
        return hidden @ self.weight


@pytest.mark.parametrize("sampling", [0, 3, SCORED_ROWS - 1, SCORED_ROWS, 2 * SCORED_ROWS + 20])
@pytest.mark.parametrize("scoring", [1, 0, 3 * SCORED_ROWS + 5])
def test_logits_are_made_for_a_few_rows_at_a_time(sampling: int, scoring: int):
    if not sampling + scoring:
        pytest.skip("no step is empty")
    model = Tiny()
    runner = Runner(model, model, torch.device("cpu"))
    works = [work(10, 9, 1, 10, top=0) for _ in range(sampling)]
    if scoring:
        works.append(work(scoring + 2, 0, scoring, 1))
    results = runner.sample(runner.launch(works))
    assert max(model.seen) <= SCORED_ROWS
    expected = (model.table @ model.weight).log_softmax(-1)
    for row, result in enumerate(results[:sampling]):
        (token,) = result.tokens
        assert token.id == int(expected[row].argmax())
        assert token.logprob == pytest.approx(float(expected[row].max()), abs=1e-5)
    if scoring:
        known = results[-1].tokens
        assert [token.id for token in known] == [n % VOCABULARY for n in range(1, scoring + 1)]
        for row, token in enumerate(known, sampling):
            assert token.logprob == pytest.approx(float(expected[row, token.id]), abs=1e-5)
            assert [id for id, _ in token.top] == expected[row].topk(2).indices.tolist()


def test_each_work_gets_its_own_scores_with_as_many_alternatives_as_it_asks_for():
    works = [work(10, 0, 4, 1, top=1), work(10, 3, 7, 6), work(5, 2, 3, 5), work(8, 4, 3, 6, top=0)]
    batch = Batch.build(works)
    assert batch.last_rows == [10, 13]
    assert batch.scored_rows == [0, 1, 2, 3, 6, 7, 8, 9, 15, 16]
    assert batch.scored_ids == [1, 2, 3, 4, 6, 7, 8, 9, 6, 7]
    weight = torch.randn(8, VOCABULARY)
    rows = torch.randn(len(batch.token_ids), 8)[batch.scored_rows]
    ids = torch.tensor(batch.scored_ids)
    parts = [score(library(), rows[run] @ weight, ids[run], 2) for run in (slice(0, 3), slice(3, 10))]
    tokens = told(parts, works)
    assert [[token.id for token in own] for own in tokens] == [[1, 2, 3, 4], [6, 7, 8, 9], [], [6, 7]]
    assert [{len(token.top) for token in own} for own in tokens] == [{1}, {2}, set(), {0}]
    expected = (rows @ weight).log_softmax(-1)
    for token, row in zip((token for own in tokens for token in own), expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)


@pytest.mark.parametrize(("start", "length", "since"), [(9, 1, 10), (5, 1, 10), (0, 10, 10), (3, 4, 8)])
def test_what_was_told_or_is_not_reached_scores_nothing(start: int, length: int, since: int):
    assert not work(10, start, length, since).scored


def test_who_asks_for_nothing_pays_nothing():
    chunk = work(10, 0, 10, 10)
    assert pool(chunk, torch.rand(10, 8)) is None
    assert not chunk.scratch


def test_a_mean_begins_anew_at_the_first_token_and_is_the_same_however_it_is_cut():
    hidden = torch.randn(10, 8) * 100
    scratch: dict[str, Any] = {}
    for start, length in ((0, 4), (4, 3), (0, 6), (6, 4)):
        part = work(10, start, length, 10, pooling="mean")
        part = Work(part.submit, part.tokens, start, length, 10, False, [], scratch)
        vector = pool(part, hidden[start : start + length])
        assert (vector is None) == (start + length < 10)
    assert vector is not None
    torch.testing.assert_close(vector, hidden.mean(0))
    whole = pool(work(10, 0, 10, 10, pooling="mean"), hidden)
    assert whole is not None and torch.equal(vector, whole)
