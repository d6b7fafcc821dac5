"""The pre-norm decoder with rotary attention and a gated MLP: Llama and its relatives, told apart by DenseConfig."""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.core.model_config import Qkv
from tgi.layers.attention import HeadNorm, SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.latent import LatentAttention
from tgi.layers.mlp import GatedMLP
from tgi.layers.moe import MoE
from tgi.layers.norm import RMSNorm
from tgi.layers.rotary import Angles, Rotary
from tgi.models.config import DenseConfig


class DenseDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape = config.shape
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        self.specs = [
            AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale, window, latent=shape.latent)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(
            checkpoint, "model.embed_tokens", shape.vocab, shape.hidden, config.embedding_multiplier
        )
        factor = 1 / config.logits_scaling
        self._head = LmHead.load(checkpoint, "lm_head", shape, self._embed, factor)
        self.head = self._head.native
        turning = shape.head_dim - shape.latent
        self._rotary = Rotary(config.rope, turning, reach, checkpoint.device, checkpoint.library)
        self._layers = [DenseLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = RMSNorm.load(checkpoint, "model.norm", shape.hidden, config.eps, config.norm_offset)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden], normalised and ready for ``logits``."""
        x = self._embed(token_ids)
        angles = self._rotary.angles(positions)
        for layer in self._layers:
            layer(x, angles, attend)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        return self._head(hidden)


class DenseLayer:
    """Attention and MLP, each adding to the residual stream."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, index: int) -> None:
        shape = config.shape
        name = f"model.layers.{index}"
        attention = f"{name}.self_attn"
        self._residual = config.residual_multiplier
        norm = shape.hidden, config.eps, config.norm_offset
        self._norm = RMSNorm.load(checkpoint, f"{name}.input_layernorm", *norm)
        self._attention: SelfAttention | LatentAttention
        if config.latent is not None:
            self._attention = LatentAttention(checkpoint, attention, index, shape, config.latent)
        else:
            self._attention = SelfAttention.load(
                checkpoint,
                attention,
                index,
                shape,
                Qkv(("qkv_proj",), "stacked") if config.packed else Qkv(),
                bias=config.qkv_bias,
                o_bias=config.o_bias,
                norm=HeadNorm.load(checkpoint, attention, shape, config.eps) if config.qk_norm else None,
            )
        self._mlp_norm = RMSNorm.load(checkpoint, f"{name}.post_attention_layernorm", *norm)
        self._mlp: GatedMLP | MoE
        if config.experts is not None and config.experts.layers[index]:
            self._mlp = MoE.load(checkpoint, name, shape, config.experts, config.activation)
        else:
            self._mlp = GatedMLP.load(
                checkpoint,
                f"{name}.mlp",
                shape,
                config.activation,
                bias=config.mlp_bias,
                packed=config.packed,
            )

    def __call__(self, x: torch.Tensor, angles: Angles, attend: Attend) -> None:
        """Add this layer's work to ``x`` [tokens, hidden] in place."""
        self._attention.add(x, self._norm(x), angles, attend, self._residual)
        self._mlp.add(x, self._mlp_norm(x), self._residual)
