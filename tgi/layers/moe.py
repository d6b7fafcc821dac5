"""A mixture of experts in the place of a feed-forward block (Shazeer et al., arXiv 1701.06538)."""

from dataclasses import replace

import torch

from tgi.core.model_config import Activation, Experts, ModelShape, Routing
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.linear import ColumnLinear
from tgi.layers.mlp import GatedMLP


class MoE:
    """Each token goes through the few experts that its router likes best, and through those that all share."""

    __slots__ = ("_bias", "_experts", "_router", "_routing", "_shared", "_shared_gate")

    def __init__(
        self,
        routing: Routing,
        router: ColumnLinear,
        bias: torch.Tensor | None,
        experts: list[GatedMLP],
        shared: GatedMLP | None = None,
        shared_gate: ColumnLinear | None = None,
    ) -> None:
        self._routing = routing
        self._router = router
        self._bias = bias
        self._experts = experts
        self._shared = shared
        self._shared_gate = shared_gate

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, shape: ModelShape, config: Experts, activation: Activation
    ) -> "MoE":
        """The block of the layer ``name``, its modules being named as ``config`` says."""
        block = f"{name}.{config.block}"
        # Which experts a token goes to is decided by small differences.
        exact = replace(checkpoint, dtype=torch.float32, quantize=None)
        router = ColumnLinear.load(exact, {f"{block}.{config.router}": (config.count,)}, shape.hidden, bias=False)
        bias = None
        if config.routing.bias:
            bias = exact.vector(f"{block}.{config.routing.bias}", config.count)
        inner = replace(shape, intermediate=config.intermediate)
        experts = [
            GatedMLP.load(checkpoint, f"{block}.experts.{index}", inner, activation, names=config.names)
            for index in range(config.count)
        ]
        shared = gate = None
        if config.shared_intermediate:
            inner = replace(shape, intermediate=config.shared_intermediate)
            shared = GatedMLP.load(checkpoint, f"{block}.{config.shared}", inner, activation)
            if config.shared_gate:
                gate = ColumnLinear.load(exact, {f"{block}.{config.shared_gate}": (1,)}, shape.hidden, bias=False)
        return cls(config.routing, router, bias, experts, shared, gate)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        weights, chosen = route(self._router(x.float()), self._routing, self._bias)
        per_token = chosen.shape[1]
        # Pairs of a token and an expert, those of an expert side by side.
        pairs = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        rows = torch.split(x.index_select(0, pairs // per_token), counts)
        parts = [expert(part) for expert, part in zip(self._experts, rows, strict=True) if len(part)]
        outs = torch.empty(len(pairs), x.shape[1], dtype=x.dtype, device=x.device)
        outs[pairs] = torch.cat(parts)
        outs *= weights.flatten()[:, None].to(outs.dtype)
        into.add_(outs.view(len(x), per_token, -1).sum(1), alpha=factor)
        if self._shared is None:
            return
        if self._shared_gate is None:
            self._shared.add(into, x, factor)
        else:
            gate = self._shared_gate(x.float()).sigmoid().to(x.dtype)
            into.add_(gate * self._shared(x), alpha=factor)


def route(scores: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, experts], [experts] → weights float32, experts int64: each [tokens, experts per token]."""
    scores = scores.float()
    if routing.score == "sparse_mixer":
        return _sparse_mixer(scores, routing)
    scores = scores.sigmoid() if routing.score == "sigmoid" else scores.softmax(-1)
    liked = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = liked.view(len(liked), routing.groups, -1)
        best = grouped.topk(routing.group_best).values.sum(-1).topk(routing.groups_per_token).indices
        others = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        liked = grouped.masked_fill(others[..., None], float("-inf")).flatten(-2)
    chosen = liked.topk(routing.per_token).indices
    weights = scores.gather(-1, chosen)
    if routing.norm:
        weights /= weights.norm(routing.norm, dim=-1, keepdim=True).clamp(min=routing.norm_least)
    return weights * routing.factor, chosen


def _sparse_mixer(products: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    weights, chosen = [], []
    left = products
    for _ in range(routing.per_token):
        most, best = left.max(-1, keepdim=True)
        far = (most - products) / products.abs().maximum(most) > 2 * routing.jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, best))
        chosen.append(best)
        left = left.scatter(-1, best, float("-inf"))
    return torch.cat(weights, -1), torch.cat(chosen, -1)
