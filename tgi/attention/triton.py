"""Paged attention by Triton's kernels: GPUs, arithmetic and a cache in any floating point of theirs."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tgi.attention.base import AttnSpec, Precision, PreparedAttention, Segment, Turn, zeros
from tgi.attention.placed import Placed
from tgi.core.config import BLOCK_SIZE
from tgi.kernels.triton import runs_on

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_STORED = (*_COMPUTED, torch.float8_e4m3fn, torch.float8_e5m2)


class TritonAttention:
    """In a step of segments of one token each, what is launched depends on their number alone: it can be captured."""

    name = "triton"
    static = True

    @staticmethod
    def declines(spec: AttnSpec, precision: Precision, device: torch.device) -> str | None:
        if not runs_on(device):
            return f"Triton doesn't run on {device.type}"
        if precision.compute not in _COMPUTED:
            return f"no arithmetic in {precision.compute}"
        if precision.stored not in _STORED or (precision.stored == torch.float8_e4m3fn and not _has_e4m3(device)):
            return f"no cache in {precision.stored}"
        if max(spec.value_dim, spec.head_dim - spec.value_dim) > _kernels().WIDEST:
            return f"no heads of {spec.head_dim} dimensions"
        return None

    def __init__(self, spec: AttnSpec, precision: Precision, device: torch.device) -> None:
        self.kernels = kernels = _kernels()
        window, fixed = spec.window, precision.fixed
        self.layout = kernels.Layout(spec.heads, spec.kv_heads, spec.head_dim, spec.latent, window, fixed)
        slopes = None if spec.slopes is None else torch.tensor(spec.slopes, device=device)
        self.score = kernels.Score(spec.scale, spec.softcap, slopes, None)
        self._stored = precision.stored
        self._device = device

    def allocate(self, blocks: int) -> torch.Tensor:
        layout = self.layout
        return zeros((blocks, layout.kv_heads, layout.kinds, BLOCK_SIZE, layout.dim), self._stored, self._device)

    def store(self, placed: Placed, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Write k and v of the step's tokens to the pages; → q [tokens, heads, head_dim]."""
        norm = turn.norm
        q: torch.Tensor = self.kernels.store(
            self.layout,
            self.step(placed),
            pages,
            qkv,
            angles=turn.angles,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            scales=self.scales(turn),
        )
        return q

    def step(self, placed: Placed) -> Any:
        """As kernels take it."""
        return self.kernels.Step(placed.starts, placed.contexts, placed.firsts, placed.pages, placed.rows)

    def scales(self, turn: Turn) -> tuple[float, float]:
        """Of keys and values."""
        key, value = turn.scales if self._stored == torch.float8_e4m3fn else (1.0, 1.0)
        return key, key if self.layout.latent else value

    def prepare(self, segments: Sequence[Segment], placed: Placed | None = None) -> PreparedAttention:
        return _Prepared(self, Placed.of(segments, self._device) if placed is None else placed)


@dataclass(frozen=True, slots=True)
class _Prepared:
    backend: TritonAttention
    placed: Placed

    def run(self, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        backend = self.backend
        q = backend.store(self.placed, pages, qkv, turn)
        key, value = backend.scales(turn)
        score = backend.score._replace(scale=backend.score.scale * key, sinks=turn.sinks)
        step, singles = backend.step(self.placed), self.placed.singles
        out: torch.Tensor = backend.kernels.attend(backend.layout, step, pages, q, score, singles=singles, scale=value)
        return out


def _kernels() -> ModuleType:
    """Imports Triton, which only those pay for whom it runs."""
    from tgi.kernels.triton import attention

    assert attention.PAGE == BLOCK_SIZE
    return attention


def _has_e4m3(device: torch.device) -> bool:
    """Whether Triton converts such numbers there."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return not nvidia or torch.cuda.get_device_capability(device) >= (8, 9)
