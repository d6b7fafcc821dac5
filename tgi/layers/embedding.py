"""The vocabulary at both ends of a model: token ids to rows, hidden states to logits."""

import torch

from tgi.core.model_config import ModelShape
from tgi.kernels.program import empty
from tgi.kernels.sampling import Head
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, NativeLinear


class VocabEmbedding:
    """One row per token, times ``factor``."""

    __slots__ = ("_begin", "_factor", "_group", "table")

    def __init__(self, table: torch.Tensor | NativeLinear, group: Group, factor: float, begin: int) -> None:
        """``begin``: the first row that this rank's ``table`` has."""
        self.table = table
        self._group = group
        self._factor = factor
        self._begin = begin

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, vocab: int, hidden: int, factor: float = 1.0) -> "VocabEmbedding":
        group, piece = checkpoint.group, _piece(checkpoint, name, vocab, hidden)
        begin = group.shard(vocab).start
        if checkpoint.library is not None:
            return cls(checkpoint.vocabulary.native(checkpoint.library, [piece]), group, factor, begin)
        return cls(checkpoint.table([piece]), group, factor, begin)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] → [tokens, hidden], freshly allocated."""
        return self._group.all_reduce(self._own(token_ids, 0))

    def add(self, into: torch.Tensor, ids: torch.Tensor, first: int = 0) -> None:
        """Add the rows ``first + ids`` to ``into`` [tokens, hidden]."""
        if self._group.size == 1 and isinstance(self.table, NativeLinear):
            self.table.add_rows(into, ids, first)
        else:
            self._group.add(into, self._own(ids, first), 1.0)

    def _own(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Of the rows ``first + ids`` those that this rank has, zeros for the others."""
        if isinstance(self.table, NativeLinear):
            return self.table.rows(ids, self._factor, first - self._begin)
        if self._group.size == 1:
            rows = self.table.index_select(0, ids + first if first else ids)
        else:
            ids = ids + (first - self._begin)
            others = (ids < 0) | (ids >= len(self.table))
            rows = self.table.index_select(0, ids.masked_fill(others, 0)).masked_fill_(others[:, None], 0)
        return rows if self._factor == 1.0 else rows.mul_(self._factor)


class LmHead:
    """Hidden states to one score per token of the vocabulary."""

    __slots__ = ("_cap", "_factor", "_group", "_scores", "_widths", "method")

    def __init__(self, method: LinearMethod, group: Group, vocab: int, factor: float = 1.0, cap: float = 0.0) -> None:
        """``factor``: on all scores. ``cap``: if not 0, they become cap · tanh(score / cap)."""
        self.method = method
        self._group = group
        self._widths = group.widths(vocab)
        self._factor = factor
        self._cap = cap
        self._scores = torch.empty(0, 0)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        shape: ModelShape,
        embedding: VocabEmbedding,
        factor: float = 1.0,
        cap: float = 0.0,
        *,
        bias: bool = False,
    ) -> "LmHead":
        """The module ``name`` or, where the two are tied, the embedding's own rows; a method of torch's that packs its
        weight keeps a copy of them."""
        method: LinearMethod
        if shape.tied:
            table = embedding.table
            method = table if isinstance(table, NativeLinear) else checkpoint.dense(table, None)
        else:
            piece = _piece(checkpoint, name, shape.vocab, shape.hidden)
            method = checkpoint.vocabulary.linear([piece], bias=bias)
        return cls(method, checkpoint.group, shape.vocab, factor, cap)

    @property
    def native(self) -> Head | None:
        """What the scores are, if our own kernels make them and this rank has all."""
        if not isinstance(self.method, NativeLinear) or self._group.size > 1:
            return None
        return Head(self.method.panels, self.method.bias, self._factor, self._cap)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        if not isinstance(self.method, NativeLinear):
            scores = self._group.gather(self.method(hidden), self._widths).float()
            scores = scores if self._factor == 1.0 else scores.mul_(self._factor)
            return scores if self._cap == 0 else scores.div_(self._cap).tanh_().mul_(self._cap)
        # Kept from step to step: tens of megabytes of fresh memory would cost more than many a step's sampling.
        if len(self._scores) < len(hidden):
            self._scores = empty(len(hidden), self.method.panels.outs)
        scores = self._scores[: len(hidden)]
        self.method.write(scores, hidden, self._factor, self._cap)
        return self._group.gather(scores, self._widths)


def _piece(checkpoint: Checkpoint, name: str, vocab: int, hidden: int) -> Piece:
    """This rank's rows of a [vocab, hidden] matrix."""
    return Piece(name, (vocab, hidden), [checkpoint.group.shard(vocab)], slice(0, hidden))
