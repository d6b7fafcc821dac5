"""How the model's forward is run: step by step through Python, request by request, recorded once as a program of native
kernels, or captured as graphs of a GPU's."""

import logging
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from tgi.attention.base import Segment
from tgi.attention.placed import Placed, arrays, singles
from tgi.core.config import BLOCK_SIZE
from tgi.core.plan import Work
from tgi.kernels.library import Library
from tgi.kernels.program import NotRecordable, Program
from tgi.models.registry import CachingModel, Model, PagedModel
from tgi.parallel import Group
from tgi.runtime.batch import Batch
from tgi.runtime.kvcache import KVCache
from tgi.runtime.staging import Numbers, Staging

log = logging.getLogger(__name__)

Then = Callable[[torch.Tensor], tuple[Program, int]]
"""Given where the hidden states will be: the program that reads them, and its rows."""


class Forward:
    """A step's tokens → hidden states [at least tokens, hidden], valid until the next call."""

    how: str
    """In words."""
    ahead = False
    """Whether a call returns before all is computed, and may be about tokens that are being drawn."""

    @property
    def uncaptured(self) -> bool:
        """Whether ``capture`` can do more."""
        return False

    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        """``then`` is run behind."""
        raise NotImplementedError

    def keep(self, ids: torch.Tensor, first: int) -> None:
        """int64 [rows]: of the last step's draws those from ``first`` on, for the next; asked of what is ``ahead``."""
        raise NotImplementedError

    def capture(self) -> None:
        """Make steps of another size faster."""


class Eager(Forward):
    """The model's Python runs in each step: any model, any device."""

    def __init__(
        self,
        model: PagedModel,
        cache: KVCache,
        tokens: int,
        device: torch.device,
        group: Group | None = None,
        why: str = "",
    ) -> None:
        """``tokens``: the most that a step may have. ``why``: not another way."""
        self.how = f"step by step ({why})" if why else "step by step"
        self.ahead = device.type != "cpu"
        self.cache = cache
        self.group = group or Group()
        self._model = model
        self._staging = Staging(device)
        self._drawn = torch.zeros(1, tokens, dtype=torch.int64, device=device)

    def keep(self, ids: torch.Tensor, first: int) -> None:
        self._drawn[0, first : first + len(ids)].copy_(ids)

    @torch.inference_mode()
    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        hidden = self.run(self._staging.put(_numbers(batch)), batch.segments, drawn=bool(batch.drawn))
        if then is not None:
            program, rows = then(hidden)
            program.run(rows)
        return hidden

    def run(
        self, places: Sequence[torch.Tensor], segments: Sequence[Sequence[Segment]], *, drawn: bool
    ) -> torch.Tensor:
        """The forward of what is in ``places``, as ``_numbers`` has it. ``drawn``: some tokens may be among what was
        drawn."""
        ids, positions, sources, starts, contexts, rows, *firsts, pages = places
        ids = ids.long()
        if drawn:
            # It is the first rank that has drawn.
            widths = [self._drawn.shape[1], *[0] * (self.group.size - 1)]
            known = self.group.all_gather(self._drawn if self.group.rank == 0 else self._drawn[:, :0], widths)[0]
            ids = torch.where(sources < 0, ids, known.index_select(0, sources.clamp(min=0)))
        alone = singles(segments[0])
        placed = [Placed(starts, contexts, first, pages, rows, alone) for first in firsts]
        return self._model.forward(ids, positions.long(), self.cache.attend(segments, placed))


def _numbers(batch: Batch) -> list[Numbers]:
    """A step as the device reads it: ids, positions, places among what was drawn (-1: known), and its segments."""
    sources = numpy.full(len(batch.token_ids), -1, numpy.int32)
    for place, row in batch.drawn:
        sources[place] = row
    return [batch.token_ids, batch.positions, sources, *arrays(batch.segments)]


Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], object], torch.Tensor]]
"""Given what to run: what runs it again, and where its result will be."""


