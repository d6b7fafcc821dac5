"""What is drawn on a device, as the host reads it."""

import pytest
import torch

from tgi.core.messages import Token
from tgi.runtime.drawn import Drawn, tops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def said(device: str, ids: list[int], logprobs: list[float]) -> torch.Tensor:
    return torch.stack((torch.tensor(ids).int(), torch.tensor(logprobs).view(torch.int32))).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_read_as_they_were_drawn(device: str) -> None:
    ids = torch.tensor([7, 0, 131_071], device=device)
    drawn = Drawn(ids, said(device, [7, -1, 131_071], [-0.5, float("nan"), -1e-30]))
    assert drawn.ids is ids
    assert drawn.read() == drawn.read() == [Token(7, -0.5), None, Token(131_071, pytest.approx(-1e-30))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", [[0, 3, 1, 99], [2, 2, 2, 2], [0, 0, 0, 0]])
def test_each_row_has_as_many_likely_tokens_as_it_asks_for(device: str, asked: list[int]) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    norms = logits.logsumexp(-1)
    ids = torch.tensor([1, 2, 3, 4])
    drawn = Drawn(
        ids.to(device), said(device, [1, 2, 3, 4], [-1.0] * 4), tops(logits.to(device), norms.to(device), asked)
    )
    for token, count, row in zip(drawn.read(), asked, logits.log_softmax(-1), strict=True):
        assert token is not None
        expected = row.topk(min(count, 20))
        assert [id for id, _ in token.top] == expected.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_drawn_again_doesnt_change_what_was_drawn(device: str) -> None:
    """Memory isn't shared: the next step is launched before the last one's tokens are read."""
    first = Drawn(torch.tensor([1], device=device), said(device, [1], [-1.0]))
    Drawn(torch.tensor([2], device=device), said(device, [2], [-2.0])).read()
    assert first.read() == [Token(1, -1.0)]
