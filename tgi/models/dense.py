"""The pre-norm decoder with rotary attention and a gated MLP: Llama and its relatives, told apart by DenseConfig."""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.attention import HeadNorm, Turn
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.mlp import GatedMLP
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
            AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale, window)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(
            checkpoint, "model.embed_tokens", shape.vocab, shape.hidden, config.embedding_multiplier
        )
        factor = 1 / config.logits_scaling
        if shape.tied:
            self._head = LmHead.tie(self._embed, checkpoint.group, factor)
        else:
            self._head = LmHead.load(checkpoint, "lm_head", shape.vocab, shape.hidden, factor)
        self.head = self._head.native
        self._rotary = Rotary(config.rope, shape.head_dim, reach, checkpoint.device, checkpoint.library)
        self._layers = [DenseLayer(config, checkpoint, index) for index in range(shape.layers)]
        self._norm = RMSNorm.load(checkpoint, "model.norm", shape.hidden, config.eps)

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
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        if config.packed:
            qkv: dict[str, tuple[int, ...]] = {f"{attention}.qkv_proj": (q, kv, kv)}
            gate_up: dict[str, tuple[int, ...]] = {f"{mlp}.gate_up_proj": (shape.intermediate, shape.intermediate)}
        else:
            qkv = {f"{attention}.q_proj": (q,), f"{attention}.k_proj": (kv,), f"{attention}.v_proj": (kv,)}
            gate_up = {f"{mlp}.gate_proj": (shape.intermediate,), f"{mlp}.up_proj": (shape.intermediate,)}
        self._index = index
        self._heads, self._kv_heads = shape.heads, shape.kv_heads
        self._residual = config.residual_multiplier
        self._norm = RMSNorm.load(checkpoint, f"{name}.input_layernorm", shape.hidden, config.eps)
        self._qkv = ColumnLinear.load(checkpoint, qkv, shape.hidden, bias=config.qkv_bias)
        self._qk_norm = None
        if config.qk_norm:
            heads = shape.heads, shape.kv_heads, shape.head_dim
            self._qk_norm = HeadNorm.load(checkpoint, attention, *heads, config.eps)
        self._o = RowLinear.load(checkpoint, f"{attention}.o_proj", shape.hidden, q, bias=config.o_bias)
        self._mlp_norm = RMSNorm.load(checkpoint, f"{name}.post_attention_layernorm", shape.hidden, config.eps)
        self._mlp = GatedMLP(
            ColumnLinear.load(checkpoint, gate_up, shape.hidden, bias=config.mlp_bias, gated=True),
            RowLinear.load(checkpoint, f"{mlp}.down_proj", shape.hidden, shape.intermediate, bias=config.mlp_bias),
        )

    def __call__(self, x: torch.Tensor, angles: Angles, attend: Attend) -> None:
        """Add this layer's work to ``x`` [tokens, hidden] in place."""
        turn = Turn(self._heads, self._kv_heads, angles, self._qk_norm)
        heads = attend(self._index, self._qkv(self._norm(x)), turn)
        self._o.add(x, heads, self._residual)
        self._mlp.add(x, self._mlp_norm(x), self._residual)
