"""How the model's forward is run: step by step through Python, or recorded once as a program of native kernels."""

import logging
from array import array
from collections.abc import Callable
from typing import Protocol

import torch

from tgi.attention.base import Segment
from tgi.core.config import BLOCK_SIZE
from tgi.kernels.library import Library
from tgi.kernels.program import NotRecordable, Program
from tgi.models.registry import Model
from tgi.runtime.batch import Batch
from tgi.runtime.kvcache import KVCache

log = logging.getLogger(__name__)


Then = Callable[[torch.Tensor], tuple[Program, int]]
"""Given where the hidden states will be: the program that reads them, and its rows."""


class Forward(Protocol):
    """A step's tokens → hidden states [at least tokens, hidden], valid until the next call. ``then`` is run behind."""

    def __call__(self, batch: Batch, then: Then | None = None) -> torch.Tensor: ...


class Eager:
    """The model's Python runs in each step: any model, any device."""

    def __init__(self, model: Model, cache: KVCache, device: torch.device) -> None:
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

    def __init__(self, model: Model, cache: KVCache, library: Library, tokens: int) -> None:
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


def choose(model: Model, cache: KVCache, tokens: int, device: torch.device) -> Forward:
    """The fastest way for this model."""
    if model.library is not None:
        try:
            return Recorded(model, cache, model.library, tokens)
        except NotRecordable as error:
            log.info("The model runs step by step: %s", error)
    return Eager(model, cache, device)
