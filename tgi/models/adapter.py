"""A PEFT adapter merged into its base's weights, tensor by tensor as they are read: W + scale · B · A."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tgi.core.adapter import Adapter, Part, place
from tgi.core.errors import StartupError
from tgi.quantization.quantized import Entry, Rows


def merge(
    base: Mapping[str, Entry], own: Mapping[str, Entry], adapter: Adapter, *, transposed: bool
) -> dict[str, Entry]:
    """The base's entries with those that the adapter's ``own`` tensors replace or change.

    ``transposed``: matrices of layers are stored as [in, out]. StartupError names what doesn't fit.
    """
    changes: dict[str, dict[Part, Entry]] = defaultdict(dict)
    for name, entry in own.items():
        try:
            target, part = place(name)
        except ValueError as error:
            raise StartupError(f"{entry.path}: {error}") from None
        changes[target][part] = entry
    merged = dict(base)
    for target, parts in changes.items():
        path = next(iter(parts.values())).path
        if (whole := parts.pop("whole", None)) is not None:
            merged[target] = whole
        if not parts:
            continue
        if target not in merged:
            raise StartupError(f"{path}: changes tensor {target}, which the base model does not have")
        embedding = "embedding_A" in parts
        match parts:
            case {"A": a, "B": b, **rest} | {"embedding_A": a, "embedding_B": b, **rest} if not rest:
                pass
            case _:
                raise StartupError(f"{path}: tensor {target}: expected one A and one B of LoRA, got {', '.join(parts)}")
        old = merged[target]
        change = b.shape[:1] + a.shape[1:]
        square = len(set(old.shape)) == 1
        turned = embedding or (square and transposed) or (not square and change[::-1] == old.shape)
        fits = (change[::-1] if turned else change) == old.shape and a.shape[:1] == b.shape[1:]
        if len(old.shape) != 2 or not fits:
            raise StartupError(f"{path}: tensor {target}: {b.shape} · {a.shape} does not fit {old.shape}")
        scale = adapter.scale(target.removesuffix(".weight"), a.shape[0])
        values = _Sum(old.values, a.values, b.values, scale, turned)
        merged[target] = Entry(path, old.shape, old.bytes + a.bytes + b.bytes, "F32", values)
    return merged


@dataclass(frozen=True, slots=True)
class _Sum:
    """A changed matrix, in float32."""

    old: Rows[torch.Tensor]
    a: Rows[torch.Tensor]
    b: Rows[torch.Tensor]
    scale: float
    turned: bool
    """The change's rows are the matrix's columns."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        left, right = (self.a[:].T, self.b[:].T) if self.turned else (self.b[:], self.a[:])
        return ((left[rows].float() * self.scale) @ right.float()).add_(self.old[rows])
