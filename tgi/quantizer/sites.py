"""A model of ours whose matrices are read from the checkpoint when they are needed, and are quantized on the way: what
each product is given is seen, and what the quantized matrix makes of it goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from tgi.core.model_config import Activation
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.models.weights import Weights
from tgi.quantization.base import LinearMethod, dense
from tgi.quantization.quantized import Rows

_CHUNK = 4096
"""Tokens that are multiplied at once."""


class Source:
    """The checkpoint's tensors; keeps by name, to be read again, what the model took."""

    def __init__(self, weights: Weights, finished: Mapping[str, Weights], copies: Mapping[str, str]) -> None:
        """``finished``: by how names begin, what an earlier run has made of these tensors. ``copies``: names of tensors
        that aren't there → names of those that they are."""
        self.taken: dict[str, Rows[torch.Tensor]] = {}
        self._weights = weights
        self._finished = finished
        self._copies = copies

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.rows(name, shape, stored=False)[:]

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        raise AssertionError("nothing is in a pack")

    def factor(self, name: str) -> float | None:
        value = self._weights.factor(name)
        if value is not None:
            self.taken[name] = torch.tensor([value])
        return value

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> Rows[torch.Tensor]:
        if name not in self._copies:
            weights = self._from(name)
            if weights is not self._weights:
                self._weights.skip(name, shape)
            self.taken[name] = cast(Rows[torch.Tensor], weights.rows(name, shape, stored=False))
        matrix = self.taken[self._copies.get(name, name)]
        return matrix[:].T if transposed else matrix

    def _from(self, name: str) -> Weights:
        return next((made for prefix, made in self._finished.items() if name.startswith(prefix)), self._weights)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A product: matrices of the checkpoint with one input."""

    pieces: Sequence[Piece]
    matrices: Sequence[Rows[torch.Tensor]]
    bias: torch.Tensor | None
    gated: bool
    plain: bool
    """Not to be quantized: which experts a token goes to is decided by small differences."""
    device: torch.device

    @property
    def name(self) -> str:
        """Of its first module."""
        return self.pieces[0].name

    @property
    def inner(self) -> int:
        return self.pieces[0].shape[1]

    @property
    def bytes(self) -> int:
        """Of its matrices, in float32."""
        return sum(4 * piece.shape[0] * piece.shape[1] for piece in self.pieces)

    def weight(self, number: int) -> torch.Tensor:
        """One of the matrices, float32 [outs, inner]."""
        stored = self.matrices[number][:]
        return (stored.T if self.pieces[number].transposed else stored).to(self.device, torch.float32)

    def method(self, weights: Sequence[torch.Tensor]) -> LinearMethod:
        """Of what has become of the matrices: the rows that the layer wants, in its order."""
        rows = [w[run] for piece, w in zip(self.pieces, weights, strict=True) for run in piece.rows]
        return dense(rows[0] if len(rows) == 1 else torch.cat(rows), self.bias)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each output: the number of its matrix, and its row there."""
        numbers, rows = [], []
        for number, piece in enumerate(self.pieces):
            own = torch.cat([torch.arange(piece.shape[0])[run] for run in piece.rows])
            numbers.append(torch.full_like(own, number))
            rows.append(own)
        return torch.cat(numbers), torch.cat(rows)


Ready = Callable[[Site, torch.Tensor], LinearMethod]
"""Of a product and its input: how to compute it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites(Checkpoint):
    """A checkpoint whose products are noted."""

    tensors: Source
    ready: Ready
    found: list[Site] = field(default_factory=list)
    """In the order in which the model took them."""

    @property
    def triton(self) -> bool:
        """Experts are products by themselves, which can be noted."""
        return False

    def linear(self, pieces: Sequence[Piece], *, bias: bool, gated: bool = False) -> LinearMethod:
        """As in Checkpoint. A part of the checkpoint that has ``quantize`` taken away stays plain."""
        offset = self.bias(pieces) if bias else None
        matrices = []
        for piece in pieces:
            shape = piece.shape[::-1] if piece.transposed else piece.shape
            matrices.append(self.tensors.rows(f"{piece.name}.weight", shape, stored=False))
        site = Site(pieces, matrices, offset, gated, self.quantize is None, self.device)
        self.found.append(site)
        return _Watched(site, self.ready)


class _Watched:
    """The product of a site, which is made ready when it is asked for the first time in a forward."""

    __slots__ = ("_ready", "_site")

    def __init__(self, site: Site, ready: Ready) -> None:
        self._site = site
        self._ready = ready

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._each(x, lambda method, part: method(part))

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        method = self._ready(self._site, x)
        for start in range(0, len(x), _CHUNK):
            method.add(into[start : start + _CHUNK], x[start : start + _CHUNK], factor)

    def activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return self._each(x, lambda method, part: method.activated(part, activation))

    def clipped(self, x: torch.Tensor, bound: float) -> torch.Tensor:
        return self._each(x, lambda method, part: method.clipped(part, bound))

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return self._each(x, lambda method, part: method.gate(part, activation))

    def _each(self, x: torch.Tensor, call: Callable[[LinearMethod, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Some tokens at a time, so that little memory is needed beside the result."""
        method = self._ready(self._site, x)
        first = call(method, x[:_CHUNK])
        out = first.new_empty(len(x), first.shape[1])
        out[:_CHUNK] = first
        for start in range(_CHUNK, len(x), _CHUNK):
            out[start : start + _CHUNK] = call(method, x[start : start + _CHUNK])
        return out
