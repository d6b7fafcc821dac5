"""Decoders of GPT's lineage: LayerNorms, and where tokens stand told by a learned embedding, by rotation or by ALiBi.

Attention and MLP stand one behind the other, or side by side, both of the residual stream as it was.
"""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.attention import SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.mlp import GatedMLP, PlainMLP
from tgi.layers.norm import LayerNorm
from tgi.layers.rotary import Angles, Rotary
from tgi.models.config import GptConfig


class GptDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    def __init__(self, config: GptConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape, names = config.shape, config.names
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        self.specs = [
            AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale, window, slopes=config.slopes)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(checkpoint, names.embed, shape.vocab, shape.hidden)
        self._places = None
        if names.positions:
            rows = shape.max_position_embeddings + config.first_position
            self._places = VocabEmbedding.load(checkpoint, names.positions, rows, shape.hidden)
        self._first_position = config.first_position
        norm = shape.hidden, config.eps
        self._embed_norm = None
        if names.embed_norm:
            self._embed_norm = LayerNorm.load(checkpoint, names.embed_norm, *norm, bias=config.norm_bias)
        self._head = LmHead.load(checkpoint, names.head, shape, self._embed, config.logit_factor, bias=config.head_bias)
        self.head = self._head.native
        self._rotary = None
        if config.slopes is None and not names.positions:
            self._rotary = Rotary(config.rope, shape.head_dim, reach, checkpoint.device, checkpoint.library)
        self._layers = [GptLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = LayerNorm.load(checkpoint, names.final_norm, *norm, bias=config.norm_bias)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden], normalised and ready for ``logits``."""
        x = self._embed(token_ids)
        if self._places is not None:
            self._places.add(x, positions, self._first_position)
        if self._embed_norm is not None:
            x = self._embed_norm(x)
        angles = None if self._rotary is None else self._rotary.angles(positions)
        for layer in self._layers:
            layer.run(x, angles, attend)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        return self._head(hidden)


class GptLayer:
    """Attention and MLP, each with a norm before it, or one norm before both."""

    def __init__(self, config: GptConfig, checkpoint: Checkpoint, index: int) -> None:
        shape, names = config.shape, config.names
        name = names.layer.format(index)
        turned = config.qkv.transposed
        self._attention = SelfAttention.load(
            checkpoint,
            f"{name}.{names.attention}",
            index,
            shape,
            config.qkv,
            o=names.o,
            bias=config.qkv_bias,
            o_bias=config.o_bias,
        )
        self._mlp: GatedMLP | PlainMLP
        if config.gated:
            self._mlp = GatedMLP.load(checkpoint, f"{name}.mlp", shape, config.activation)
        else:
            parts = {f"{name}.{names.up}": (shape.intermediate,)}
            self._mlp = PlainMLP(
                ColumnLinear.load(checkpoint, parts, shape.hidden, bias=config.mlp_bias, transposed=turned),
                RowLinear.load(
                    checkpoint,
                    f"{name}.{names.down}",
                    shape.hidden,
                    shape.intermediate,
                    bias=config.mlp_bias,
                    transposed=turned,
                ),
                config.activation,
            )
        norm = shape.hidden, config.eps
        self._norm = LayerNorm.load(checkpoint, f"{name}.{names.norm}", *norm, bias=config.norm_bias)
        self._mlp_norm = self._norm
        if config.two_norms:
            self._mlp_norm = LayerNorm.load(checkpoint, f"{name}.{names.mlp_norm}", *norm, bias=config.norm_bias)
        self.run = self._side_by_side if config.parallel else self._in_turn
        """(x [tokens, hidden], angles, attend): add this layer's work to x in place."""

    def _side_by_side(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        before = self._norm(x)
        other = before if self._mlp_norm is self._norm else self._mlp_norm(x)
        self._attention.add(x, before, angles, attend, 1.0)
        self._mlp.add(x, other, 1.0)

    def _in_turn(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        self._attention.add(x, self._norm(x), angles, attend, 1.0)
        self._mlp.add(x, self._mlp_norm(x), 1.0)
