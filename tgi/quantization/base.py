"""How a linear layer's weight is held and multiplied. Knows no model, no layer and no file.

A format says how a checkpoint stores weights, a method is a kernel with its weight packed for it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import gelu, linear, relu, silu

from tgi.core.model_config import Activation
from tgi.kernels.library import Library
from tgi.kernels.linear import linear as native_linear
from tgi.kernels.ops import Act, Finish
from tgi.kernels.panels import Panels
from tgi.kernels.rows import embed
from tgi.kernels.triton import runs_on


class LinearMethod(Protocol):
    """One matrix ready to be multiplied. A row's result does not depend on the other rows where the method says so."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, out], bias added."""

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the product to ``into`` [tokens, out]."""

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """``activation`` of the product."""

    def clipped(self, x: torch.Tensor, bound: float) -> torch.Tensor:
        """The product, brought within ± ``bound``."""

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """``activation`` of the product's first half times its second: [tokens, in] → [tokens, out / 2]. A method made
        with ``gated`` does this alone."""


ACTS: dict[Activation, Act] = {
    "silu": Act.SILU,
    "gelu_tanh": Act.GELU_TANH,
    "gelu": Act.GELU,
    "relu": Act.RELU,
    "relu2": Act.RELU2,
}


def dense(weight: torch.Tensor, bias: torch.Tensor | None, *, fixed: bool = False) -> LinearMethod:
    """The fastest method of torch's for a plain floating-point ``weight`` [out, in] on its device. ``fixed``: where
    Triton runs, a kernel in its stead whose rows don't know of each other."""
    if runs_on(weight.device):
        # Triton is only there, and only wanted, beside a GPU.
        from tgi.quantization.device import FixedLinear, TorchLinear

        return FixedLinear(weight, bias) if fixed else TorchLinear(weight, bias)
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch gives it no type
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and has_mkldnn:
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class NativeLinear:
    """Our own kernel on CPU: float32 activations, and a weight in any of the forms of ``Panels``.

    Each row's result is bit-equal whatever the other rows are.
    """

    __slots__ = ("_library", "bias", "panels")

    def __init__(self, library: Library, panels: Panels, bias: torch.Tensor | None) -> None:
        """``bias``: as long as the panels are, or None."""
        self._library = library
        self.panels = panels
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return native_linear(self._library, self.panels, x, bias=self.bias)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        native_linear(self._library, self.panels, x, bias=self.bias, out=into, finish=Finish.ADD, alpha=factor)

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return native_linear(self._library, self.panels, x, bias=self.bias, act=ACTS[activation])

    def clipped(self, x: torch.Tensor, bound: float) -> torch.Tensor:
        return native_linear(self._library, self.panels, x, bias=self.bias, act=Act.CLIP, cap=bound)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        act = ACTS[activation]
        return native_linear(self._library, self.panels, x, bias=self.bias, finish=Finish.GATE, act=act)

    def write(self, out: torch.Tensor, x: torch.Tensor, factor: float, cap: float) -> None:
        """``factor`` times the product into ``out`` [tokens, out]; with a ``cap``, cap · tanh(that / cap)."""
        native_linear(self._library, self.panels, x, bias=self.bias, out=out, alpha=factor, cap=cap)

    def rows(self, ids: torch.Tensor, factor: float, first: int) -> torch.Tensor:
        """The matrix's own rows ``first + ids``, times ``factor``: int64 [tokens] → float32 [tokens, in]."""
        return embed(self._library, self.panels, ids, factor, first)

    def add_rows(self, into: torch.Tensor, ids: torch.Tensor, first: int) -> None:
        """Add the matrix's rows ``first + ids`` to ``into`` [tokens, in]."""
        embed(self._library, self.panels, ids, first=first, into=into)


class ByProduct:
    """A method that computes a product, and all else from it by torch."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        into.add_(self(x), alpha=factor)

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return activate(self(x), activation)

    def clipped(self, x: torch.Tensor, bound: float) -> torch.Tensor:
        return self(x).clamp_(-bound, bound)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        product = self(x)
        if activation == "silu":
            return silu_mul(product)
        gate, up = product.chunk(2, dim=-1)
        return activate(gate, activation) * up


class PlainLinear(ByProduct):
    """torch's own ``linear``: any device, any dtype; the reference for the others."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weight, self._bias)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        into.addmm_(x, self._weight.T, alpha=factor)
        if self._bias is not None:
            into.add_(self._bias, alpha=factor)


class JoinedLinear(ByProduct):
    """The products of several methods side by side: of matrices that take their inputs in different orders."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[LinearMethod]) -> None:
        self._parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


class PackedLinear(ByProduct):
    """float32 on CPU with the weight in oneDNN's blocked layout: two to three times ``linear`` for 2 to 32 rows.

    Each row's result is bit-equal whatever the other rows are. A lone row would take a kernel that splits the sum over
    threads, so it is computed twice.
    """

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def silu_mul(product: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the columns times the second (SwiGLU; Shazeer, arXiv 2002.05202).

    Each element's value is independent of its place. torch's own CPU silu is not: the vector loop and the scalar loop
    behind it round differently, and where one ends depends on the batch and the number of threads. exp and division
    round alike in both.
    """
    gate, up = product.chunk(2, dim=-1)
    if gate.device.type != "cpu":
        return silu(gate) * up
    denominator = gate.neg().exp_().add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "silu":
            return silu(x)
        case "gelu_tanh":
            return gelu(x, approximate="tanh")
        case "gelu":
            return gelu(x)
        case "relu":
            return relu(x)
        case "relu2":
            return relu(x).square()
