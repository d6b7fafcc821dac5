"""Paged attention by the native kernel: CPUs, float32 arithmetic, a cache in float32, bfloat16, int8 or float8."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tgi.attention.base import AttnSpec, Precision, PreparedAttention, Segment, Turn, zeros
from tgi.attention.placed import Placed
from tgi.core.config import BLOCK_SIZE
from tgi.kernels import attention as kernel
from tgi.kernels.library import library
from tgi.kernels.ops import Form

_FORMS = {
    torch.float32: Form.FP32,
    torch.bfloat16: Form.BF16,
    torch.int8: Form.INT8,
    torch.float8_e4m3fn: Form.E4M3,
    torch.float8_e5m2: Form.E5M2,
}

assert kernel.PAGE == BLOCK_SIZE


class NativeAttention:
    """One step at a time: ``prepare`` writes where the step before was. A recorded program therefore finds each step in
    the same place, as long as none has more tokens than the largest before the recording."""

    name = "native"
    static = False

    @staticmethod
    def declines(spec: AttnSpec, precision: Precision, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"not made for {device.type}"
        if precision.compute != torch.float32:
            return f"no arithmetic in {precision.compute}"
        if precision.stored not in _FORMS:
            return f"no cache in {precision.stored}"
        if spec.sinks:
            return "no attention sinks"
        if spec.head_dim % 4 or spec.head_dim > kernel.LARGEST_DIM:
            return f"no heads of {spec.head_dim} dimensions"
        return "no native kernels" if library() is None else None

    def __init__(self, spec: AttnSpec, precision: Precision, device: torch.device) -> None:
        native = library()
        assert native is not None
        self._library = native
        form = _FORMS[precision.stored]
        self._layout = kernel.Layout(spec.heads, spec.kv_heads, spec.head_dim, form, spec.window, spec.latent)
        self._spec = spec
        self._device = device
        self._step = kernel.Step(native, self._layout, 1)
        self._slopes = None if spec.slopes is None else torch.tensor(spec.slopes)

    def allocate(self, blocks: int) -> torch.Tensor:
        return zeros((blocks, self._layout.kv_heads, self._layout.page), torch.uint8, self._device)

    def prepare(self, segments: Sequence[Segment], placed: Placed | None = None) -> PreparedAttention:
        tokens = sum(segment.length for segment in segments)
        if tokens > self._step.tokens:
            self._step = kernel.Step(self._library, self._layout, max(tokens, 2 * self._step.tokens))
        self._step.plan((segment.start, segment.length, segment.blocks) for segment in segments)
        return _Prepared(self._step, self._spec, self._slopes)


@dataclass(frozen=True, slots=True)
class _Prepared:
    step: kernel.Step
    spec: AttnSpec
    slopes: torch.Tensor | None

    def run(self, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        norm = turn.norm
        kernel.turn(
            self.step,
            pages,
            qkv,
            angles=turn.angles,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            scales=turn.scales if self.step.layout.form is Form.E4M3 else (1.0, 1.0),
        )
        return kernel.attend(
            self.step, pages, qkv, scale=self.spec.scale, softcap=self.spec.softcap, slopes=self.slopes
        )
