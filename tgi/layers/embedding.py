"""The vocabulary at both ends of a model: token ids to rows, hidden states to logits."""

import torch

from tgi.layers.checkpoint import Checkpoint
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, dense


class VocabEmbedding:
    """One row per token."""

    __slots__ = ("_group", "table")

    def __init__(self, table: torch.Tensor, group: Group) -> None:
        self.table = table
        self._group = group

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, vocab: int, hidden: int) -> "VocabEmbedding":
        return cls(_rows(checkpoint, name, vocab, hidden), checkpoint.group)

    def scaled(self, factor: float) -> "VocabEmbedding":
        """A copy with every row multiplied, so that the forward need not."""
        return VocabEmbedding(self.table * factor, self._group)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] → [tokens, hidden], freshly allocated."""
        return self._group.all_reduce(self.table.index_select(0, token_ids))


class LmHead:
    """Hidden states to one score per token of the vocabulary."""

    __slots__ = ("_group", "method")

    def __init__(self, method: LinearMethod, group: Group) -> None:
        self.method = method
        self._group = group

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, vocab: int, hidden: int) -> "LmHead":
        return cls(dense(_rows(checkpoint, name, vocab, hidden), None), checkpoint.group)

    @classmethod
    def tie(cls, embedding: VocabEmbedding, group: Group) -> "LmHead":
        """The embedding's own rows; a method that packs its weight keeps a copy."""
        return cls(dense(embedding.table, None), group)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab]."""
        return self._group.all_gather(self.method(hidden)).float()


def _rows(checkpoint: Checkpoint, name: str, vocab: int, hidden: int) -> torch.Tensor:
    """This rank's rows of a [vocab, hidden] matrix."""
    shard = checkpoint.group.shard(vocab)
    rows = checkpoint.empty(shard.stop - shard.start, hidden)
    return rows.copy_(checkpoint.tensors.take(f"{name}.weight", (vocab, hidden))[shard])
