"""Attention over pages of keys and values, for all requests of a step at once. csrc/attention.h says how pages lie."""

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tgi.kernels.library import Library
from tgi.kernels.ops import Angles, Attend, Form, Kind, Turn
from tgi.kernels.ops import Step as StepStruct
from tgi.kernels.panels import address
from tgi.kernels.program import empty, run

PAGE = 16
"""Tokens."""
LARGEST_DIM = 640

_SEGMENT = struct.Struct("@Pii")
"""csrc/ops.h, as are the bytes of an item."""
_ITEM_BYTES = 40
_APART = 4096
"""Most tasks of one split each; beyond, tasks are many enough without."""
_PARTIAL_BYTES = 16 << 20
"""For the results of splits, taken when first written. What doesn't fit runs undivided, to the same result."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one layer's keys and values lie: uint8 [blocks, kv heads, bytes of a page]."""

    heads: int
    kv_heads: int
    dim: int
    """Of a query and a key: a multiple of 4, at most LARGEST_DIM."""
    form: Form
    """FP32, BF16, or with a scale for each token and head INT8, E4M3 or E5M2."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it."""
    latent: int = 0
    """If not 0, so many dimensions at the end of a key are its value."""

    @property
    def size(self) -> int:
        """Of a value."""
        return self.latent or self.dim

    @property
    def width(self) -> int:
        """Of a token's queries, keys and values."""
        return (self.heads + (1 if self.latent else 2) * self.kv_heads) * self.dim

    @property
    def values(self) -> int:
        """Bytes of a page before its values."""
        return self.dim * PAGE * self._size + self._scales

    @property
    def page(self) -> int:
        """Bytes of a page."""
        return self.values + -(-self.size // 16) * 16 * PAGE * self._size + self._scales

    @property
    def _size(self) -> int:
        return {Form.FP32: 4, Form.BF16: 2}.get(self.form, 1)

    @property
    def _scales(self) -> int:
        return 4 * PAGE if self._size == 1 else 0


class Step:
    """What the layers of one layout share in a step. Its memory stays where it is: programs may name it."""

    def __init__(self, library: Library, layout: Layout, tokens: int) -> None:
        """``tokens``: the most that a step may have."""
        assert layout.heads % layout.kv_heads == 0 and layout.dim % 4 == 0 and layout.dim <= LARGEST_DIM
        self.library = library
        self.layout = layout
        self.tokens = tokens
        self._segments = bytearray(_SEGMENT.size * tokens)
        items = torch.empty(_ITEM_BYTES * (tokens + _APART), dtype=torch.uint8)
        slots = torch.empty(tokens, dtype=torch.int32)
        stride = -(-layout.size // 64) * 64 + 32
        partials = _PARTIAL_BYTES // 4 // stride
        partial = torch.empty(partials * stride)
        done = torch.zeros(_APART * layout.kv_heads, dtype=torch.int32)
        self._memory = items, slots, partial, done
        self._struct = StepStruct(
            segment=ctypes.addressof(ctypes.c_char.from_buffer(self._segments)),
            item=items.data_ptr(),
            slot=slots.data_ptr(),
            partial=partial.data_ptr(),
            done=done.data_ptr(),
            partials=partials,
            apart=_APART,
            heads=layout.heads,
            kv_heads=layout.kv_heads,
            window=layout.window or 0,
        )
        self.address = ctypes.addressof(self._struct)
        self._blocks: list[array[int]] = []

    def plan(self, segments: Iterable[tuple[int, int, Sequence[int]]]) -> None:
        """For each segment, in the order of the token axis: tokens before it, its own, and the request's pages.

        Pages in an ``array("i")`` are read where they are: it may change only after the step.
        """
        self._blocks.clear()
        at = tokens = 0
        for start, length, blocks in segments:
            table = blocks if isinstance(blocks, array) else array("i", blocks)
            assert table.typecode == "i" and len(table) * PAGE >= start + length
            tokens += length
            assert tokens <= self.tokens
            _SEGMENT.pack_into(self._segments, at, table.buffer_info()[0], start, length)
            at += _SEGMENT.size
            self._blocks.append(table)
        self._struct.segments = len(self._blocks)
        self.library.plan(ctypes.c_void_p(self.address), torch.get_num_threads())


def angles(
    library: Library, positions: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows], float32 [half] → cos and sin of their products, times ``factor``: each float32 [rows, half]."""
    rows, half = len(positions), len(frequencies)
    cos, sin = empty(rows, half), empty(rows, half)
    op = Angles(
        Kind.ANGLES,
        rows,
        positions=positions.data_ptr(),
        frequencies=frequencies.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        stride=cos.stride(0),
        half=half,
        factor=factor,
    )
    run(library, op, positions, frequencies)
    return cos, sin


def turn(
    step: Step,
    pages: torch.Tensor,
    qkv: torch.Tensor,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Norm and rotate the heads of q and k in ``qkv`` float32 [rows, layout.width], in place; store k and v.

    norm: float32 [heads + kv heads, dim], for RMSNorm. angles: cos and sin; dimension i turns against i + half.
    scales: what E4M3 and E5M2 divide keys and values by; where a token's don't fit, they have a larger one.
    """
    layout = step.layout
    assert qkv.dtype == torch.float32 and qkv.shape[1] == layout.width
    assert qkv.stride(1) == 1 and pages.shape[1:] == (layout.kv_heads, layout.page) and pages.is_contiguous()
    assert norm is None or (norm.is_contiguous() and norm.shape == (layout.heads + layout.kv_heads, layout.dim))
    cos, sin = (None, None) if angles is None else angles
    op = Turn(
        Kind.TURN,
        qkv.shape[0],
        **_paged(step, pages),
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        cos=address(cos),
        sin=address(sin),
        norm=address(norm),
        eps=eps,
        key_scale=scales[0],
        value_scale=scales[1],
    )
    if cos is not None and sin is not None:
        assert cos.stride() == sin.stride() and cos.stride(1) == 1 and 2 * cos.shape[1] <= layout.dim
        op.angle_stride, op.half = cos.stride(0), cos.shape[1]
    run(step.library, op, step, pages, norm)


def attend(
    step: Step,
    pages: torch.Tensor,
    q: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's softmax(scale · q k) v over what it sees.

    slopes: float32 [heads], what a score loses with each position between key and query. q: float32 [rows, heads · dim,
    or more, which is not read] → [rows, heads · size].

    A row's result is bit-equal whatever else the step holds, however the request was cut, whatever the threads.
    """
    layout = step.layout
    assert q.dtype == torch.float32 and q.shape[1] >= layout.heads * layout.dim and q.stride(1) == 1
    out = empty(q.shape[0], layout.heads * layout.size)
    op = Attend(
        Kind.ATTEND,
        q.shape[0],
        **_paged(step, pages),
        q=q.data_ptr(),
        q_stride=q.stride(0),
        slopes=address(slopes),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        scale=scale,
        softcap=softcap or 0.0,
    )
    run(step.library, op, step, pages, slopes)
    return out


def _paged(step: Step, pages: torch.Tensor) -> dict[str, int]:
    """The fields that all operations on pages have."""
    layout = step.layout
    return {
        "step": step.address,
        "pages": pages.data_ptr(),
        "page": layout.page,
        "values": layout.values,
        "form": layout.form,
        "dim": layout.dim,
        "size": layout.size,
        "latent": layout.latent > 0,
    }
