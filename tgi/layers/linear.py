"""Linear layers by how their matrix is sliced over ranks. The multiplication itself is their ``method``."""

from collections.abc import Mapping

import torch

from tgi.layers.checkpoint import Checkpoint
from tgi.quantization.base import LinearMethod, dense


class ColumnLinear:
    """Matrices that share an input, as one product; each rank holds some rows of every block.

    ``parts`` maps a checkpoint's module names to the row blocks stacked in it: ``{"q": (64,), "k": (32,), "v": (32,)}``
    and ``{"qkv": (64, 32, 32)}`` load the same layer. The output holds the blocks side by side in this order.
    """

    __slots__ = ("method",)

    def __init__(self, method: LinearMethod) -> None:
        self.method = method

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, parts: Mapping[str, tuple[int, ...]], columns: int, *, bias: bool
    ) -> "ColumnLinear":
        group = checkpoint.group
        rows = sum(group.shard(block).stop - group.shard(block).start for blocks in parts.values() for block in blocks)
        weight = checkpoint.empty(rows, columns)
        offset = checkpoint.empty(rows) if bias else None
        at = 0
        for name, blocks in parts.items():
            stored = checkpoint.tensors.take(f"{name}.weight", (sum(blocks), columns))
            biases = checkpoint.tensors.take(f"{name}.bias", (sum(blocks),)) if bias else None
            first = 0
            for block in blocks:
                shard = group.shard(block)
                source = slice(first + shard.start, first + shard.stop)
                target = slice(at, at + shard.stop - shard.start)
                weight[target].copy_(stored[source])
                if offset is not None and biases is not None:
                    offset[target].copy_(biases[source])
                first, at = first + block, target.stop
        return cls(dense(weight, offset))

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
    def load(cls, checkpoint: Checkpoint, name: str, rows: int, columns: int, *, bias: bool) -> "RowLinear":
        shard = checkpoint.group.shard(columns)
        weight = checkpoint.empty(rows, shard.stop - shard.start)
        weight.copy_(checkpoint.tensors.take(f"{name}.weight", (rows, columns))[:, shard])
        offset = checkpoint.vector(f"{name}.bias", rows) if bias else None
        return cls(dense(weight, offset if checkpoint.group.rank == 0 else None), checkpoint)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.all_reduce(self.method(x))
