"""The pre-norm decoder with rotary attention and a gated MLP: Llama and its relatives, told apart by DenseConfig."""

import torch

from tgi.attention.base import Attend, AttnSpec
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.embedding import LmHead, VocabEmbedding
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.layers.mlp import GatedMLP
from tgi.layers.norm import RMSNorm
from tgi.layers.rotary import Rotary
from tgi.models.config import DenseConfig


class DenseDecoder:
    """Token ids to hidden states to logits. The token axis is flat: all requests of a step, one behind the other."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, reach: int) -> None:
        shape = config.shape
        self.vocab_size = shape.vocab
        self.specs = [
            AttnSpec(shape.heads, shape.kv_heads, shape.head_dim, config.attention_scale, window)
            for window in config.windows
        ]
        self._embed = VocabEmbedding.load(checkpoint, "model.embed_tokens", shape.vocab, shape.hidden)
        if shape.tied:
            self._head = LmHead.tie(self._embed, checkpoint.group)
        else:
            self._head = LmHead.load(checkpoint, "lm_head", shape.vocab, shape.hidden)
        self._logits_scaling = config.logits_scaling
        if config.embedding_multiplier != 1.0:
            self._embed = self._embed.scaled(config.embedding_multiplier)
        self._rotary = Rotary(config.rope, shape.head_dim, reach, checkpoint.dtype, checkpoint.device)
        self._layers = [DenseLayer(config, checkpoint, index, self._rotary) for index in range(shape.layers)]
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
        """[rows, hidden] → float32 [rows, vocab]."""
        scores = self._head(hidden)
        return scores if self._logits_scaling == 1.0 else scores.div_(self._logits_scaling)


class DenseLayer:
    """Attention and MLP, each adding to the residual stream."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint, index: int, rotary: Rotary) -> None:
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
        self._rotary = rotary
        self._heads, self._kv_heads, self._head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self._residual = config.residual_multiplier
        self._norm = RMSNorm.load(checkpoint, f"{name}.input_layernorm", shape.hidden, config.eps)
        self._qkv = ColumnLinear.load(checkpoint, qkv, shape.hidden, bias=config.qkv_bias)
        self._qk_norm = HeadNorm.load(checkpoint, attention, config) if config.qk_norm else None
        self._o = RowLinear.load(checkpoint, f"{attention}.o_proj", shape.hidden, q, bias=config.o_bias)
        self._mlp_norm = RMSNorm.load(checkpoint, f"{name}.post_attention_layernorm", shape.hidden, config.eps)
        self._mlp = GatedMLP(
            ColumnLinear.load(checkpoint, gate_up, shape.hidden, bias=config.mlp_bias),
            RowLinear.load(checkpoint, f"{mlp}.down_proj", shape.hidden, shape.intermediate, bias=config.mlp_bias),
        )

    def __call__(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> None:
        """Add this layer's work to ``x`` [tokens, hidden] in place."""
        x.add_(self._attention(self._norm(x), angles, attend), alpha=self._residual)
        x.add_(self._mlp(self._mlp_norm(x)), alpha=self._residual)

    def _attention(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        turning, v = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        if self._qk_norm is not None:
            turning = self._qk_norm(turning)
        turned = self._rotary.rotate(turning, *angles)
        return self._o(attend(self._index, turned[:, : self._heads], turned[:, self._heads :], v))


class HeadNorm:
    """RMSNorm over every head of q and k at once, each kind with its own weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, config: DenseConfig) -> "HeadNorm":
        shape = config.shape
        weight = checkpoint.empty(shape.heads + shape.kv_heads, shape.head_dim)
        weight[: shape.heads] = checkpoint.vector(f"{name}.q_norm.weight", shape.head_dim)
        weight[shape.heads :] = checkpoint.vector(f"{name}.k_norm.weight", shape.head_dim)
        return cls(weight, config.eps)

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """[tokens, heads + kv heads, head dim] → the same."""
        return torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, self._eps).mul_(self._weight)
