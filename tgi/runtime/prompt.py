"""What a prompt yields beside the next token: the log-probabilities of its own tokens, and its embedding.

Works on the last hidden states of one chunk at a time, so that memory is bounded whatever the prompt's length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tgi.core.config import SCORED_ROWS
from tgi.core.messages import PromptToken
from tgi.core.plan import Work


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the n prompt tokens that follow a chunk's tokens."""

    logprobs: torch.Tensor
    """[n]."""
    top_ids: torch.Tensor
    """[n, top_n_tokens]."""
    top_logprobs: torch.Tensor

    def tokens(self) -> list[PromptToken]:
        """Waits for the device."""
        tops = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        return [
            PromptToken(logprob, list(zip(ids, values, strict=True)))
            for logprob, (ids, values) in zip(self.logprobs.tolist(), tops, strict=True)
        ]


def score(work: Work, hidden: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]) -> Scores | None:
    """The scores that a chunk makes known, if any are asked for. hidden: [length, hidden size]; logits: the head."""
    last = min(work.start + work.length, work.submit.prompt_length - 1)
    if not work.submit.prompt_logprobs or work.start >= last:
        return None
    top = work.submit.sampling.top_n_tokens
    targets = torch.tensor(work.tokens[work.start + 1 : last + 1], device=hidden.device)
    parts = zip(torch.split(targets, SCORED_ROWS), torch.split(hidden[: len(targets)], SCORED_ROWS), strict=True)
    # Each part's logits, the widest tensor there is, are gone before the next part's are made.
    scored = [_score(logits(rows), ids, top) for ids, rows in parts]
    return Scores(*(torch.cat(columns) for columns in zip(*scored, strict=True)))


def _score(logits: torch.Tensor, targets: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Scores. logits: [rows, vocabulary]; targets: [rows]."""
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
