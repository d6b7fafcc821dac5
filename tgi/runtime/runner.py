"""Runs the model over the paged cache: works in, logits, tokens out. Knows no queue, no socket and no text."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tgi.attention.base import Kind
from tgi.core.config import BLOCK_SIZE, Settings
from tgi.core.messages import Token
from tgi.core.plan import Masks, Sampled, Work
from tgi.kernels.library import library
from tgi.models.registry import Model, load_model
from tgi.runtime.batch import Batch
from tgi.runtime.forward import Forward, choose
from tgi.runtime.kvcache import KVCache
from tgi.runtime.prompt import Scores, pool, score
from tgi.runtime.sampler import NOT_A_NUMBER, Sampler


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose forward was started."""

    works: Sequence[Work]
    order: Sequence[int]
    """Place on the token axis → index of the work."""
    logits: torch.Tensor
    """[rows, vocabulary] float32, one row for each work that samples, in ``order``."""
    scores: Scores | None
    """Of the known tokens that the works score, in ``order``, if there are any."""
    embeddings: Mapping[int, torch.Tensor]
    """Index of the work → [hidden size]."""


class Runner:
    """One rank's model and cache."""

    def __init__(self, model: Model, forward: Forward, device: torch.device) -> None:
        self._model = model
        self._forward = forward
        self._device = device
        self._sampler = Sampler(library() if device.type == "cpu" else None)

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
            quantize=settings.quantize,
            packed=None if settings.packed is None else Path(settings.packed),
            progress=progress,
        )
        limits = settings.limits
        blocks = limits.max_batch_total_tokens // BLOCK_SIZE
        stored: torch.dtype = getattr(torch, settings.kv_cache_dtype or settings.dtype)
        return cls.of(model, blocks, limits.max_batch_prefill_tokens, stored, device)

    @classmethod
    def of(cls, model: Model, blocks: int, tokens: int, stored: torch.dtype, device: torch.device) -> "Runner":
        """With a cache of ``blocks`` pages whose numbers are ``stored``, for steps of up to ``tokens`` tokens."""
        cache = KVCache(model.specs, blocks, Kind(model.compute, stored), device)
        return cls(model, choose(model, cache, model.library, tokens), device)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @torch.inference_mode()
    def launch(self, works: Sequence[Work]) -> Launched:
        """Start the forward of one step."""
        # Decoding requests stand together, longest first, so that attention can batch neighbours of like length.
        order = sorted(range(len(works)), key=lambda at: (works[at].length > 1, -works[at].start))
        ordered = [works[at] for at in order]
        batch = Batch.build(ordered, self._device)
        hidden = self._forward(batch.token_ids, batch.positions, batch.segments)
        embeddings = {}
        at = 0
        for index, work in zip(order, ordered, strict=True):
            rows, at = hidden[at : at + work.length], at + work.length
            if (pooled := pool(work, rows)) is not None:
                embeddings[index] = pooled
        top = max((work.submit.sampling.top_n_tokens for work in works if work.scored), default=0)
        logits, scores = score(hidden[batch.logit_rows], batch.scored_ids, top, self._model.logits)
        return Launched(works, order, logits, scores, embeddings)

    @torch.inference_mode()
    def sample(self, launched: Launched, masks: Masks | None = None) -> list[Sampled]:
        """Wait for the logits and draw; results in the order of the works."""
        works, scores = launched.works, launched.scores
        rows = {index: row for row, index in enumerate(at for at in launched.order if works[at].samples)}
        if masks is not None:
            masks = Masks([rows[index] for index in masks.rows], masks.bits)
        tokens = self._sampler.sample(launched.logits, [works[index] for index in rows], masks)
        drawn = dict(zip(rows, tokens, strict=True))
        known: dict[int, list[Token]] = {}
        if scores is not None:
            known = dict(zip(launched.order, scores.tokens([works[at] for at in launched.order]), strict=True))
        return [self._sampled(launched, index, known.get(index, []), drawn.get(index)) for index in range(len(works))]

    def _sampled(self, launched: Launched, index: int, known: list[Token], drawn: Token | str | None) -> Sampled:
        """All that one work yields."""
        if isinstance(drawn, str):
            return Sampled(error=drawn)
        embedding: list[float] = launched.embeddings[index].tolist() if index in launched.embeddings else []
        if not all(map(math.isfinite, itertools.chain((token.logprob for token in known), embedding))):
            return Sampled(error=NOT_A_NUMBER)
        return Sampled(known if drawn is None else [*known, drawn], embedding)
