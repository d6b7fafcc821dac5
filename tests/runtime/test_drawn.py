"""What is drawn on a device, as the host reads it."""

import pytest
import torch

from tgi.core.messages import Token
from tgi.runtime.drawn import Drawn, tops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def said(ids: list[int], logprobs: list[float]) -> torch.Tensor:
    return torch.stack((torch.tensor(ids).int(), torch.tensor(logprobs).view(torch.int32))).to(DEVICE)


@pytest.mark.gpu
def test_tokens_are_read_as_they_were_drawn() -> None:
    ids = torch.tensor([7, 0, 131_071], device=DEVICE)
    drawn = Drawn(ids, said([7, -1, 131_071], [-0.5, float("nan"), -1e-30]))
    assert drawn.ids is ids
    assert drawn.read() == drawn.read() == [Token(7, -0.5), None, Token(131_071, pytest.approx(-1e-30))]


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [[0, 3, 1, 99], [2, 2, 2, 2], [0, 0, 0, 0]])
def test_each_row_has_as_many_likely_tokens_as_it_asks_for(asked: list[int]) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    norms = logits.logsumexp(-1)
    ids = torch.tensor([1, 2, 3, 4])
    drawn = Drawn(ids.to(DEVICE), said([1, 2, 3, 4], [-1.0] * 4), tops(logits.to(DEVICE), norms.to(DEVICE), asked))
    for token, count, row in zip(drawn.read(), asked, logits.log_softmax(-1), strict=True):
        assert token is not None
        expected = row.topk(min(count, 20))
        assert [id for id, _ in token.top] == expected.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_what_is_drawn_again_doesnt_change_what_was_drawn() -> None:
    """Memory isn't shared: the next step is launched before the last one's tokens are read."""
    first = Drawn(torch.tensor([1], device=DEVICE), said([1], [-1.0]))
    Drawn(torch.tensor([2], device=DEVICE), said([2], [-2.0])).read()
    assert first.read() == [Token(1, -1.0)]
