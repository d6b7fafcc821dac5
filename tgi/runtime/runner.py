"""Runs the model over the paged cache: works in, logits, tokens out. Knows no queue, no socket and no text."""

import itertools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tgi.attention.base import Precision
from tgi.core.config import SCORED_ROWS, KVPool, Settings
from tgi.core.errors import StartupError
from tgi.core.messages import Implementation, Sampling, Submit, Token
from tgi.core.plan import Masks, Sampled, Work
from tgi.kernels.library import library
from tgi.kernels.triton import runs_on
from tgi.models.registry import Model, load_model
from tgi.parallel import Group
from tgi.runtime.batch import Batch
from tgi.runtime.forward import Forward, Then, choose
from tgi.runtime.kvcache import KVCache
from tgi.runtime.prompt import Scores, pool, score, told
from tgi.runtime.ranks import Leader
from tgi.runtime.sampler import NOT_A_NUMBER, Draw, Sampler
from tgi.runtime.staging import Staging
from tgi.runtime.triton_sampler import TritonSampler


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
    targets: Sequence[int]
    """Known tokens to score."""
    rows: torch.Tensor | None
    """[rows, hidden size]: hidden states that become logits, one for each token to draw, then one for each target."""
    logits: torch.Tensor | None
    """float32 [first rows, vocabulary]."""
    embeddings: Mapping[int, torch.Tensor]
    """Index of the work → [hidden size]."""


