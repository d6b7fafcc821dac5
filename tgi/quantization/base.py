"""How a linear layer's weight is held and multiplied. Knows no model, no layer and no file.

A format says how a checkpoint stores weights, a method is a kernel with its weight packed for it.
"""

from typing import Protocol

import torch


class LinearMethod(Protocol):
    """One matrix ready to be multiplied."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] → [tokens, out], bias added. A row's result does not depend on the other rows where the
        method says so."""


def dense(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearMethod:
    """The fastest method for a plain floating-point ``weight`` [out, in] on its device."""
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch gives it no type
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and has_mkldnn:
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear:
    """torch's own ``linear``: any device, any dtype; the reference for the others."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


class PackedLinear:
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
