"""Linear layers by how their matrix is sliced over ranks. The multiplication itself is their ``method``."""

from collections.abc import Mapping, Sequence

import torch

from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.quantization.base import LinearMethod


class ColumnLinear:
    """Matrices that share an input, as one product; each rank holds some rows of every block.

    ``parts`` maps a checkpoint's module names to the row blocks stacked in it: ``{"q": (64,), "k": (32,), "v": (32,)}``
    and ``{"qkv": (64, 32, 32)}`` load the same layer. The output holds the blocks side by side in this order.
    ``gated``: there are two blocks, gate and up, and the layer is only asked to ``gate``.
    """

    __slots__ = ("gate", "method")

    def __init__(self, method: LinearMethod) -> None:
        self.method = method
        self.gate = method.gate

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        parts: Mapping[str, tuple[int, ...]],
        columns: int,
        *,
        bias: bool,
        gated: bool = False,
        transposed: bool = False,
    ) -> "ColumnLinear":
        pieces = []
        for name, blocks in parts.items():
            rows, first = [], 0
            for block in blocks:
                shard = checkpoint.group.shard(block)
                rows.append(slice(first + shard.start, first + shard.stop))
                first += block
            pieces.append(Piece(name, (first, columns), rows, slice(0, columns), transposed))
        return cls(checkpoint.linear(pieces, bias=bias, gated=gated))

    @classmethod
    def of(cls, checkpoint: Checkpoint, pieces: Sequence[Piece], *, bias: bool) -> "ColumnLinear":
        """This rank's rows, chosen already."""
        return cls(checkpoint.linear(pieces, bias=bias))

    @classmethod
    def whole(cls, checkpoint: Checkpoint, name: str, rows: int, columns: int, *, bias: bool) -> "ColumnLinear":
        """All rows of a module, on every rank."""
        return cls.of(checkpoint, [Piece(name, (rows, columns), [slice(0, rows)], slice(0, columns))], bias=bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.method(x)


class RowLinear:
    """Takes what a ColumnLinear left sliced; each rank holds some columns and the products are summed.

    The bias is added by rank 0 alone.
    """

    __slots__ = ("_group", "method")

    def __init__(self, method: LinearMethod, checkpoint: Checkpoint) -> None:
        self.method = method
        self._group = checkpoint.group

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        rows: int,
        columns: int,
        *,
        bias: bool,
        transposed: bool = False,
        own: slice | None = None,
    ) -> "RowLinear":
        """``own``: this rank's columns, if they aren't a run as even as it can be."""
        group = checkpoint.group
        piece = Piece(name, (rows, columns), [slice(0, rows)], own or group.shard(columns), transposed)
        if bias and group.rank:  # the sum has it once
            checkpoint.tensors.skip(f"{name}.bias", (rows,))
            bias = False
        return cls(checkpoint.linear([piece], bias=bias), checkpoint)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, columns] → [tokens, rows]."""
        return self._group.all_reduce(self.method(x))

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the product to ``into`` [tokens, rows]."""
        if self._group.size == 1:
            self.method.add(into, x, factor)
        else:
            self._group.add(into, self.method(x), factor)
