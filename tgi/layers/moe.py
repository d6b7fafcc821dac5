"""A mixture of experts in the place of a feed-forward block (Shazeer et al., arXiv 1701.06538)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from tgi.core.model_config import Activation, Experts, ModelShape, Routing
from tgi.kernels import experts as native
from tgi.kernels.library import Library
from tgi.kernels.ops import Finish, Score
from tgi.kernels.panels import Panels
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.layers.linear import ColumnLinear
from tgi.layers.mlp import GatedMLP
from tgi.parallel import Group
from tgi.quantization.base import ACTS

if TYPE_CHECKING:
    from tgi.kernels.triton.experts import Matrices


class ExpertsMethod(Protocol):
    """Experts, and how a step's tokens go through them."""

    def route(
        self, products: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, experts], [experts] → weights float32, experts: each [tokens, experts per token]."""

    def add(
        self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, factor: float
    ) -> None:
        """Add ``factor`` times what the experts make of x, weighted, to ``into``; both [tokens, hidden]."""

    def add_weighted(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times x [tokens, hidden] times weights [tokens, 1] to ``into``."""


_GATED = Routing(per_token=1, score="sigmoid")
"""Of a shared expert with a gate: among one, it is always chosen, and weighted."""


class MoE:
    """Each token goes through the few experts that its router likes best, and through one that all share."""

    __slots__ = ("_bias", "_experts", "_router", "_routing", "_shared", "_shared_gate")

    def __init__(
        self,
        routing: Routing,
        router: ColumnLinear,
        bias: torch.Tensor | None,
        experts: ExpertsMethod,
        shared: GatedMLP | None,
        shared_gate: ColumnLinear | None,
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
        block, routing = f"{name}.{config.block}", config.routing
        # Which experts a token goes to is decided by small differences.
        exact = replace(checkpoint, dtype=torch.float32, quantize=None)
        router = ColumnLinear.whole(exact, f"{block}.{config.router}", config.count, shape.hidden, bias=False)
        bias = exact.vector(f"{block}.{routing.bias}", config.count) if routing.bias else None
        experts: ExpertsMethod
        if checkpoint.library is not None:
            experts = GroupedExperts.load(checkpoint, checkpoint.library, f"{block}.experts", shape, config, activation)
        elif checkpoint.triton:
            experts = FusedExperts.load(checkpoint, f"{block}.experts", shape, config, activation)
        else:
            experts = SeparateExperts.load(checkpoint, f"{block}.experts", shape, config, activation)
        shared = gate = None
        if config.shared_intermediate:
            inner = replace(shape, intermediate=config.shared_intermediate)
            shared = GatedMLP.load(checkpoint, f"{block}.{config.shared}", inner, activation)
            if config.shared_gate:
                gate = ColumnLinear.whole(exact, f"{block}.{config.shared_gate}", 1, shape.hidden, bias=False)
        return cls(routing, router, bias, experts, shared, gate)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the block's result to ``into``; both [tokens, hidden]."""
        exact = x if x.dtype == torch.float32 else x.float()
        weights, chosen = self._experts.route(self._router(exact), self._routing, self._bias)
        self._experts.add(into, x, weights, chosen, factor)
        if self._shared is None:
            return
        if self._shared_gate is None:
            self._shared.add(into, x, factor)
        else:
            weights, _ = self._experts.route(self._shared_gate(exact), _GATED)
            self._experts.add_weighted(into, self._shared(x), weights, factor)


class GroupedExperts:
    """All experts as two products by the native kernels, each of the rows that go to it.

    A token's result is bit-equal whatever the other tokens are: its experts are summed in its own order of them.
    """

    __slots__ = ("_activation", "_down", "_gate_up", "_group", "_library")

    def __init__(self, library: Library, group: Group, gate_up: Panels, down: Panels, activation: Activation) -> None:
        """``gate_up``: its panels come from gate and up by turns."""
        self._library = library
        self._group = group
        self._gate_up = gate_up
        self._down = down
        self._activation = ACTS[activation]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        library: Library,
        name: str,
        shape: ModelShape,
        config: Experts,
        activation: Activation,
    ) -> "GroupedExperts":
        """Experts are the modules ``name``.0, ``name``.1, …"""
        gate_ups, downs = _pieces(checkpoint.group, name, shape, config)
        return cls(
            library,
            checkpoint.group,
            checkpoint.stacked(library, gate_ups, gated=True),
            checkpoint.stacked(library, downs),
            activation,
        )

    def route(
        self, products: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return native.route(
            self._library,
            products,
            bias,
            per_token=routing.per_token,
            score=Score[routing.score.upper()],
            jitter=routing.jitter,
            groups=routing.groups,
            groups_per_token=routing.groups_per_token,
            group_best=routing.group_best,
            norm=routing.norm,
            norm_least=routing.norm_least,
            factor=routing.factor,
        )

    def add(
        self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, factor: float
    ) -> None:
        library, act = self._library, self._activation
        pairs = native.arrange(library, chosen, self._gate_up.count)
        rows = native.pick(library, x, pairs.row)
        inner = native.linear(library, self._gate_up, rows, pairs.first, finish=Finish.GATE, act=act)
        del rows  # a recorded program lends its memory again
        outs = native.linear(library, self._down, inner, pairs.first)
        if self._group.size == 1:
            native.mix(library, outs, weights, pairs.place, into=into, factor=factor)
        else:
            self._group.add(into, native.mix(library, outs, weights, pairs.place), factor)

    def add_weighted(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, factor: float) -> None:
        native.mix(self._library, x, weights, into=into, factor=factor)


class FusedExperts:
    """The same by Triton's kernels. Nothing waits for the host, so that a step can be captured.

    Each expert's matrices are quantized if all of the layer's can be multiplied so. A token's result doesn't depend on
    where the other tokens go, but on whether they are few or many; if ``fixed``, not on that either.
    """

    __slots__ = ("_activation", "_down", "_fixed", "_gate_up", "_group")

    def __init__(
        self, group: Group, gate_up: "Matrices", down: "Matrices", activation: Activation, *, fixed: bool = False
    ) -> None:
        """``gate_up``: an expert's gate lies before its up."""
        self._group = group
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._fixed = fixed

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, shape: ModelShape, config: Experts, activation: Activation
    ) -> "FusedExperts":
        """Experts are the modules ``name``.0, ``name``.1, …"""
        gate_ups, downs = _pieces(checkpoint.group, name, shape, config)
        gate_up, down = checkpoint.experts(gate_ups), checkpoint.experts(downs)
        return cls(checkpoint.group, gate_up, down, activation, fixed=checkpoint.fixed)

    def route(
        self, products: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from tgi.kernels.triton import experts as kernels

        if routing.score == "sparse_mixer":
            return _sparse_mixer(products, routing)
        return kernels.route(
            products,
            bias,
            per_token=routing.per_token,
            score=routing.score,
            groups=routing.groups,
            groups_per_token=routing.groups_per_token,
            group_best=routing.group_best,
            norm=routing.norm,
            norm_least=routing.norm_least,
            factor=routing.factor,
        )

    def add(
        self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, factor: float
    ) -> None:
        from tgi.kernels.triton import experts as kernels

        pairs = kernels.arrange(chosen, self._gate_up.experts)
        inner = kernels.gate(x, self._gate_up, pairs, self._activation, fixed=self._fixed)
        outs = kernels.linear(inner, self._down, pairs, fixed=self._fixed)
        if self._group.size == 1:
            kernels.mix(outs, weights, into, factor)
        else:
            self._group.add(into, kernels.mix(outs, weights), factor)

    def add_weighted(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, factor: float) -> None:
        from tgi.kernels.triton import experts as kernels

        kernels.mix(x, weights, into, factor)


class SeparateExperts:
    """Torch's own linears, one expert after the other: any device, any dtype; the reference for the others."""

    __slots__ = ("_experts",)

    def __init__(self, experts: list[GatedMLP]) -> None:
        self._experts = experts

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, shape: ModelShape, config: Experts, activation: Activation
    ) -> "SeparateExperts":
        """Experts are the modules ``name``.0, ``name``.1, …"""
        inner = replace(shape, intermediate=config.intermediate)
        modules = [f"{name}.{index}" for index in range(config.count)]
        return cls([GatedMLP.load(checkpoint, module, inner, activation, names=config.names) for module in modules])

    def route(
        self, products: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if routing.score == "sparse_mixer":
            return _sparse_mixer(products, routing)
        scores = products.sigmoid() if routing.score == "sigmoid" else products.softmax(-1)
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

    def add(
        self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, factor: float
    ) -> None:
        # Pairs of a token and an expert, those of an expert side by side.
        pairs = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        outs = torch.empty(*chosen.shape, x.shape[1], dtype=x.dtype, device=x.device)
        for expert, own in zip(self._experts, torch.split(pairs, counts), strict=True):
            if len(own):
                outs.view(-1, x.shape[1])[own] = expert(x.index_select(0, own // chosen.shape[1]))
        into.add_(outs.mul_(weights[..., None]).sum(1), alpha=factor)

    def add_weighted(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, factor: float) -> None:
        into.add_(weights.to(x.dtype) * x, alpha=factor)


def _pieces(group: Group, name: str, shape: ModelShape, config: Experts) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """A rank's part of all experts: gate and up, and down."""
    gate, up, down = config.names
    hidden, inner = shape.hidden, config.intermediate
    own, whole = group.shard(inner), slice(0, hidden)
    modules = [f"{name}.{index}" for index in range(config.count)]
    gate_ups = [[Piece(f"{module}.{part}", (inner, hidden), [own], whole) for part in (gate, up)] for module in modules]
    return gate_ups, [[Piece(f"{module}.{down}", (hidden, inner), [whole], own)] for module in modules]


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
