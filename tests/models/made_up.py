"""A family that nobody has: attention and MLP in turn, each scaled by a learned vector. All that it takes."""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.core.model_config import ModelShape, Raw
from tgi.layers.attention import SelfAttention
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.mlp import GatedMLP
from tgi.layers.norm import RMSNorm
from tgi.layers.rotary import Rotary
from tgi.models.config import DecoderConfig, Family


class MadeUpDecoder:
    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape = config.shape
        self.vocab_size = shape.vocab
        self.compute = checkpoint.compute
        self.library = checkpoint.library
        spec = AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale)
        self.specs = [spec] * shape.layers
        self._embed = VocabEmbedding.load(checkpoint, "model.embed_tokens", shape.vocab, shape.hidden)
        self._head = LmHead.load(checkpoint, "lm_head", shape, self._embed)
        self.head = self._head.native
        self._rotary = Rotary(config.rope, shape.head_dim, reach, checkpoint.device, checkpoint.library)
        self._norm = RMSNorm.load(checkpoint, "model.norm", shape.hidden, config.eps)
        self._layers = []
        for index in range(shape.layers):
            name = f"model.layers.{index}"
            attention = SelfAttention.load(checkpoint, f"{name}.self_attn", index, shape)
            mlp = GatedMLP.load(checkpoint, f"{name}.mlp", shape, config.activation)
            scale = checkpoint.vector(f"{name}.scale", shape.hidden)
            self._layers.append((attention, mlp, scale))

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = self._embed(token_ids)
        angles = self._rotary.angles(positions)
        for attention, mlp, scale in self._layers:
            x = x + scale * attention(x, angles, attend)
            x = x + scale * mlp(x)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)


def _rule(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {}


MADE_UP = Family(_rule, frozenset(), DecoderConfig)