@dataclass(slots=True)
class Drawing:
    """A step whose tokens are being drawn."""

    launched: Launched
    works: Sequence[Work]
    tokens: list[tuple[Sequence[int], Draw]] = field(default_factory=list)
    """Indices of works, and what is drawn for them."""
    scores: list[Scores] = field(default_factory=list)
    """Of the targets."""
    forced: list[tuple[Sequence[int], Scores]] = field(default_factory=list)
    """Indices of works that would have drawn, had their token not become known meanwhile, and its scores."""


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
        triton = TritonSampler(model.vocab_size, device) if self._library is None and runs_on(device) else None
        self._sampler = Sampler(self._library, model.head, triton)
        self._staging = Staging(device)

    @property
    def ahead(self) -> bool:
        """Whether the device runs by itself: a step may be launched before the last one is collected."""
        return self._forward.ahead

    @classmethod
    def load(
        cls,
        settings: Settings,
        progress: Callable[[int, int], None],
        group: Group = Group(),  # noqa: B008  # frozen
    ) -> "Runner":
        """Load this rank's weights (``progress(done, total)`` in bytes) and set up its cache. Raises StartupError."""
        device = torch.device(settings.device, group.rank if settings.device != "cpu" else 0)
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
            fixed=settings.deterministic,
            progress=progress,
        )
        if settings.kv_cache_dtype is not None and not model.specs:
            name = f"--kv-cache-dtype {settings.kv_cache_dtype}"
            raise StartupError(f"`{name}`: {settings.model.model_id} keeps a cache of its own")
        limits = settings.limits
        stored: torch.dtype = getattr(torch, (settings.kv_cache_dtype or settings.dtype).replace("fp8", "float8"))
        return cls.of(
            model,
            settings.pools,
            limits.max_batch_prefill_tokens,
            stored,
            device,
            group,
            graphs=settings.graphs,
            fixed=settings.deterministic,
            attention=settings.attention,
        )

    @classmethod
    def of(
        cls,
        model: Model,
        pools: Sequence[KVPool],
        tokens: int,
        stored: torch.dtype,
        device: torch.device,
        group: Group | None = None,
        *,
        graphs: Sequence[int] = (),
        fixed: bool = False,
        attention: str | None = None,
    ) -> "Runner":
        """With a cache of ``pools`` whose numbers are ``stored``, for steps of up to ``tokens`` tokens. ``graphs``: as
        in ``choose``; ``fixed``: as in Precision; ``attention``: as in KVCache."""
        cache = KVCache(model.specs, pools, Precision(model.compute, stored, fixed), device, attention)
        forward = choose(model, cache, tokens, device, group, graphs)
        return cls(model, forward, device, Implementation(model.description, forward.how, cache.names), group)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def paged(self) -> bool:
        """Whether pages hold what was computed, so that requests can share them."""
        return bool(self._model.specs)

    def launch(self, works: Sequence[Work]) -> Launched:
        """Start the forward of one step. Before that of another, ``draw`` must have been called for this one."""
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
        rows, logits = self._logits(hidden, places, first) if places else (None, None)
        embeddings = self._pooled(order, ordered, hidden)
        return Launched(works, order, [*plain], [*drawing], batch.scored_ids, rows, logits, embeddings)

    @torch.inference_mode()
    def follow(self, batch: Batch, places: Sequence[int], first: int) -> None:
        """Another rank's share of a step that rank 0 launches and samples."""
        self._group.begin()
        hidden = self._forward(batch)
        if places:
            rows, _ = self._logits(hidden, places, first)
            for at in range(first, len(places), SCORED_ROWS):
                self._model.logits(rows[at : at + SCORED_ROWS])

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor, places: Sequence[int], first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the hidden states those at some places, and the logits of the first of these."""
        if places == [*range(len(places))]:
            rows = hidden[: len(places)]
        else:
            rows = hidden.index_select(0, self._staging.put([places])[0][: len(places)])
        return rows, self._model.logits(rows[:first])

    def warm(self, kinds: int) -> None:
        """Run two steps of nobody's, while no request holds pages: what is made on first use is there then. ``kinds``:
        of layers."""
        tokens = [0, 0]
        pages = [array("i", [0])] * kinds
        for start, wish in ((0, Sampling()), (2, Sampling(greedy=False, top_k=2, presence_penalty=1.0))):
            submit = Submit(0, tokens, 2, 2, [], wish, 0.0)
            work = Work(submit, tokens, start, len(tokens) - start, len(tokens), True, pages, {})
            self.sample(self.launch([work]))
            tokens.append(0)

    def capture(self) -> bool:
        """Make another kind of step faster, in a fraction of a second; False if there is nothing to do."""
        if not self._forward.uncaptured:
            return False
        if self.leader is not None:
            self.leader.capture()
        self._forward.capture()
        return True

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
        """Draw, and wait for it: where no other step is under way."""
        return self.collect(self.draw(launched, launched.works, masks))

    def draw(self, launched: Launched, works: Sequence[Work], masks: Masks | None = None) -> Drawing:
        """Start to draw tokens and to score known ones.

        works: those launched, as they are by now: what they were to draw may be known, or not be wanted any more.
        masks: of such as have a grammar.
        """
        drawing = Drawing(launched, works)
        if launched.rows is not None and launched.logits is not None:
            self._read(drawing, launched.rows, launched.logits, masks)
        return drawing

    @torch.inference_mode()
    def _read(self, drawing: Drawing, rows: torch.Tensor, logits: torch.Tensor, masks: Masks | None) -> None:
        """Draw and score by a few logits at a time."""
        works, launched = drawing.works, drawing.launched
        at, targets = 0, list(launched.targets)
        while True:
            # Of these logits the first are of works that draw, or were to.
            own = launched.drawing[at : at + len(logits)]
            self._draw(drawing, logits[: len(own)], own, masks, at)
            if count := len(logits) - len(own):
                top = max(work.submit.sampling.top_n_tokens for work in works if work.scored)
                drawing.scores.append(self._score(logits[len(own) :], targets[:count], top))
                del targets[:count]
            at += len(logits)
            if at >= len(rows):
                return
            # Each part's logits, the widest tensor there is, are gone when the next part's are made.
            logits = self._model.logits(rows[at : at + SCORED_ROWS])

    def _draw(
        self, drawing: Drawing, logits: torch.Tensor, own: Sequence[int], masks: Masks | None, first: int
    ) -> None:
        """Draw for the works of the indices ``own``. ``first``: rows before these."""
        works = drawing.works
        samples = [row for row, index in enumerate(own) if works[index].samples]
        if len(samples) < len(own):
            if forced := [row for row, index in enumerate(own) if works[index].scored and not works[index].samples]:
                indices = [own[row] for row in forced]
                known = [works[index].tokens[works[index].scored[0]] for index in indices]
                top = max(works[index].submit.sampling.top_n_tokens for index in indices)
                drawing.forced.append((indices, self._score(logits[forced], known, top)))
            own = [own[row] for row in samples]
            logits = logits[samples]
        if not own:
            return
        drawn = self._sampler.draw(logits, [works[index] for index in own], None if masks is None else masks.of(own))
        drawing.tokens.append((own, drawn))
        if self.ahead:
            self._forward.keep(drawn.ids, first)
            for row, index in enumerate(own, first):
                works[index].scratch["drawn"] = row

    def _score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> Scores:
        targets = self._staging.put([tokens])[0][: len(tokens)].long()
        return score(self._library, logits, targets, top)

    def collect(self, drawing: Drawing) -> list[Sampled]:
        """Wait for what a step yields; results in the order of the works."""
        launched, works, order = drawing.launched, drawing.works, drawing.launched.order
        drawn: dict[int, Token | None] = {}
        known: dict[int, list[Token]] = {}
        if launched.plain:
            drawn.update(zip(launched.plain, self._sampler.drawn(len(launched.plain)), strict=True))
        for indices, tokens in drawing.tokens:
            drawn.update(zip(indices, tokens.read(), strict=True))
        for indices, scores in drawing.forced:
            known.update(zip(indices, told([scores], [works[at] for at in indices]), strict=True))
        if drawing.scores:
            others = [at for at in order if at not in known]
            known.update(zip(others, told(drawing.scores, [works[at] for at in others]), strict=True))
        return [
            _sampled(launched.embeddings.get(index), known.get(index, []), [drawn[index]] if index in drawn else [])
            for index in range(len(works))
        ]


def _sampled(pooled: torch.Tensor | None, known: list[Token], drawn: list[Token | None]) -> Sampled:
    """All that one work yields."""
    tokens = [token for token in drawn if token is not None]
    if len(tokens) < len(drawn):
        return Sampled(error=NOT_A_NUMBER)
    if not known and pooled is None:
        return Sampled(tokens)
    embedding: list[float] = [] if pooled is None else pooled.tolist()
    if not all(map(math.isfinite, itertools.chain((token.logprob for token in known), embedding))):
        return Sampled(error=NOT_A_NUMBER)
    return Sampled([*known, *tokens], embedding)
