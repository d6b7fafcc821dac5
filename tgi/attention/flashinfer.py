"""Paged attention by FlashInfer (Ye et al., arXiv 2501.01005), for those who have it and ask for it: NVIDIA's GPUs.

Written by its documentation, and tested with a stand-in for it alone. A step is planned on the host, so steps of this
backend can't be captured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from tgi.attention.base import AttnSpec, Precision, PreparedAttention, Segment, Turn
from tgi.attention.placed import Placed
from tgi.attention.triton import TritonAttention
from tgi.core.config import BLOCK_SIZE

_DIMS = (64, 128, 256)
_WORKSPACE = 128 << 20
"""Bytes that FlashInfer's documentation advises."""


class FlashInferAttention:
    """Pages are those of TritonAttention, which writes them. One kernel serves prompts and single tokens: query heads
    that share a kv head are rows of its tiles, too."""

    name = "flashinfer"
    static = False

    @staticmethod
    def declines(spec: AttnSpec, precision: Precision, device: torch.device) -> str | None:
        if find_spec("flashinfer") is None:
            return "not installed"
        if device.type != "cuda" or torch.version.hip is not None:
            return f"not made for {device.type}"
        if spec.latent or spec.slopes is not None or spec.sinks:
            return "no latent keys, slopes or sinks"
        if spec.head_dim not in _DIMS:
            return f"no heads of {spec.head_dim} dimensions"
        if precision.fixed:
            return "a row's result depends on the others"
        if precision.compute not in (torch.bfloat16, torch.float16) or precision.stored != precision.compute:
            return f"no cache in {precision.stored} with arithmetic in {precision.compute}"
        return TritonAttention.declines(spec, precision, device)

    def __init__(self, spec: AttnSpec, precision: Precision, device: torch.device) -> None:
        import flashinfer  # compiles when it is first used

        self.pages = TritonAttention(spec, precision, device)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(_WORKSPACE, dtype=torch.uint8, device=device), "HND"
        )
        self._spec = spec
        self._compute = precision.compute
        self._device = device

    def allocate(self, blocks: int) -> torch.Tensor:
        return self.pages.allocate(blocks)

    def prepare(self, segments: Sequence[Segment], placed: Placed | None = None) -> PreparedAttention:
        starts, ends, last = [0], [0], []
        blocks: list[int] = []
        for segment in segments:
            used = -(-(segment.start + segment.length) // BLOCK_SIZE)
            blocks += segment.blocks[:used]
            starts.append(starts[-1] + segment.length)
            ends.append(len(blocks))
            last.append(segment.start + segment.length - (used - 1) * BLOCK_SIZE)
        # The last step's plan may still be on its way from memory that this one's is written to.
        torch.get_device_module(self._device).synchronize()
        spec = self._spec
        self.wrapper.plan(
            *(torch.tensor(part, dtype=torch.int32) for part in (starts, ends, blocks, last)),
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            BLOCK_SIZE,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if spec.window is None else spec.window - 1,
            logits_soft_cap=spec.softcap,
            q_data_type=self._compute,
            kv_data_type=self._compute,
        )
        return _Prepared(self, Placed.of(segments, self._device) if placed is None else placed)


@dataclass(frozen=True, slots=True)
class _Prepared:
    backend: FlashInferAttention
    placed: Placed

    def run(self, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        q = self.backend.pages.store(self.placed, pages, qkv, turn)
        out: torch.Tensor = self.backend.wrapper.run(q, (pages[:, :, 0], pages[:, :, 1]))
        return out.flatten(1)
