"""The paged KV cache of all layers: who reads it and how its pages lie is the attention backends' affair."""

from collections.abc import Sequence

import torch

from tgi.attention.base import Attend, AttentionBackend, AttnSpec, Precision, Segment, Turn, choose
from tgi.attention.native import NativeAttention
from tgi.attention.sdpa import SdpaAttention

BACKENDS: tuple[type[AttentionBackend], ...] = (NativeAttention, SdpaAttention)
"""In order of preference."""


class KVCache:
    """``blocks`` pages of BLOCK_SIZE tokens in every layer; block ids mean the same in all layers."""

    def __init__(self, specs: Sequence[AttnSpec], blocks: int, precision: Precision, device: torch.device) -> None:
        """Raises StartupError if no backend serves a layer."""
        self._specs = list(specs)
        self._backends = {
            spec: choose(spec, precision, device, BACKENDS)(spec, precision, device) for spec in dict.fromkeys(specs)
        }
        self._pages = [self._backends[spec].allocate(blocks) for spec in specs]

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """The attention of one step, as the model's forward sees it."""
        prepared = {spec: backend.prepare(segments) for spec, backend in self._backends.items()}

        def run(layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
            return prepared[self._specs[layer]].run(self._pages[layer], qkv, turn)

        return run
