"""What parsers share: how a module's stored tensors become the matrix that they stand for."""

from collections.abc import Callable, Mapping

import torch

from tgi.quantization.formats.base import Module, Scheme
from tgi.quantization.quantized import Dequantized, Entry, Packed, Rows

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Floating point of 4 bits (OCP Microscaling Formats 1.0): the values of its codes."""

Make = Callable[[Module[Entry], tuple[int, ...]], Entry]
"""Of a module's tensors, which fit the format, and the shape that they imply, the matrix."""


def unpacked(entries: Mapping[str, Entry], scheme: Scheme, make: Make) -> dict[str, Entry]:
    """``entries`` with the matrices that ``make`` makes of quantized modules' tensors. What belongs to none stays:
    somebody will ask what it is. StartupError names a tensor that doesn't fit, before any number is read."""
    modules = [(module, scheme.size(module).shape) for module in scheme.modules(entries)]
    found = {name: entry for name, entry in entries.items() if not scheme.beside(name)}
    for module, shape in modules:
        for part in module.parts:
            found.pop(module.name + part, None)
        found[module.name + scheme.MADE] = make(module, shape)
    return found


def matrix(
    module: Module[Entry], shape: tuple[int, ...], stored: Rows[Packed], order: torch.Tensor | None = None
) -> Entry:
    """What all of the module's tensors stand for. ``order``: of columns, if they have one."""
    size = sum(entry.bytes for entry in module.parts.values())
    return Entry(module.path, shape, size, "F32", Dequantized(stored), stored, order=order)


def halves(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] → [rows, bytes · 2], the lower half of each first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def floating(scale: torch.Tensor) -> torch.Tensor:
    """In float32. Bytes are exponents (E8M0), whatever the file calls them."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
