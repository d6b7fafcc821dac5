"""Decoders of Llama's lineage: RMSNorms before attention and MLP, behind them, or both; told apart by DenseConfig."""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.attention import SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.latent import LatentAttention
from tgi.layers.mlp import GatedMLP, PlainMLP
from tgi.layers.moe import MoE
from tgi.layers.norm import RMSNorm
from tgi.layers.residual import Stream
from tgi.layers.rotary import Angles, Rotaries
from tgi.models.config import DenseConfig


class DenseDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    static = True

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape = config.shape
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        self._triton = checkpoint.triton
        heads, kv_heads = checkpoint.group.heads(shape.heads, shape.kv_heads)
        scale, softcap = config.attention_scale, config.softcap
        slopes = None if config.slopes is None else config.slopes[heads.start : heads.stop]
        self.specs = [
            AttnSpec(len(heads), len(kv_heads), shape.head_dim, scale, window, softcap, slopes, shape.latent)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(
            checkpoint, "model.embed_tokens", shape.vocab, shape.hidden, config.embedding_multiplier
        )
        factor = 1 / config.logits_scaling
        self._head = LmHead.load(checkpoint, "lm_head", shape, self._embed, factor, config.logit_cap)
        self.head = self._head.native
        turning = shape.head_dim - shape.latent
        self._rotaries = Rotaries(config.ropes, turning, reach, checkpoint.device, checkpoint.library)
        self._layers = [DenseLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = RMSNorm.load(checkpoint, "model.norm", shape.hidden, config.eps, config.norm_offset)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden], normalised and ready for ``logits``."""
        stream = Stream(self._embed(token_ids), triton=self._triton)
        for layer, angles in zip(self._layers, self._rotaries.angles(positions), strict=True):
            layer(stream, angles, attend)
        return stream.seen(self._norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        return self._head(hidden)


class DenseLayer:
    """Attention and MLP, each adding to the residual stream."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, index: int) -> None:
        shape, norms = config.shape, config.norms
        name = f"model.layers.{index}"
        self._residual = config.residual_multiplier
        # A sum over ranks is added by itself anyway.
        self._sums = checkpoint.triton and checkpoint.group.size > 1

        def norm(module: str) -> RMSNorm | None:
            if not module:
                return None
            return RMSNorm.load(checkpoint, f"{name}.{module}", shape.hidden, config.eps, config.norm_offset)

        self._before_attention, self._behind_attention = norm(norms.before_attention), norm(norms.behind_attention)
        self._before_mlp, self._behind_mlp = norm(norms.before_mlp), norm(norms.behind_mlp)
        attention = f"{name}.self_attn"
        self._attention: SelfAttention | LatentAttention
        if config.latent is not None:
            self._attention = LatentAttention(checkpoint, attention, index, shape, config.latent)
        else:
            self._attention = SelfAttention.load(
                checkpoint,
                attention,
                index,
                shape,
                config.qkv,
                bias=config.qkv_bias,
                o_bias=config.o_bias,
                norm=config.qk_norm,
                eps=config.eps,
                norm_offset=config.norm_offset,
                clip=config.clip_qkv,
            )
        self._mlp: GatedMLP | PlainMLP | MoE
        mlp = f"{name}.mlp"
        if config.experts is not None and config.experts.layers[index]:
            self._mlp = MoE.load(checkpoint, name, shape, config.experts, config.activation)
        elif config.gated:
            self._mlp = GatedMLP.load(
                checkpoint, mlp, shape, config.activation, bias=config.mlp_bias, packed=config.packed
            )
        else:
            self._mlp = PlainMLP.load(
                checkpoint, shape, config.activation, up=f"{mlp}.up_proj", down=f"{mlp}.down_proj", bias=config.mlp_bias
            )

    def __call__(self, stream: Stream, angles: Angles | None, attend: Attend) -> None:
        """Add this layer's work to the stream."""
        seen, norm = stream.seen(self._before_attention), self._behind_attention
        if isinstance(self._attention, LatentAttention) or (norm is None and not self._sums):
            assert norm is None, "it adds what it makes"
            self._attention.add(stream.x, seen, angles, attend, self._residual)
        else:
            stream.add(self._attention(seen, angles, attend), self._residual, norm)
        seen, norm = stream.seen(self._before_mlp), self._behind_mlp
        if isinstance(self._mlp, MoE) or (norm is None and not self._sums):
            assert norm is None, "experts add what they make"
            self._mlp.add(stream.x, seen, self._residual)
        else:
            stream.add(self._mlp(seen), self._residual, norm)
