"""How the model's forward is run: step by step through Python, or recorded once as a program of native kernels."""

import logging
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

from tgi.attention.base import Segment
from tgi.core.config import BLOCK_SIZE
from tgi.kernels.library import Library
from tgi.kernels.program import NotRecordable, Program
from tgi.models.registry import Model
from tgi.runtime.kvcache import KVCache

log = logging.getLogger(__name__)


class Forward(Protocol):
    """int64 [tokens], int64 [tokens] → hidden states [tokens, hidden], valid until the next call."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor: ...


class Eager:
    """The model's Python runs in each step: any model, any device."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        return self._model.forward(ids, positions, self._cache.attend(segments))


class Recorded:
    """One call a step, whatever the number of layers; nothing is allocated."""

    def __init__(self, model: Model, cache: KVCache, library: Library, tokens: int) -> None:
        """``tokens``: the most that a step may have. Raises NotRecordable."""
        self._cache = cache
        self._ids = torch.zeros(tokens, dtype=torch.int64)
        self._positions = torch.zeros(tokens, dtype=torch.int64)
        self._program = Program(library, tokens)
        # The largest step there may be, so that attention's own memory stays where it is from now on.
        attend = cache.attend([Segment(0, tokens, array("i", bytes(4 * -(-tokens // BLOCK_SIZE))))])
        self._hidden = self._program.record(lambda: model.forward(self._ids, self._positions, attend))

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        count = len(ids)
        self._ids[:count] = ids
        self._positions[:count] = positions
        self._cache.attend(segments)  # into the buffers that the program reads
        self._program.run(count)
        return self._hidden[:count]


def choose(model: Model, cache: KVCache, library: Library | None, tokens: int) -> Forward:
    """The fastest way for this model. ``library``: our own kernels, if the model runs on them."""
    if library is None:
        return Eager(model, cache)
    try:
        return Recorded(model, cache, library, tokens)
    except NotRecordable as error:
        log.info("The model runs step by step: %s", error)
        return Eager(model, cache)
