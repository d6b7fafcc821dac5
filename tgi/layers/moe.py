"""A mixture of experts in the place of a feed-forward block (Shazeer et al., arXiv 1701.06538)."""

from dataclasses import replace

import torch

from tgi.core.model_config import Activation, Experts, ModelShape
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.linear import ColumnLinear
from tgi.layers.mlp import GatedMLP


class MoE:
    """Each token goes through the few experts that its router likes best, and through those that all share.

    A token's result is summed in the order of the experts, so it doesn't depend on the other tokens.
    """

    __slots__ = ("_config", "_experts", "_router", "_shared", "_shared_gate")

    def __init__(
        self,
        config: Experts,
        router: ColumnLinear,
        experts: list[GatedMLP],
        shared: GatedMLP | None = None,
        shared_gate: ColumnLinear | None = None,
    ) -> None:
        self._config = config
        self._router = router
        self._experts = experts
        self._shared = shared
        self._shared_gate = shared_gate

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, shape: ModelShape, config: Experts, activation: Activation
    ) -> "MoE":
        """The block ``name``, its experts' modules being named as ``config`` says."""
        block = f"{name}.{config.block}"
        # Which experts a token goes to is decided by small differences: routers stay as they are.
        exact = replace(checkpoint, quantize="stored" if checkpoint.quantize == "stored" else None)
        router = ColumnLinear.load(exact, {f"{block}.gate": (config.count,)}, shape.hidden, bias=False)
        inner = replace(shape, intermediate=config.intermediate)
        experts = [
            GatedMLP.load(checkpoint, f"{block}.experts.{index}", inner, activation, names=config.names)
            for index in range(config.count)
        ]
        shared = gate = None
        if config.shared_intermediate:
            inner = replace(shape, intermediate=config.shared_intermediate)
            shared = GatedMLP.load(checkpoint, f"{block}.shared_expert", inner, activation)
            gate = ColumnLinear.load(exact, {f"{block}.shared_expert_gate": (1,)}, shape.hidden, bias=False)
        return cls(config, router, experts, shared, gate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        weights, chosen = route(self._router(x), self._config)
        out = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            part = self._experts[index](x.index_select(0, tokens))
            out.index_add_(0, tokens, part * weights[tokens, place, None].to(part.dtype))
        if self._shared is not None and self._shared_gate is not None:
            out += self._shared_gate(x).sigmoid() * self._shared(x)
        return out

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        into.add_(self(x), alpha=factor)


def route(scores: torch.Tensor, config: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, experts] → weights float32, experts int64: each [tokens, experts per token]."""
    weights, chosen = scores.float().softmax(-1).topk(config.per_token, dim=-1)
    if config.normalized:
        weights /= weights.sum(-1, keepdim=True)
    return weights, chosen
