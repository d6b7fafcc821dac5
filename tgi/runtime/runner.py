"""Runs the model over the paged cache: works in, logits, tokens out. Knows no queue, no socket and no text."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tgi.attention.base import Precision
from tgi.core.config import SCORED_ROWS, KVPool, Settings
from tgi.core.errors import StartupError
from tgi.core.messages import Implementation, Token
from tgi.core.plan import Masks, Sampled, Work
from tgi.kernels.library import library
from tgi.models.registry import Model, load_model
from tgi.parallel import Group
from tgi.runtime.batch import Batch
from tgi.runtime.forward import Forward, Then, choose
from tgi.runtime.kvcache import KVCache
from tgi.runtime.prompt import Scores, pool, score, told
from tgi.runtime.ranks import Leader
from tgi.runtime.sampler import NOT_A_NUMBER, Sampler


@dataclass(frozen=True, slots=True)
class Rows:
    """Hidden states that become logits, and the first that did."""

    hidden: torch.Tensor
    """[rows, hidden size]: one row for each token to draw, then one for each known token to score."""
    targets: torch.Tensor
    """The known tokens that the latter score."""
    logits: torch.Tensor
    """float32 [first rows, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose forward was started."""

    works: Sequence[Work]
    order: Sequence[int]
    """Place on the token axis → index of the work."""
    plain: Sequence[int]
    """Indices of the works for which tokens are being drawn already."""
    drawing: Sequence[int]
    """Of the others that sample, as their rows come."""
    rows: Rows | None
    embeddings: Mapping[int, torch.Tensor]
    """Index of the work → [hidden size]."""


class Runner:
    """One rank's model and cache."""

    def __init__(
        self,
        model: Model,
        forward: Forward,
        device: torch.device,
        implementation: Implementation | None = None,
        group: Group | None = None,
    ) -> None:
        """``implementation``: what there is to be told of it."""
        self.implementation = implementation
        self.leader: Leader | None = None
        """Of the other ranks, if this is the first of several."""
        self._group = group or Group()
        self._model = model
        self._forward = forward
        self._device = device
        self._library = library() if device.type == "cpu" else None
        self._sampler = Sampler(self._library, model.head)

    @classmethod
    def load(
        cls,
        settings: Settings,
        progress: Callable[[int, int], None],
        group: Group = Group(),  # noqa: B008  # frozen
    ) -> "Runner":
        """Load this rank's weights (``progress(done, total)`` in bytes) and set up its cache. Raises StartupError."""
        device = torch.device(settings.device, group.rank if settings.device == "cuda" else 0)
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
            trust_remote_code=settings.trust_remote_code,
            group=group,
            progress=progress,
        )
        if settings.kv_cache_dtype is not None and not model.specs:
            name = f"--kv-cache-dtype {settings.kv_cache_dtype}"
            raise StartupError(f"`{name}`: {settings.model.model_id} keeps a cache of its own")
        limits = settings.limits
        stored: torch.dtype = getattr(torch, (settings.kv_cache_dtype or settings.dtype).replace("fp8", "float8"))
        return cls.of(model, settings.pools, limits.max_batch_prefill_tokens, stored, device, group)

    @classmethod
    def of(
        cls,
        model: Model,
        pools: Sequence[KVPool],
        tokens: int,
        stored: torch.dtype,
        device: torch.device,
        group: Group | None = None,
    ) -> "Runner":
        """With a cache of ``pools`` whose numbers are ``stored``, for steps of up to ``tokens`` tokens."""
        cache = KVCache(model.specs, pools, Precision(model.compute, stored), device)
        forward = choose(model, cache, tokens, device)
        return cls(model, forward, device, Implementation(model.description, forward.how, cache.names), group)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def paged(self) -> bool:
        """Whether pages hold what was computed, so that requests can share them."""
        return bool(self._model.specs)

    def launch(self, works: Sequence[Work]) -> Launched:
        """Start the forward of one step."""
        # Decoding requests stand together, longest first, so that attention can batch neighbours of like length.
        order = sorted(range(len(works)), key=lambda at: (works[at].length > 1, -works[at].start))
        ordered = [works[at] for at in order]
        batch = Batch.build(ordered)
        plain: dict[int, int] = {}  # index of a work → place of its last row
        drawing: dict[int, int] = {}
        for index, place in zip((at for at in order if works[at].samples), batch.last_rows, strict=True):
            (plain if self._sampler.is_plain(works[index]) else drawing)[index] = place
        then: Then | None = None
        if plain:
            then = partial(self._sampler.plan, places=[*plain.values()], works=[works[at] for at in plain])
        places = [*drawing.values(), *batch.scored_rows]
        # Of a GPU's step all logits are made at once; those of a CPU's should still be in its cache when they are read.
        first = SCORED_ROWS if self._device.type == "cpu" else max(len(drawing), SCORED_ROWS)
        if self.leader is not None:
            self._group.begin()
            self.leader.send(batch, places, first)
        hidden = self._forward(batch, then)
        rows = self._rows(hidden, places, batch.scored_ids, first) if places else None
        return Launched(works, order, [*plain], [*drawing], rows, self._pooled(order, ordered, hidden))

    @torch.inference_mode()
    def follow(self, batch: Batch, places: Sequence[int], first: int) -> None:
        """Another rank's share of a step that rank 0 launches and samples."""
        self._group.begin()
        hidden = self._forward(batch)
        if places:
            rows = self._rows(hidden, places, (), first).hidden
            for at in range(first, len(places), SCORED_ROWS):
                self._model.logits(rows[at : at + SCORED_ROWS])

    @torch.inference_mode()
    def _rows(self, hidden: torch.Tensor, places: Sequence[int], targets: Sequence[int], first: int) -> Rows:
        # One transfer for both.
        packed = torch.tensor([*places, *targets]).to(self._device, non_blocking=True)
        rows = hidden[packed[: len(places)]]
        return Rows(rows, packed[len(places) :], self._model.logits(rows[:first]))

    @staticmethod
    def _pooled(order: Sequence[int], works: Sequence[Work], hidden: torch.Tensor) -> dict[int, torch.Tensor]:
        """Embeddings by the works' indices; the works stand in the order of the token axis."""
        found = {}
        at = 0
        for index, work in zip(order, works, strict=True):
            if work.submit.pooling is not None and (pooled := pool(work, hidden[at : at + work.length])) is not None:
                found[index] = pooled
            at += work.length
        return found

    def sample(self, launched: Launched, masks: Masks | None = None) -> list[Sampled]:
        """Wait for the logits and draw; results in the order of the works. masks: of such as have a grammar."""
        works, order = launched.works, launched.order
        assert masks is None or launched.rows is not None
        drawn: dict[int, Token | str] = {}
        known: dict[int, list[Token]] = {}
        if launched.plain:
            drawn.update(zip(launched.plain, self._sampler.drawn(len(launched.plain)), strict=True))
        if launched.rows is not None:
            tokens, scores = self._read(launched, launched.rows, masks)
            drawn.update(zip(launched.drawing, tokens, strict=True))
            if scores:
                known = dict(zip(order, told(scores, [works[at] for at in order]), strict=True))
        return [self._sampled(launched, index, known.get(index, []), drawn.get(index)) for index in range(len(works))]

    @torch.inference_mode()
    def _read(self, launched: Launched, rows: Rows, masks: Masks | None) -> tuple[list[Token | str], list[Scores]]:
        """Draw tokens and score known ones, by a few logits at a time."""
        works, logits = launched.works, rows.logits
        if masks is not None:
            places = {index: row for row, index in enumerate(launched.drawing)}
            masks = Masks([places[index] for index in masks.rows], masks.bits)
        top = 0
        if len(rows.targets):
            top = max(work.submit.sampling.top_n_tokens for work in works if work.scored)
        drawing = [works[index] for index in launched.drawing]
        tokens: list[Token | str] = []
        scores: list[Scores] = []
        at = 0
        while True:
            count = min(max(len(drawing) - at, 0), len(logits))
            part = masks.part(at, at + count) if masks is not None else None
            tokens += self._sampler.sample(logits[:count], drawing[at : at + count], part)
            if count < len(logits):
                first = at + count - len(drawing)
                targets = rows.targets[first : first + len(logits) - count]
                scores.append(score(self._library, logits[count:], targets, top))
            at += len(logits)
            if at >= len(rows.hidden):
                return tokens, scores
            # Each part's logits, the widest tensor there is, are gone when the next part's are made.
            logits = self._model.logits(rows.hidden[at : at + SCORED_ROWS])

    def _sampled(self, launched: Launched, index: int, known: list[Token], drawn: Token | str | None) -> Sampled:
        """All that one work yields."""
        if isinstance(drawn, str):
            return Sampled(error=drawn)
        if not known and not launched.embeddings:
            return Sampled([drawn] if drawn is not None else [])
        embedding: list[float] = launched.embeddings[index].tolist() if index in launched.embeddings else []
        if not all(map(math.isfinite, itertools.chain((token.logprob for token in known), embedding))):
            return Sampled(error=NOT_A_NUMBER)
        return Sampled(known if drawn is None else [*known, drawn], embedding)
