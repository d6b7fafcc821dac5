"""The paged KV cache of all layers: who reads it and how its pages lie is the attention backends' affair."""

from collections.abc import Sequence

import torch

from tgi.attention.base import Attend, AttentionBackend, AttnSpec, Precision, Segment, Turn, choose
from tgi.attention.flashinfer import FlashInferAttention
from tgi.attention.native import NativeAttention
from tgi.attention.placed import Placed
from tgi.attention.sdpa import SdpaAttention
from tgi.attention.triton import TritonAttention
from tgi.core.config import KVPool

BACKENDS: tuple[type[AttentionBackend], ...] = (NativeAttention, TritonAttention, SdpaAttention)
"""In order of preference."""
ASKED: tuple[type[AttentionBackend], ...] = (FlashInferAttention,)
"""Used by name alone."""


class KVCache:
    """Pages of BLOCK_SIZE tokens in every layer; a block's id means the same in all layers of a pool."""

    def __init__(
        self,
        specs: Sequence[AttnSpec],
        pools: Sequence[KVPool],
        precision: Precision,
        device: torch.device,
        attention: str | None = None,
    ) -> None:
        """``pools``: the first sees farthest. ``attention``: the only backend to use, by name. Raises StartupError if
        none serves a layer."""
        self.pools = len(pools)
        self.blocks = [pool.blocks for pool in pools]
        self._specs = list(specs)
        self._pools = {spec: _pool(spec, pools) for spec in dict.fromkeys(specs)}
        backends = BACKENDS
        if attention is not None:
            backends = tuple(backend for backend in (*BACKENDS, *ASKED) if backend.name == attention)
        self._backends = {
            spec: choose(spec, precision, device, backends)(spec, precision, device) for spec in dict.fromkeys(specs)
        }
        self.names = sorted({backend.name for backend in self._backends.values()})
        """Of the backends."""
        self.static = all(backend.static for backend in self._backends.values())
        """Whether a step is read from device memory alone, so that the same launches serve the next one."""
        self._pages = [self._backends[spec].allocate(pools[self._pools[spec]].blocks) for spec in specs]

    def attend(self, segments: Sequence[Sequence[Segment]], placed: Sequence[Placed] | None = None) -> Attend:
        """The attention of one step, as the model's forward sees it; for each pool the segments with its blocks.
        ``placed``: the same in device memory, if it is there already."""
        prepared = {}
        for spec, backend in self._backends.items():
            pool = self._pools[spec]
            prepared[spec] = backend.prepare(segments[pool], None if placed is None else placed[pool])

        def run(layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
            return prepared[self._specs[layer]].run(self._pages[layer], qkv, turn)

        return run


def _pool(spec: AttnSpec, pools: Sequence[KVPool]) -> int:
    """The last, so the one with the narrowest window, that keeps what the layer sees."""
    fitting = [
        at
        for at, pool in enumerate(pools)
        if pool.window is None or (spec.window is not None and spec.window <= pool.window)
    ]
    return fitting[-1]
