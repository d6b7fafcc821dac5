"""Gemma 2 and 3: norms before and behind attention and MLP, and layers with a window between layers that see all.

Team Gemma, arXiv 2408.00118 and 2503.19786.
"""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.attention import HeadNorm, SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.mlp import GatedMLP
from tgi.layers.norm import RMSNorm
from tgi.layers.rotary import Angles, Rotary
from tgi.models.config import GemmaConfig


class GemmaDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    def __init__(self, config: GemmaConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape = config.shape
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        self.specs = [
            AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale, window, config.softcap)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(
            checkpoint, "model.embed_tokens", shape.vocab, shape.hidden, shape.hidden**0.5
        )
        self._head = LmHead.load(checkpoint, "lm_head", shape, self._embed, cap=config.logit_cap)
        self.head = self._head.native
        self._ropes = [
            Rotary(rope, shape.head_dim, reach, checkpoint.device, checkpoint.library)
            for rope in (config.rope, config.local_rope)
        ]
        self._layers = [GemmaLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = _norm(checkpoint, "model.norm", config)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden], normalised and ready for ``logits``."""
        x = self._embed(token_ids)
        whole, local = (rope.angles(positions) for rope in self._ropes)
        for layer, spec in zip(self._layers, self.specs, strict=True):
            layer(x, whole if spec.window is None else local, attend)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""
        return self._head(hidden)


class GemmaLayer:
    """Attention and MLP, the norm of each one's result added to the residual stream."""

    def __init__(self, config: GemmaConfig, checkpoint: Checkpoint, index: int) -> None:
        name = f"model.layers.{index}"
        attention = f"{name}.self_attn"
        norm = None
        if config.qk_norm:
            norm = HeadNorm.load(checkpoint, attention, config.shape, config.eps, offset=1.0)
        self._attention = SelfAttention.load(checkpoint, attention, index, config.shape, norm=norm)
        self._mlp = GatedMLP.load(checkpoint, f"{name}.mlp", config.shape, config.activation)
        self._before_attention = _norm(checkpoint, f"{name}.input_layernorm", config)
        self._behind_attention = _norm(checkpoint, f"{name}.post_attention_layernorm", config)
        self._before_mlp = _norm(checkpoint, f"{name}.pre_feedforward_layernorm", config)
        self._behind_mlp = _norm(checkpoint, f"{name}.post_feedforward_layernorm", config)

    def __call__(self, x: torch.Tensor, angles: Angles, attend: Attend) -> None:
        """Add this layer's work to ``x`` [tokens, hidden] in place."""
        self._behind_attention.add(x, self._attention(self._before_attention(x), angles, attend))
        self._behind_mlp.add(x, self._mlp(self._before_mlp(x)))


def _norm(checkpoint: Checkpoint, name: str, config: GemmaConfig) -> RMSNorm:
    return RMSNorm.load(checkpoint, name, config.shape.hidden, config.eps, offset=1.0)
