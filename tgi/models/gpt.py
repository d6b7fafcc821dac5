"""Decoders of GPT's lineage: LayerNorms, and where tokens stand told by a learned embedding, by rotation or by ALiBi.

Attention and MLP stand one behind the other, or side by side, both of the residual stream as it was. Norms are taken of
what goes into them, or of the stream when they have added to it.
"""

from dataclasses import replace

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.attention import SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.linear import ColumnLinear
from tgi.layers.mlp import GatedMLP, PlainMLP
from tgi.layers.moe import MoE
from tgi.layers.norm import LayerNorm
from tgi.layers.rotary import Angles, Rotaries
from tgi.models.config import GptConfig


class GptDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    static = True

    def __init__(self, config: GptConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape, names = config.shape, config.names
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        heads, kv_heads = checkpoint.group.heads(shape.heads, shape.kv_heads)
        scale, softcap = config.attention_scale, config.softcap
        slopes = None if config.slopes is None else config.slopes[heads.start : heads.stop]
        self.specs = [
            AttnSpec(len(heads), len(kv_heads), shape.head_dim, scale, window, softcap, slopes)
            for window in config.windows
        ]
        vocabulary = replace(shape, hidden=config.embedding or shape.hidden)
        self._embed = VocabEmbedding.load(checkpoint, names.embed, shape.vocab, vocabulary.hidden)
        self._project_in = self._project_out = None
        if config.embedding is not None:
            sizes = shape.hidden, vocabulary.hidden
            self._project_in = ColumnLinear.whole(checkpoint, names.project_in, *sizes, bias=False)
            self._project_out = ColumnLinear.whole(checkpoint, names.project_out, *sizes[::-1], bias=False)
        self._places = None
        if names.positions:
            rows = shape.max_position_embeddings + config.first_position
            self._places = VocabEmbedding.load(checkpoint, names.positions, rows, shape.hidden)
        self._first_position = config.first_position
        self._embed_norm = _norm(checkpoint, names.embed_norm, config) if names.embed_norm else None
        self._head = LmHead.load(
            checkpoint, names.head, vocabulary, self._embed, config.logit_factor, bias=config.head_bias
        )
        self.head = self._head.native
        ropes = (None,) * shape.layers if names.positions else config.ropes
        self._rotaries = Rotaries(ropes, shape.head_dim, reach, checkpoint.device, checkpoint.library)
        self._layers = [GptLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = _norm(checkpoint, names.final_norm, config) if names.final_norm else None

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden], ready for ``logits``."""
        x = self._embed(token_ids)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._places is not None:
            self._places.add(x, positions, self._first_position)
        if self._embed_norm is not None:
            x = self._embed_norm(x)
        for layer, angles in zip(self._layers, self._rotaries.angles(positions), strict=True):
            layer.run(x, angles, attend)
        if self._norm is not None:
            x = self._norm(x)
        return x if self._project_out is None else self._project_out(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        return self._head(hidden)


class GptLayer:
    """Attention and MLP, each with a norm before or behind it, or one norm before both."""

    def __init__(self, config: GptConfig, checkpoint: Checkpoint, index: int) -> None:
        shape, names = config.shape, config.names
        name = names.layer.format(index, index + 1)
        self._attention = SelfAttention.load(
            checkpoint,
            f"{name}.{names.attention}",
            index,
            shape,
            config.qkv,
            o=names.o,
            bias=config.qkv_bias,
            o_bias=config.o_bias,
            norm=config.qk_norm,
            eps=config.eps,
            clip=config.clip_qkv,
        )
        self._mlp: GatedMLP | PlainMLP | MoE
        if config.experts is not None:
            self._mlp = MoE.load(checkpoint, name, shape, config.experts, config.activation)
        elif config.gated:
            self._mlp = GatedMLP.load(checkpoint, f"{name}.mlp", shape, config.activation)
        else:
            self._mlp = PlainMLP.load(
                checkpoint,
                shape,
                config.activation,
                up=f"{name}.{names.up}",
                down=f"{name}.{names.down}",
                bias=config.mlp_bias,
                transposed=config.qkv.transposed,
            )
        self._norm = _norm(checkpoint, f"{name}.{names.norm}", config)
        self._mlp_norm = _norm(checkpoint, f"{name}.{names.mlp_norm}", config) if config.two_norms else self._norm
        in_turn = self._norms_behind if config.norms_behind else self._in_turn
        self.run = self._side_by_side if config.parallel else in_turn
        """(x [tokens, hidden], angles, attend): add this layer's work to x in place."""

    def _side_by_side(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        before = self._norm(x)
        other = before if self._mlp_norm is self._norm else self._mlp_norm(x)
        self._attention.add(x, before, angles, attend, 1.0)
        self._mlp.add(x, other, 1.0)

    def _in_turn(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        self._attention.add(x, self._norm(x), angles, attend, 1.0)
        self._mlp.add(x, self._mlp_norm(x), 1.0)

    def _norms_behind(self, x: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        self._attention.add(x, x, angles, attend, 1.0)
        self._norm.replace(x)
        self._mlp.add(x, x, 1.0)
        self._mlp_norm.replace(x)


def _norm(checkpoint: Checkpoint, name: str, config: GptConfig) -> LayerNorm:
    return LayerNorm.load(
        checkpoint,
        name,
        config.shape.hidden,
        config.eps,
        weight=config.norm_weight,
        bias=config.norm_bias,
        offset=config.norm_offset,
    )
