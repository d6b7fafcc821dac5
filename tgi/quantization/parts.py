"""What parsers share: a module's stored tensors, checked, and the matrix that they make."""

from collections.abc import Iterable, Mapping

import torch

from tgi.core.errors import StartupError
from tgi.quantization.quantized import Dequantized, Entry, Packed, Rows

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Floating point of 4 bits (OCP Microscaling Formats 1.0): the values of its codes."""

_ACTIVATIONS = frozenset(
    """input_scale input_scale_ub input_zero_point input_global_scale activation_scale output_scale output_zero_point
    output_global_scale q_scale q_zero_point k_zero_point v_zero_point""".split()
)


def weights_alone(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Without the scales of activations, which are not rounded by them but stay float32 or are rounded finer: what is
    computed is nearer to the model before it was quantized."""
    return {name: entry for name, entry in entries.items() if name.rpartition(".")[2] not in _ACTIVATIONS}


def part(
    entries: Mapping[str, Entry], name: str, beside: Entry, method: str, kinds: Iterable[str], *shapes: tuple[int, ...]
) -> Entry:
    """The tensor ``name`` that ``method`` has ``beside`` another; StartupError if it is missing, of none of the
    ``kinds``, or of none of the ``shapes``, if there are any."""
    if name not in entries:
        raise StartupError(f"{beside.path}: tensor {name} is missing")
    entry = entries[name]
    if entry.kind not in kinds:
        implied = " or ".join(kinds)
        raise StartupError(f"{entry.path}: tensor {name} has type {entry.kind}, {method} implies {implied}")
    if shapes and entry.shape not in shapes:
        implied = " or ".join(map(str, dict.fromkeys(shapes)))
        raise StartupError(f"{entry.path}: tensor {name} has shape {entry.shape}, {method} implies {implied}")
    return entry


def matrix(parts: Iterable[Entry], shape: tuple[int, ...], stored: Rows[Packed]) -> Entry:
    """What these tensors stand for."""
    parts = list(parts)
    return Entry(parts[0].path, shape, sum(entry.bytes for entry in parts), "F32", Dequantized(stored), stored)


def halves(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] → [rows, bytes · 2], the lower half of each first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def floating(scale: torch.Tensor) -> torch.Tensor:
    """In float32. Bytes are exponents (E8M0), whatever the file calls them."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
