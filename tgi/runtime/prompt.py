"""What known tokens yield: log-probabilities of a prompt's tokens and of those that a grammar forces, and embeddings.

Memory is bounded whatever a prompt's length.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tgi.core.config import SCORED_ROWS
from tgi.core.messages import Token
from tgi.core.plan import Work
from tgi.kernels import sampling
from tgi.kernels.library import library


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the n known tokens that a step scores."""

    logprobs: torch.Tensor
    """[n]."""
    top_ids: torch.Tensor
    """[n, the largest top_n_tokens]."""
    top_logprobs: torch.Tensor

    def tokens(self, works: Sequence[Work]) -> list[list[Token]]:
        """Those of each work, which stand in the order of the token axis. Waits for the device."""
        rows = zip(self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
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


def score(
    hidden: torch.Tensor, targets: torch.Tensor, top: int, head: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, Scores | None]:
    """The logits of the first rows, and the scores of the targets, if there are any, by the rows behind these.

    hidden: [rows, hidden size]; targets: [rows - first rows], the tokens that follow; top: how many of the likeliest
    tokens; head: makes logits of hidden states. Reading its weights takes long, so the first rows share its first run.
    """
    count = len(hidden) - len(targets)
    if not len(targets):
        return head(hidden), None
    first = max(count, SCORED_ROWS)
    # Each part's logits, the widest tensor there is, are gone before the next part's are made; the first rows' stay.
    parts = []
    for at in range(first, len(hidden), SCORED_ROWS):
        rows = head(hidden[at : at + SCORED_ROWS])
        parts.append(_score(rows, targets[at - count : at - count + len(rows)], top))
    logits = head(hidden[:first])
    parts.insert(0, _score(logits[count:], targets[: len(logits) - count], top))
    return logits[:count], Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _score(logits: torch.Tensor, targets: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Scores. logits: [rows, vocabulary]; targets: [rows]."""
    if logits.device.type == "cpu" and (kernels := library()) is not None:
        return sampling.score(kernels, logits, targets, top)
    norm = logits.logsumexp(1, keepdim=True)
    values, ids = logits.topk(min(top, logits.shape[1]))
    return (logits.gather(1, targets[:, None]) - norm).squeeze(1), ids, values - norm


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
