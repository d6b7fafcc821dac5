"""What known tokens yield: log-probabilities of a prompt's tokens and of those that a grammar forces, and embeddings.

Memory is bounded whatever a prompt's length.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tgi.core.messages import Token
from tgi.core.plan import Work
from tgi.kernels import sampling
from tgi.kernels.library import Library


class Scores(NamedTuple):
    """Of n known tokens."""

    logprobs: torch.Tensor
    """[n]."""
    top_ids: torch.Tensor
    """[n, the largest top_n_tokens]."""
    top_logprobs: torch.Tensor


def score(library: Library | None, logits: torch.Tensor, targets: torch.Tensor, top: int) -> Scores:
    """Of ``targets`` [n], the tokens that follow. logits: [n, vocabulary]; top: how many of the likeliest tokens."""
    if library is not None:
        return Scores(*sampling.score(library, logits, targets, top))
    norm = logits.logsumexp(1, keepdim=True)
    values, ids = logits.topk(min(top, logits.shape[1]))
    return Scores((logits.gather(1, targets[:, None]) - norm).squeeze(1), ids, values - norm)


def told(scores: Sequence[Scores], works: Sequence[Work]) -> list[list[Token]]:
    """The scores as tokens of each work, which stand in the order of the token axis. Waits for the device."""
    rows = itertools.chain.from_iterable(zip(*(part.tolist() for part in each), strict=True) for each in scores)
    found = []
    for work in works:
        count, own = work.submit.sampling.top_n_tokens, itertools.islice(rows, len(work.scored))
        found.append(
            [
                Token(work.tokens[position], logprob, list(zip(ids[:count], values[:count], strict=True)))
                for position, (logprob, ids, values) in zip(work.scored, own, strict=True)
            ]
        )
    return found


def pool(work: Work, hidden: torch.Tensor) -> torch.Tensor | None:
    """The prompt's embedding, float32 [hidden size], if it is asked for and the chunk reaches the prompt's end.

    hidden: [length, hidden size]. A mean's sum so far waits in the request's scratch; what is computed again begins
    anew. In float64 it comes out the same however the prompt is cut.
    """
    pooling = work.submit.pooling
    whole = work.start + work.length == work.submit.prompt_length
    if pooling == "mean":
        total = hidden.sum(0, dtype=torch.float64)
        if work.start > 0:
            total += work.scratch["sum"]
        work.scratch["sum"] = total
        return (total / work.submit.prompt_length).float() if whole else None
    return hidden[-1].float() if pooling == "last" and whole else None
