"""Self-attention around the cache: the projections, and what happens to q and k between them and attention."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import rms_norm

from tgi.attention.base import Attend
from tgi.core.model_config import ModelShape, QkNorm, Qkv
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.norm import LayerNorm, SharedNorm
from tgi.layers.rotary import Angles, rotate
from tgi.parallel import Group


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over every head of q and k at once, each kind with its own weight."""

    weight: torch.Tensor
    """[heads + kv heads, head dim]."""
    eps: float

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """[tokens, heads + kv heads, head dim] → the same."""
        return rms_norm(heads, heads.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Turn:
    """One layer's share of a step: how q, k and v are made of the projection. A kernel may read the fields instead."""

    heads: int
    kv_heads: int
    angles: Angles | None
    norm: HeadNorm | None
    latent: int = 0
    """As in AttnSpec."""
    scales: tuple[float, float] = (1.0, 1.0)
    sinks: torch.Tensor | None = None
    """As in attention.base."""

    def __call__(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in attention.base."""
        turned = self.heads + self.kv_heads
        packed = qkv.view(qkv.shape[0], turned if self.latent else turned + self.kv_heads, -1)
        turning, v = packed[:, :turned], packed[:, -self.kv_heads :, -self.latent :]
        if self.norm is not None:
            turning = self.norm(turning)
        if self.angles is not None:
            turning = rotate(turning, self.angles)
        return turning[:, : self.heads], turning[:, self.heads :], v


def cache_scales(checkpoint: Checkpoint, name: str) -> tuple[float, float]:
    """Turn's ``scales`` of the module ``name``."""
    for names in (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")):
        key, value = (checkpoint.tensors.factor(f"{name}.{each}") for each in names)
        if key is not None or value is not None:
            return key or 1.0, value or 1.0
    both = checkpoint.tensors.factor(f"{name}.kv_scale") or 1.0
    return both, both


def _pieces(name: str, shape: ModelShape, qkv: Qkv, group: Group) -> list[Piece]:
    """This rank's rows of q, then of k, then of v, head by head."""
    dim = shape.head_dim
    shared = shape.heads // shape.kv_heads
    counts = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    heads, kv_heads = group.heads(shape.heads, shape.kv_heads)
    own = {"q": heads, "k": kv_heads, "v": kv_heads}

    def first(kinds: str, kind: str, head: int) -> int:
        """Row where a head begins in the module that holds ``kinds``."""
        if qkv.order == "stacked":
            return (head + sum(counts[above] for above in kinds[: kinds.index(kind)])) * dim
        # In groups: the query heads of a kv head, then its key and its value.
        if kind == "q":
            return (head // shared * (shared + 2) + head % shared) * dim
        return (head * (shared + 2) + shared + (kind == "v")) * dim

    def rows(kinds: str, kind: str) -> list[slice]:
        found: list[slice] = []
        for head in own[kind]:
            at = first(kinds, kind, head)
            if qkv.pairs and kind != "v":
                turning = at + qkv.pairs
                found += slice(at, turning, 2), slice(at + 1, turning, 2)
                if qkv.pairs < dim:
                    found.append(slice(turning, at + dim))
            elif found and found[-1].stop == at:
                found[-1] = slice(found[-1].start, at + dim)
            else:
                found.append(slice(at, at + dim))
        return found

    held = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}[len(qkv.names)]
    return [
        Piece(
            f"{name}.{module}",
            (sum(counts[kind] for kind in kinds) * dim, shape.hidden),
            [run for kind in kinds for run in rows(kinds, kind)],
            slice(0, shape.hidden),
            qkv.transposed,
        )
        for module, kinds in zip(qkv.names, held, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class QkNorms:
    """What q and k are normed by."""

    turned: HeadNorm | None = None
    """In one go with their rotation."""
    before: tuple[tuple[slice, SharedNorm | LayerNorm], ...] = ()
    """Before it: columns of the projection, and the norm that replaces them."""

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, shape: ModelShape, qkv: Qkv, norm: QkNorm, eps: float, offset: float
    ) -> "QkNorms":
        """Those of the module ``name``. ``offset``: what the checkpoint leaves away from the weights."""
        group, library, dim = checkpoint.group, checkpoint.library, shape.head_dim
        # As the rows of the projection.
        order = [*range(0, qkv.pairs, 2), *range(1, qkv.pairs, 2), *range(qkv.pairs, dim)]

        def both(suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
            """Of q and k, [heads, head dim] each."""
            q, k = (
                _by_head(checkpoint, f"{name}.{kind}_{norm.name}", suffix, heads, dim, norm.weights)[:, order]
                for kind, heads in (("q", shape.heads), ("k", shape.kv_heads))
            )
            return q, k

        ranks = [group.heads(shape.heads, shape.kv_heads, rank) for rank in range(group.size)]

        def own(parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            """[this rank's heads + kv heads, head dim]."""
            return torch.cat([part[[*heads]] for part, heads in zip(parts, ranks[group.rank], strict=True)])

        weights = both("weight")
        if norm.center:
            weight, bias = own(weights) + offset, own(both("bias")) if norm.bias else None
            return cls(before=((slice(0, weight.numel()), LayerNorm(weight, bias, eps, library)),))
        if norm.weights != "whole":
            return cls(turned=HeadNorm(own(weights) + offset, eps))
        found, at = [], 0
        for part, of_ranks in zip(weights, zip(*ranks, strict=True), strict=True):
            # Of a head there may be copies: as many as of any other, so that the mean is the same.
            held = [head for heads in of_ranks for head in heads]
            if len({held.count(head) for head in held}) > 1:
                raise ValueError(f"{group.size} ranks can't norm {len(part)} kv heads as one")
            whole = part[held].flatten() + offset
            widths = [len(heads) * dim for heads in of_ranks]
            columns = slice(at, at + widths[group.rank])
            found.append((columns, SharedNorm(whole, eps, group, widths, library)))
            at = columns.stop
        return cls(before=tuple(found))


def _by_head(checkpoint: Checkpoint, name: str, suffix: str, heads: int, dim: int, weights: str) -> torch.Tensor:
    """[heads, dim] of a norm's weights or biases."""
    match weights:
        case "shared":
            return checkpoint.vector(f"{name}.{suffix}", dim).expand(heads, -1)
        case "modules":
            return torch.stack([checkpoint.vector(f"{name}.norms.{head}.{suffix}", dim) for head in range(heads)])
        case "heads":
            return checkpoint.vector(f"{name}.{suffix}", heads, dim)
    return checkpoint.vector(f"{name}.{suffix}", heads * dim).view(heads, dim)


class SelfAttention:
    """One layer's attention: o(attend(qkv(x)))."""

    __slots__ = ("_clip", "_heads", "_index", "_kv_heads", "_norms", "_o", "_qkv", "_scales")

    def __init__(
        self,
        index: int,
        shape: ModelShape,
        qkv: ColumnLinear,
        o: RowLinear,
        norms: QkNorms,
        clip: float | None,
        scales: tuple[float, float],
    ) -> None:
        """``index``: of the layer. ``shape``: with this rank's heads. ``clip``: the most that q, k and v may be.
        ``scales``: as in Turn."""
        self._index = index
        self._heads, self._kv_heads = shape.heads, shape.kv_heads
        self._qkv = qkv
        self._o = o
        self._norms = norms
        self._clip = clip
        self._scales = scales

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        index: int,
        shape: ModelShape,
        qkv: Qkv = Qkv(),  # noqa: B008  # frozen
        *,
        o: str = "o_proj",
        bias: bool = False,
        o_bias: bool = False,
        norm: QkNorm | None = None,
        eps: float = 0.0,
        norm_offset: float = 0.0,
        clip: float | None = None,
    ) -> "SelfAttention":
        """The projections of the module ``name``, as ``qkv`` tells; ``o``: the last one's name.

        ``eps``, ``norm_offset``: of ``norm``, as in QkNorms.
        """
        heads, kv_heads = checkpoint.group.heads(shape.heads, shape.kv_heads)
        pieces = _pieces(name, shape, qkv, checkpoint.group)
        return cls(
            index,
            replace(shape, heads=len(heads), kv_heads=len(kv_heads)),
            ColumnLinear.of(checkpoint, pieces, bias=bias),
            RowLinear.load(
                checkpoint,
                f"{name}.{o}",
                shape.hidden,
                shape.heads * shape.head_dim,
                bias=o_bias,
                transposed=qkv.transposed,
                own=slice(heads.start * shape.head_dim, heads.stop * shape.head_dim),
            ),
            QkNorms() if norm is None else QkNorms.load(checkpoint, name, shape, qkv, norm, eps, norm_offset),
            clip,
            cache_scales(checkpoint, name),
        )

    def __call__(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        return self._o(self._attended(x, angles, attend))

    def add(self, into: torch.Tensor, x: torch.Tensor, angles: Angles | None, attend: Attend, factor: float) -> None:
        """Add ``factor`` times the result to ``into``."""
        self._o.add(into, self._attended(x, angles, attend), factor)

    def _attended(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> torch.Tensor:
        qkv = self._qkv(x) if self._clip is None else self._qkv.method.clipped(x, self._clip)
        for columns, norm in self._norms.before:
            norm.replace(qkv[:, columns])
        turn = Turn(self._heads, self._kv_heads, angles, self._norms.turned, scales=self._scales)
        return attend(self._index, qkv, turn)
