"""Self-attention around the cache: the projections, and what happens to q and k between them and attention."""

from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

from tgi.attention.base import Attend
from tgi.core.model_config import ModelShape, Qkv
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.rotary import Angles, rotate
from tgi.parallel import Group


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over every head of q and k at once, each kind with its own weight."""

    weight: torch.Tensor
    """[heads + kv heads, head dim]."""
    eps: float

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        shape: ModelShape,
        eps: float,
        offset: float = 0.0,
    ) -> "HeadNorm":
        """``offset``: what the checkpoint leaves away from the weights."""
        q, k = (checkpoint.vector(f"{name}.{kind}_norm.weight", shape.head_dim) + offset for kind in "qk")
        return cls(torch.cat((q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1))), eps)

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


def _pieces(name: str, shape: ModelShape, qkv: Qkv, group: Group) -> list[Piece]:
    """This rank's rows of q, then of k, then of v, head by head."""
    dim, heads, kv_heads = shape.head_dim, shape.heads, shape.kv_heads
    shared = heads // kv_heads
    own = {"q": group.shard(heads), "k": group.shard(kv_heads), "v": group.shard(kv_heads)}

    def first(kind: str, head: int) -> int:
        """Row of a module where a head begins."""
        if qkv.order == "separate":
            return head * dim
        if qkv.order == "stacked":
            return (head + {"q": 0, "k": heads, "v": heads + kv_heads}[kind]) * dim
        # In groups: the query heads of a kv head, then its key and its value.
        if kind == "q":
            return (head // shared * (shared + 2) + head % shared) * dim
        return (head * (shared + 2) + shared + (kind == "v")) * dim

    def rows(kind: str) -> list[slice]:
        found: list[slice] = []
        for head in range(own[kind].start, own[kind].stop):
            at = first(kind, head)
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

    columns = slice(0, shape.hidden)
    if qkv.order == "separate":
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        return [
            Piece(f"{name}.{module}", (counts[kind] * dim, shape.hidden), rows(kind), columns, qkv.transposed)
            for kind, module in zip("qkv", qkv.names, strict=True)
        ]
    (module,) = qkv.names
    whole = (heads + 2 * kv_heads) * dim, shape.hidden
    return [Piece(f"{name}.{module}", whole, [*rows("q"), *rows("k"), *rows("v")], columns, qkv.transposed)]


class SelfAttention:
    """One layer's attention: o(attend(qkv(x)))."""

    __slots__ = ("_heads", "_index", "_kv_heads", "_norm", "_o", "_qkv")

    def __init__(
        self, index: int, shape: ModelShape, qkv: ColumnLinear, o: RowLinear, norm: HeadNorm | None = None
    ) -> None:
        """``index``: of the layer."""
        self._index = index
        self._heads, self._kv_heads = shape.heads, shape.kv_heads
        self._qkv = qkv
        self._o = o
        self._norm = norm

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
        norm: HeadNorm | None = None,
    ) -> "SelfAttention":
        """The projections of the module ``name``, as ``qkv`` tells; ``o``: the last one's name."""
        width = shape.heads * shape.head_dim
        pieces = _pieces(name, shape, qkv, checkpoint.group)
        return cls(
            index,
            shape,
            ColumnLinear.of(checkpoint, pieces, bias=bias),
            RowLinear.load(checkpoint, f"{name}.{o}", shape.hidden, width, bias=o_bias, transposed=qkv.transposed),
            norm,
        )

    def __call__(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        return self._o(self._attended(x, angles, attend))

    def add(self, into: torch.Tensor, x: torch.Tensor, angles: Angles | None, attend: Attend, factor: float) -> None:
        """Add ``factor`` times the result to ``into``."""
        self._o.add(into, self._attended(x, angles, attend), factor)

    def _attended(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> torch.Tensor:
        return attend(self._index, self._qkv(x), Turn(self._heads, self._kv_heads, angles, self._norm))
