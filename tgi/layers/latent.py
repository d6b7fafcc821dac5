"""Attention over latent keys: one short vector a token is cached, of which all heads make their keys and values.

DeepSeek-AI, arXiv 2405.04434. The matrices that would make them are absorbed by what stands before and behind: queries
are led into the latent space, where they meet the cached vectors as they are, and results are led out of it.
"""

from dataclasses import replace
from typing import Protocol

import torch

from tgi.attention.base import Attend
from tgi.core.model_config import Latent, ModelShape
from tgi.kernels.library import Library
from tgi.kernels.program import empty
from tgi.kernels.rows import copy
from tgi.layers.attention import Turn, cache_scales
from tgi.layers.checkpoint import Checkpoint, Piece, Shared
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.norm import RMSNorm
from tgi.layers.rotary import Angles
from tgi.quantization.base import LinearMethod, NativeLinear

_EPS = 1e-6
"""Of the norms between the projections, whatever the config says of others."""


class Absorbed(Protocol):
    """What leads into the latent space and out of it: a matrix for each head, both ways."""

    def join(self, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Queries [tokens, heads · still + heads · turning], the key [tokens, turning + rank] → what Attend takes."""

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        """[tokens, heads · rank] → [tokens, heads · value]."""


class LatentAttention:
    """One layer's attention. A cached key is what turns, and behind it the latent vector, which is its value."""

    __slots__ = (
        *("_absorbed", "_heads", "_index", "_key", "_key_norm", "_latent", "_o", "_q", "_q_down", "_q_norm"),
        "_scales",
    )

    def __init__(self, checkpoint: Checkpoint, name: str, index: int, shape: ModelShape, latent: Latent) -> None:
        """The module ``name`` of the layer ``index``."""
        heads, _ = checkpoint.group.heads(shape.heads, 1)
        self._index = index
        self._latent = latent
        self._heads = len(heads)
        self._scales = cache_scales(checkpoint, name)
        self._q_down = self._q_norm = None
        inner, q = shape.hidden, "q_proj"
        if latent.q_rank is not None:
            self._q_down = ColumnLinear.whole(checkpoint, f"{name}.q_a_proj", latent.q_rank, inner, bias=latent.bias)
            self._q_norm = RMSNorm.load(checkpoint, f"{name}.q_a_layernorm", latent.q_rank, _EPS)
            inner, q = latent.q_rank, "q_b_proj"
        wide = latent.still + latent.turning
        still = [slice(head * wide, head * wide + latent.still) for head in heads]
        turning = [run for head in heads for run in _turning(latent, head * wide + latent.still)]
        rows = Piece(f"{name}.{q}", (shape.heads * wide, inner), [*still, *turning], slice(0, inner))
        self._q = ColumnLinear.of(checkpoint, [rows], bias=False)
        size = latent.rank + latent.turning, shape.hidden
        runs = [*_turning(latent, latent.rank), slice(0, latent.rank)]
        key = Piece(f"{name}.kv_a_proj_with_mqa", size, runs, slice(0, shape.hidden))
        self._key = ColumnLinear.of(checkpoint, [key], bias=latent.bias)
        self._key_norm = RMSNorm.load(checkpoint, f"{name}.kv_a_layernorm", latent.rank, _EPS)
        self._absorbed = _absorbed(checkpoint, f"{name}.kv_b_proj", shape.heads, heads, latent)
        self._o = RowLinear.load(
            checkpoint,
            f"{name}.o_proj",
            shape.hidden,
            shape.heads * latent.value,
            bias=latent.bias,
            own=slice(heads.start * latent.value, heads.stop * latent.value),
        )

    def add(self, into: torch.Tensor, x: torch.Tensor, angles: Angles | None, attend: Attend, factor: float) -> None:
        """Add ``factor`` times the result for x [tokens, hidden] to ``into``."""
        key = self._key(x)
        self._key_norm.replace(key[:, self._latent.turning :])
        if self._q_down is not None and self._q_norm is not None:
            x = self._q_norm(self._q_down(x))
        qkv = self._absorbed.join(self._q(x), key)
        attended = attend(self._index, qkv, Turn(self._heads, 1, angles, None, self._latent.rank, self._scales))
        self._o.add(into, self._absorbed.out(attended), factor)


class NativeAbsorbed:
    """Our own kernel, head by head."""

    def __init__(self, library: Library, latent: Latent, into: list[NativeLinear], out: list[NativeLinear]) -> None:
        self._library = library
        self._latent = latent
        self._into = into
        self._out = out

    def join(self, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        still, turning = self._latent.still, self._latent.turning
        wide, heads = key.shape[1], len(self._into)
        qkv = empty(len(q), (heads + 1) * wide)
        for head, linear in enumerate(self._into):
            at, place = heads * still + head * turning, head * wide
            copy(self._library, q[:, at : at + turning], qkv[:, place : place + turning])
            linear.write(qkv[:, place + turning : place + wide], q[:, head * still : (head + 1) * still], 1.0, 0.0)
        copy(self._library, key, qkv[:, heads * wide :])
        return qkv

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        rank, value = self._latent.rank, self._latent.value
        out = empty(len(attended), len(self._out) * value)
        for head, linear in enumerate(self._out):
            own = attended[:, head * rank : (head + 1) * rank]
            linear.write(out[:, head * value : (head + 1) * value], own, 1.0, 0.0)
        return out


class TorchAbsorbed:
    """All heads as one batched product."""

    def __init__(self, latent: Latent, into: torch.Tensor, out: torch.Tensor) -> None:
        """[heads, still, rank], [heads, rank, value]."""
        self._latent = latent
        self._into = into
        self._out = out

    def join(self, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        heads = len(self._into)
        qkv, still = _laid(self._latent, q, key, heads)
        qkv[:, :heads, self._latent.turning :] = torch.bmm(_by_head(still, heads), self._into).transpose(0, 1)
        return qkv.flatten(1)

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        return torch.bmm(_by_head(attended, len(self._out)), self._out).transpose(0, 1).flatten(1)


class SeparateAbsorbed:
    """Head by head, each a product of its own, whose rows don't know of each other."""

    def __init__(self, latent: Latent, into: list[LinearMethod], out: list[LinearMethod]) -> None:
        self._latent = latent
        self._into = into
        self._out = out

    def join(self, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        heads = len(self._into)
        qkv, still = _laid(self._latent, q, key, heads)
        for head, (linear, own) in enumerate(zip(self._into, still.chunk(heads, 1), strict=True)):
            qkv[:, head, self._latent.turning :] = linear(own)
        return qkv.flatten(1)

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        parts = attended.chunk(len(self._out), 1)
        return torch.cat([linear(own) for linear, own in zip(self._out, parts, strict=True)], 1)


def _laid(latent: Latent, q: torch.Tensor, key: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What Absorbed makes, [tokens, heads + 1, turning + rank], but for the queries' latent parts; and what these are
    to be made of, [tokens, heads · still]."""
    still, turned = q.tensor_split((heads * latent.still,), dim=1)
    qkv = q.new_empty(len(q), heads + 1, key.shape[1])
    qkv[:, :heads, : latent.turning] = turned.view(len(q), heads, latent.turning)
    qkv[:, heads] = key
    return qkv, still


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[tokens, heads · size] → [heads, tokens, size]."""
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def _turning(latent: Latent, at: int) -> list[slice]:
    """Rows of the dimensions that turn, which begin ``at``, so that each lies half of them apart from its partner."""
    end = at + latent.turning
    return [slice(at, end, 2), slice(at + 1, end, 2)] if latent.interleaved else [slice(at, end)]


def _absorbed(checkpoint: Checkpoint, name: str, heads: int, own: range, latent: Latent) -> Absorbed:
    """Of the module that makes keys and values, ``own`` heads out of ``heads``."""
    checkpoint = replace(checkpoint, tensors=Shared(checkpoint.tensors))
    wide, rank = latent.still + latent.value, latent.rank
    into, out = [], []
    for head in own:
        at = head * wide
        columns = slice(at, at + latent.still)
        into.append(Piece(name, (rank, heads * wide), [slice(0, rank)], columns, transposed=True))
        out.append(Piece(name, (heads * wide, rank), [slice(at + latent.still, at + wide)], slice(0, rank)))
    if checkpoint.library is None and checkpoint.fixed:
        methods = ([checkpoint.linear([piece], bias=False) for piece in pieces] for pieces in (into, out))
        return SeparateAbsorbed(latent, *methods)
    if checkpoint.library is None:
        # A method's weight is [out, in].
        first, second = (torch.stack([checkpoint.table([piece]).T for piece in pieces]) for pieces in (into, out))
        return TorchAbsorbed(latent, first, second)
    library = checkpoint.library
    first_native, second_native = ([checkpoint.native(library, [piece]) for piece in pieces] for pieces in (into, out))
    return NativeAbsorbed(library, latent, first_native, second_native)
