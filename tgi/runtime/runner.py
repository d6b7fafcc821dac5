"""Runs the model over the paged cache: works in, logits, tokens out. Knows no queue, no socket and no text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tgi.core.config import BLOCK_SIZE, Settings
from tgi.core.messages import PromptToken
from tgi.core.plan import Sampled, Work
from tgi.models.registry import Model, load_model
from tgi.runtime.batch import Batch
from tgi.runtime.kvcache import KVCache
from tgi.runtime.sampler import sample

_LOGIT_ROWS = 128
"""Prompt log-probabilities are computed for this many rows at a time: their logits are the widest tensor there is."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose forward was started."""

    works: Sequence[Work]
    order: Sequence[int]
    """Place on the token axis → index of the work."""
    logits: torch.Tensor
    """[rows, vocabulary] float32, one row for each work that samples, in ``order``."""
    prompt_logprobs: dict[int, torch.Tensor]
    """Index of the work → log-probabilities of the prompt tokens that follow its tokens."""


class Runner:
    """One rank's model and cache."""

    def __init__(self, model: Model, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device

    @classmethod
    def load(cls, settings: Settings, progress: Callable[[int, int], None]) -> "Runner":
        """Load the weights (``progress(done, total)`` in bytes) and set up the cache. Raises StartupError."""
        device = torch.device(settings.device)
        dtype: torch.dtype = getattr(torch, settings.dtype)
        model = load_model(
            settings.model,
            dtype,
            device,
            rope_scaling=settings.rope_scaling,
            rope_factor=settings.rope_factor,
            max_total_tokens=settings.limits.max_total_tokens,
            progress=progress,
        )
        blocks = settings.limits.max_batch_total_tokens // BLOCK_SIZE
        return cls(model, KVCache(model.specs, blocks, dtype, device), device)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @torch.inference_mode()
    def launch(self, works: Sequence[Work]) -> Launched:
        """Start the forward of one step."""
        # Decoding requests stand together, longest first, so that attention can batch neighbours of like length.
        order = sorted(range(len(works)), key=lambda at: (works[at].length > 1, -works[at].start))
        batch = Batch.build([works[at] for at in order], self._device)
        hidden = self._model.forward(batch.token_ids, batch.positions, self._cache.attend(batch.segments))
        scores = {}
        at = 0
        for index in order:
            work = works[index]
            if work.submit.prompt_logprobs and work.start < work.submit.prompt_length - 1:
                scores[index] = self._prompt_logprobs(work, hidden[at : at + work.length])
            at += work.length
        return Launched(works, order, self._model.logits(hidden[batch.logit_rows]), scores)

    @torch.inference_mode()
    def sample(self, launched: Launched) -> list[Sampled]:
        """Wait for the logits and draw; results in the order of the works."""
        rows = [index for index in launched.order if launched.works[index].samples]
        drawn = dict(zip(rows, sample(launched.logits, [launched.works[index] for index in rows]), strict=True))
        results = []
        for index in range(len(launched.works)):
            token = drawn.get(index)
            scores = launched.prompt_logprobs.get(index)
            results.append(
                Sampled(
                    None if isinstance(token, str) else token,
                    () if scores is None else [PromptToken(score) for score in scores.tolist()],
                    error=token if isinstance(token, str) else None,
                )
            )
        return results

    def _prompt_logprobs(self, work: Work, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the prompt tokens that follow the chunk's tokens. hidden: [length, hidden size]."""
        last = min(work.start + work.length, work.submit.prompt_length - 1)
        targets = torch.tensor(work.tokens[work.start + 1 : last + 1], device=self._device)
        parts = []
        for at in range(0, len(targets), _LOGIT_ROWS):
            logits = self._model.logits(hidden[at : at + _LOGIT_ROWS][: len(targets) - at])
            chosen = logits.gather(1, targets[at : at + _LOGIT_ROWS, None]).squeeze(1)
            parts.append(chosen - logits.logsumexp(1))
        return torch.cat(parts)
