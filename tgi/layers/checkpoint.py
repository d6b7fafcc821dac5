"""What a layer needs to take its weights: the checkpoint's tensors by name, and what becomes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import torch

from tgi.kernels.library import Library
from tgi.kernels.panels import Panels, join, pack, pack_quantized
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, NativeLinear, dense
from tgi.quantization.packed import Pack
from tgi.quantization.quantized import Quantized, quantize, stack


class Tensors(Protocol):
    """A checkpoint. Reading the same tensor twice is an error, so that none is forgotten or mistaken."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on CPU in its stored dtype, read-only; StartupError if missing or of another shape."""

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """The tensor is known already; errors as with ``take``."""

    def take_stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | Quantized:
        """The same, and quantized if it is stored so."""


class Shared:
    """Tensors of which each may be read several times."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._read: dict[str, torch.Tensor | Quantized | None] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._read:
            self._read[name] = self._tensors.take(name, shape)
        tensor = self._read[name]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._read:
            self._tensors.skip(name, shape)
            self._read[name] = None

    def take_stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | Quantized:
        return self.take(name, shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one of the checkpoint's matrices."""

    name: str
    """Of the module: ``.weight`` and ``.bias`` belong to it."""
    shape: tuple[int, int]
    rows: Sequence[slice]
    columns: slice
    transposed: bool = False
    """Stored as [columns, rows] (transformers' Conv1D)."""

    @property
    def height(self) -> int:
        return sum(len(range(*run.indices(self.shape[0]))) for run in self.rows)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors with their destination."""

    tensors: Tensors
    dtype: torch.dtype
    """Of weights that aren't quantized, and of activations unless our own kernels compute these: then float32."""
    device: torch.device
    group: Group
    library: Library | None = None
    """Our own kernels, if the model runs on them."""
    quantize: str | None = None
    """"int8", "int4": round matrices so; "stored": keep those as they are that the checkpoint holds quantized."""
    pack: Pack = field(default_factory=Pack)
    """Where packed matrices are kept."""

    @property
    def compute(self) -> torch.dtype:
        """Of activations."""
        return self.dtype if self.library is None else torch.float32

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        """A whole small tensor in the numbers of activations, alike on all ranks."""
        return torch.empty(shape, dtype=self.compute, device=self.device).copy_(self.tensors.take(name, shape))

    def linear(self, pieces: Sequence[Piece], *, bias: bool, gated: bool = False) -> LinearMethod:
        """A method for the pieces' rows, one below the other. ``gated``: the first half of the rows gates the second,
        and the method will be asked for nothing else than that. ``bias``: added on every rank that has one."""
        offset = self.bias(pieces) if bias else None
        if self.library is None:
            return dense(self.table(pieces), offset)
        return self.native(self.library, pieces, offset, gated=gated)

    def table(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The pieces as one tensor on the device, copied once."""
        rows = sum(piece.height for piece in pieces)
        columns = pieces[0].columns.stop - pieces[0].columns.start
        weight = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        at = 0
        for piece in pieces:
            stored = self._take(piece)
            for run in piece.rows:
                part = stored[run, piece.columns]
                weight[at : at + len(part)].copy_(part)
                at += len(part)
        return weight

    def native(
        self,
        library: Library,
        pieces: Sequence[Piece],
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        bits: int | None = None,
    ) -> NativeLinear:
        """The pieces packed for our own kernel. ``bits`` overrides what ``quantize`` says of rounding."""
        if self.pack.complete:
            for piece in pieces:
                self.tensors.skip(f"{piece.name}.weight", _stored_shape(piece))
        panels = self.pack.panels(_name(pieces), lambda: self._panels(pieces, gated, bits))
        if bias is not None:
            bias = _interleave(bias[:, None])[:, 0] if gated else bias
            bias = torch.nn.functional.pad(bias, (0, panels.rows - len(bias)))
        return NativeLinear(library, panels, bias)

    def stacked(self, library: Library, matrices: Sequence[Sequence[Piece]], *, gated: bool = False) -> Panels:
        """Matrices of one size, each made of some pieces, packed one behind the other."""
        if self.pack.complete:
            for piece in chain.from_iterable(matrices):
                self.tensors.skip(f"{piece.name}.weight", _stored_shape(piece))
        name = f"{len(matrices)} from {_name(matrices[0])}"
        return self.pack.panels(name, lambda: join([self._panels(pieces, gated, None) for pieces in matrices]))

    def _panels(self, pieces: Sequence[Piece], gated: bool, bits: int | None) -> Panels:
        parts = [part for piece in pieces for part in self._stored(piece)]
        quantized = [part for part in parts if isinstance(part, Quantized)]
        if bits is None and self.quantize in ("int8", "int4"):
            bits = int(self.quantize.removeprefix("int"))
        whole: torch.Tensor | Quantized | None = None
        if len(quantized) == len(parts):
            whole = stack(quantized)
        else:
            plain = torch.cat([_plain(part).to(self.dtype) for part in parts])
            whole = plain if bits is None else quantize(plain, bits) or plain
        outs = whole.shape[0]
        if gated:
            whole = _interleave(whole) if isinstance(whole, torch.Tensor) else whole.rows(_interleave)
        if isinstance(whole, Quantized):
            panels = pack_quantized(whole.stored, whole.scale, whole.min, bits=whole.bits, zero=whole.zero)
        else:
            panels = pack(whole)
        return replace(panels, outs=outs)

    def _stored(self, piece: Piece) -> list[torch.Tensor | Quantized]:
        """The rows of a piece, as they are stored where that is wanted and can be cut so."""
        if self.quantize != "stored" or piece.transposed:
            whole: torch.Tensor | Quantized = self._take(piece)
        else:
            whole = self.tensors.take_stored(f"{piece.name}.weight", piece.shape)
        if isinstance(whole, Quantized):
            return [whole.rows(_cut(run)).columns(piece.columns) for run in piece.rows]
        return [whole[run, piece.columns] for run in piece.rows]

    def _take(self, piece: Piece) -> torch.Tensor:
        stored = self.tensors.take(f"{piece.name}.weight", _stored_shape(piece))
        return stored.T if piece.transposed else stored

    def bias(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Of the pieces' rows."""
        parts = []
        for piece in pieces:
            stored = self.tensors.take(f"{piece.name}.bias", (piece.shape[0],))
            parts += [stored[run] for run in piece.rows]
        return torch.cat(parts).to(self.device, self.compute)


def _name(pieces: Sequence[Piece]) -> str:
    """What a pack calls the matrix of the pieces."""
    return " ".join(
        f"{p.name}[{r.start}:{r.stop}:{r.step or 1},{p.columns.start}:{p.columns.stop}]" for p in pieces for r in p.rows
    )


def _stored_shape(piece: Piece) -> tuple[int, int]:
    return (piece.shape[1], piece.shape[0]) if piece.transposed else piece.shape


def _cut(run: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: rows[run]


def _plain(part: torch.Tensor | Quantized) -> torch.Tensor:
    return part.dequantize() if isinstance(part, Quantized) else part


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """The panels of the first half and those of the second by turns, each half filled up to whole panels."""
    halves = rows.view(2, rows.shape[0] // 2, -1)
    halves = torch.nn.functional.pad(halves, (0, 0, 0, -halves.shape[1] % 16))
    return halves.view(2, halves.shape[1] // 16, 16, -1).transpose(0, 1).reshape(-1, rows.shape[1])
