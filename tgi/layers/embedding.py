"""The vocabulary at both ends of a model: token ids to rows, hidden states to logits."""

import torch

from tgi.core.model_config import ModelShape
from tgi.kernels.program import empty
from tgi.kernels.sampling import Head
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, NativeLinear, dense


class VocabEmbedding:
    """One row per token, times ``factor``."""

    __slots__ = ("_factor", "_group", "table")

    def __init__(self, table: torch.Tensor | NativeLinear, group: Group, factor: float) -> None:
        self.table = table
        self._group = group
        self._factor = factor

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, vocab: int, hidden: int, factor: float = 1.0) -> "VocabEmbedding":
        piece = _piece(checkpoint, name, vocab, hidden)
        if checkpoint.library is not None:
            return cls(_native(checkpoint, piece), checkpoint.group, factor)
        return cls(checkpoint.table([piece]), checkpoint.group, factor)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] → [tokens, hidden], freshly allocated."""
        if isinstance(self.table, NativeLinear):
            return self._group.all_reduce(self.table.rows(token_ids, self._factor))
        rows = self.table.index_select(0, token_ids)
        return self._group.all_reduce(rows if self._factor == 1.0 else rows.mul_(self._factor))

    def add(self, into: torch.Tensor, ids: torch.Tensor, first: int = 0) -> None:
        """Add the rows ``first + ids`` to ``into`` [tokens, hidden]."""
        if isinstance(self.table, NativeLinear):
            self.table.add_rows(into, ids, first)
        else:
            into.add_(self.table.index_select(0, ids + first))


class LmHead:
    """Hidden states to one score per token of the vocabulary."""

    __slots__ = ("_cap", "_factor", "_group", "_scores", "method")

    def __init__(self, method: LinearMethod, group: Group, factor: float = 1.0, cap: float = 0.0) -> None:
        """``factor``: on all scores. ``cap``: if not 0, they become cap · tanh(score / cap)."""
        self.method = method
        self._group = group
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
            method = table if isinstance(table, NativeLinear) else dense(table, None)
        else:
            piece = _piece(checkpoint, name, shape.vocab, shape.hidden)
            native = checkpoint.library is not None
            method = _native(checkpoint, piece, bias=bias) if native else checkpoint.linear([piece], bias=bias)
        return cls(method, checkpoint.group, factor, cap)

    @property
    def native(self) -> Head | None:
        """What the scores are, if our own kernels make them and this rank has all."""
        if not isinstance(self.method, NativeLinear) or self._group.size > 1:
            return None
        return Head(self.method.panels, self.method.bias, self._factor, self._cap)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        if not isinstance(self.method, NativeLinear):
            scores = self._group.all_gather(self.method(hidden)).float()
            scores = scores if self._factor == 1.0 else scores.mul_(self._factor)
            return scores if self._cap == 0 else scores.div_(self._cap).tanh_().mul_(self._cap)
        # Kept from step to step: tens of megabytes of fresh memory would cost more than many a step's sampling.
        if len(self._scores) < len(hidden):
            self._scores = empty(len(hidden), self.method.panels.outs)
        scores = self._scores[: len(hidden)]
        self.method.write(scores, hidden, self._factor, self._cap)
        return self._group.all_gather(scores)


def _piece(checkpoint: Checkpoint, name: str, vocab: int, hidden: int) -> Piece:
    """This rank's rows of a [vocab, hidden] matrix."""
    return Piece(name, (vocab, hidden), [checkpoint.group.shard(vocab)], slice(0, hidden))


def _native(checkpoint: Checkpoint, piece: Piece, *, bias: bool = False) -> NativeLinear:
    assert checkpoint.library is not None
    return checkpoint.vocabulary.native(checkpoint.library, [piece], checkpoint.bias([piece]) if bias else None)