class Graphs:
    """Graphs of a GPU's, whose memory comes from one pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which compile grammars, have no part in it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = run()
        self._pool = graph.pool()
        return graph.replay, hidden


class Captured(Forward):
    """Steps in which every request computes one token are replays of a graph, captured for as many requests or a few
    more, which are nobody's; all others run step by step.

    The largest is captured first, and no two are ever under way together: so the others find room in its memory.
    """

    def __init__(self, eager: Eager, sizes: Sequence[int], device: torch.device, record: Record) -> None:
        """``sizes``: numbers of requests."""
        self.how = f"as captured graphs of up to {max(sizes)} requests, prompts step by step"
        self.ahead = eager.ahead
        self._eager = eager
        self._record = record
        self._left = sorted(sizes)
        self._replays: dict[int, tuple[Callable[[], object], torch.Tensor]] = {}
        # Where graphs read it stays, so a step whose requests share more pages than that isn't replayed.
        largest = _numbers(Batch.padding(self._left[-1], eager.cache.pools))
        self._staging = Staging(device, Staging.size([*map(len, largest)]) + 2 * sum(eager.cache.blocks))

    def keep(self, ids: torch.Tensor, first: int) -> None:
        self._eager.keep(ids, first)

    @torch.inference_mode()
    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        count = len(batch.token_ids)
        size = min((size for size in self._replays if size >= count), default=None)
        if size is None or len(batch.segments[0]) < count:
            return self._eager(batch, then)
        numbers = _numbers(batch.padded(size))
        if not self._staging.holds(numbers):
            return self._eager(batch, then)
        self._staging.put(numbers)
        replay, hidden = self._replays[size]
        replay()
        return hidden[:count]

    @property
    def uncaptured(self) -> bool:
        return bool(self._left)

    @torch.inference_mode()
    def capture(self) -> None:
        size = self._left.pop()
        batch = Batch.padding(size, self._eager.cache.pools)
        places = self._staging.put(_numbers(batch))

        def run() -> torch.Tensor:
            return self._eager.run(places, batch.segments, drawn=True)

        run()  # what is made on first use, kernels too, is there then
        try:
            self._replays[size] = self._record(run)
        except RuntimeError as error:
            log.warning("No graphs of up to %d requests: %s", size, str(error).splitlines()[0])
            self._left.clear()


class Recorded(Forward):
    """One call a step, whatever the number of layers; nothing is allocated."""

    how = "as one recorded program"

    def __init__(self, model: PagedModel, cache: KVCache, library: Library, tokens: int) -> None:
        """``tokens``: the most that a step may have. Raises NotRecordable."""
        self._cache = cache
        ids, positions = torch.zeros(2, tokens, dtype=torch.int64)
        self._ids, self._positions = ids.numpy(), positions.numpy()
        self._program = Program(library, tokens)
        # The largest step there may be, so that attention's own memory stays where it is from now on.
        largest = Segment(0, tokens, array("i", bytes(4 * -(-tokens // BLOCK_SIZE))))
        attend = cache.attend([[largest]] * cache.pools)
        self._hidden = self._program.record(lambda: model.forward(ids, positions, attend))

    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        count = len(batch.token_ids)
        # Into the buffers that the program reads.
        self._ids[:count] = batch.token_ids
        self._positions[:count] = batch.positions
        self._cache.attend(batch.segments)
        self._program.run(count, None if then is None else then(self._hidden))
        return self._hidden


class OneByOne(Forward):
    """Each request by itself, for a model that keeps what it needs of it: it lies in the request's scratch. Pages only
    count tokens then."""

    how = "request by request"

    def __init__(self, model: CachingModel, device: torch.device) -> None:
        self._model = model
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        assert then is None, "a model with a head of native kernels has native kernels throughout"
        return torch.cat([self._advance(work) for work in batch.works])

    def _advance(self, work: Work) -> torch.Tensor:
        ids = torch.tensor(work.tokens[: work.start + work.length]).to(self._device, non_blocking=True)
        hidden, work.scratch["kept"] = self._model.advance(ids, work.start, work.scratch.pop("kept", None))
        return hidden


def choose(
    model: Model,
    cache: KVCache,
    tokens: int,
    device: torch.device,
    group: Group | None = None,
    graphs: Sequence[int] = (),
) -> Forward:
    """The fastest way for this model. ``tokens``: the most that a step may have. ``graphs``: numbers of requests for
    which to capture graphs, if the device has such."""
    if isinstance(model, CachingModel):
        return OneByOne(model, device)
    if model.library is not None:
        try:
            return Recorded(model, cache, model.library, tokens)
        except NotRecordable as error:
            return Eager(model, cache, tokens, device, group, str(error))
    eager = Eager(model, cache, tokens, device, group)
    if graphs and device.type == "cuda" and model.static and cache.static:
        return Captured(eager, graphs, device, Graphs())
    return eager
