"""How the model's forward is run: step by step through Python, request by request, or recorded once as a program of
native kernels."""

from array import array
from collections.abc import Callable
from typing import Protocol

import torch

from tgi.attention.base import Segment
from tgi.core.config import BLOCK_SIZE
from tgi.core.plan import Work
from tgi.kernels.library import Library
from tgi.kernels.program import NotRecordable, Program
from tgi.models.registry import CachingModel, Model, PagedModel
from tgi.runtime.batch import Batch
from tgi.runtime.kvcache import KVCache

Then = Callable[[torch.Tensor], tuple[Program, int]]
"""Given where the hidden states will be: the program that reads them, and its rows."""


class Forward(Protocol):
    """A step's tokens → hidden states [at least tokens, hidden], valid until the next call. ``then`` is run behind."""

    @property
    def how(self) -> str:
        """In words."""

    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor: ...


class Eager:
    """The model's Python runs in each step: any model, any device."""

    def __init__(self, model: PagedModel, cache: KVCache, device: torch.device, why: str = "") -> None:
        """``why``: not another way."""
        self.how = f"step by step ({why})" if why else "step by step"
        self._model = model
        self._cache = cache
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor:
        ids, positions = torch.tensor([batch.token_ids, batch.positions]).to(self._device, non_blocking=True)
        hidden = self._model.forward(ids, positions, self._cache.attend(batch.segments))
        if then is not None:
            program, rows = then(hidden)
            program.run(rows)
        return hidden


class Recorded:
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


class OneByOne:
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


def choose(model: Model, cache: KVCache, tokens: int, device: torch.device) -> Forward:
    """The fastest way for this model."""
    if isinstance(model, CachingModel):
        return OneByOne(model, device)
    if model.library is None:
        return Eager(model, cache, device)
    try:
        return Recorded(model, cache, model.library, tokens)
    except NotRecordable as error:
        return Eager(model, cache, device, str(error))
