"""What a layer needs to take its weights: the checkpoint's tensors by name, and what becomes of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

from tgi.kernels.library import Library
from tgi.kernels.panels import OUTPUTS, Panels, assemble, pack, pack_codes, pack_float8, pack_quantized
from tgi.kernels.triton import runs_on
from tgi.parallel import Group
from tgi.quantization.base import JoinedLinear, LinearMethod, NativeLinear, dense
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.packed import Pack
from tgi.quantization.quantized import Packed, Quantized, Rows, common, one_order, stack
from tgi.quantization.rounding import ROUNDING, VOCABULARY

if TYPE_CHECKING:
    from tgi.kernels.triton.experts import Matrices


class Tensors(Protocol):
    """A checkpoint. Reading the same tensor twice is an error, so that none is forgotten or mistaken."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on CPU in its stored dtype, read-only; StartupError if missing or of another shape."""

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """The tensor is known already; errors as with ``take``."""

    def rows(
        self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False
    ) -> Rows[torch.Tensor | Packed]:
        """The same for a matrix, or its transpose, whose rows will be asked for. ``stored``: quantized if they are
        stored so."""

    def factor(self, name: str) -> float | None:
        """The tensor, one positive number, if it is there; StartupError if it is anything else."""


class Shared:
    """Tensors of which each may be read several times."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._read: dict[str, torch.Tensor | Packed | None] = {}

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

    def rows(
        self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False
    ) -> Rows[torch.Tensor | Packed]:
        matrix = self.take(name, shape)
        return matrix.T if transposed else matrix

    def factor(self, name: str) -> float | None:
        return self._tensors.factor(name)


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
    """A name of ROUNDING: round matrices so; "stored": keep those as they are that the checkpoint holds quantized."""
    pack: Pack = field(default_factory=Pack)
    """Where packed matrices are kept."""
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Of the columns of matrices, by their names, that are stored in another than that of inputs (act-order)."""
    rounds: bool = False
    """What is multiplied by float8 may be rounded to it, too, as the checkpoint says."""
    fixed: bool = False
    """A token's result doesn't depend on what else a step computes (`--deterministic`); our own kernels' never does."""

    @property
    def compute(self) -> torch.dtype:
        """Of activations."""
        return self.dtype if self.library is None else torch.float32

    @property
    def triton(self) -> bool:
        """Whether the model runs on Triton's kernels."""
        return self.library is None and runs_on(self.device)

    @property
    def vocabulary(self) -> "Checkpoint":
        """The same for the vocabulary's matrices."""
        return replace(self, quantize=VOCABULARY.get(self.quantize, self.quantize))

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        """A whole small tensor in the numbers of activations, alike on all ranks."""
        return torch.empty(shape, dtype=self.compute, device=self.device).copy_(self.tensors.take(name, shape))

    def linear(self, pieces: Sequence[Piece], *, bias: bool, gated: bool = False) -> LinearMethod:
        """A method for the pieces' rows, one below the other. ``gated``: the first half of the rows gates the second,
        and the method will be asked for nothing else than that. ``bias``: added on every rank that has one."""
        offset = self.bias(pieces) if bias else None
        if self.quantize == "stored" and not one_order([self.orders.get(f"{piece.name}.weight") for piece in pieces]):
            parts = [None] * len(pieces) if offset is None else torch.split(offset, [piece.height for piece in pieces])
            each = zip(pieces, parts, strict=True)
            return JoinedLinear([self._method([piece], part) for piece, part in each])
        return self._method(pieces, offset, gated=gated)

    def _method(self, pieces: Sequence[Piece], offset: torch.Tensor | None, *, gated: bool = False) -> LinearMethod:
        if self.library is not None:
            return self.native(self.library, pieces, offset, gated=gated)
        matrix = self._matrix(pieces)
        return self._coded(matrix, offset) if self.quantize is not None else self.dense(self._table(matrix), offset)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearMethod:
        """A method for a plain ``weight`` [out, in] on the device."""
        return dense(weight, bias, fixed=self.fixed)

    def table(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The pieces as one tensor on the device, copied once."""
        return self._table(self._matrix(pieces))

    def _table(self, *matrices: "_Matrix") -> torch.Tensor:
        height = sum(matrix.height for matrix in matrices)
        weight = torch.empty(height, matrices[0].width, dtype=self.dtype, device=self.device)
        at = 0
        for matrix in matrices:
            for rows in _slabs(matrix.height, matrix.width, _SLAB if self.device.type == "cpu" else _DEVICE_SLAB):
                for part in matrix[rows]:
                    weight[at : at + part.shape[0]].copy_(_plain(part))
                    at += part.shape[0]
        return weight

    def _coded(self, matrix: "_Matrix", bias: torch.Tensor | None) -> LinearMethod:
        """The method of a device without our own kernels, which Triton's multiply quantized matrices on."""
        # Triton is only there, and only wanted, beside a GPU.
        from tgi.quantization.device import CodedLinear, Float8Linear, multiplied

        samples = matrix.samples()
        form = _form([samples])
        sample = self._joined(samples, form)
        if not multiplied(sample):
            return self.dense(self._table(matrix), bias)
        slabs = (self._joined(matrix[rows], form) for rows in _slabs(matrix.height, matrix.width, _DEVICE_SLAB))
        rounds = (self.rounds or self.quantize == "fp8") and self.dtype == torch.bfloat16
        if rounds and Float8Linear.takes(sample, matrix.height, self.device):
            return Float8Linear.of(slabs, (matrix.height, matrix.width), self.device, bias, fixed=self.fixed)
        return CodedLinear.of(slabs, matrix.height, self.device, bias, fixed=self.fixed)

    def experts(self, matrices: Sequence[Sequence[Piece]]) -> "Matrices":
        """Matrices of one size, each made of some pieces, one behind the other for Triton's kernels: quantized if all
        can be multiplied as they are in one form."""
        from tgi.kernels.triton import coded
        from tgi.kernels.triton.experts import Matrices
        from tgi.quantization.device import code, multiplied

        sources = [self._matrix(pieces) for pieces in matrices]
        if self.quantize is None:
            return Matrices(self._table(*sources), len(sources))
        samples = [source.samples() for source in sources]
        form = _form(samples)
        if not multiplied(self._joined(samples[0], form)):
            return Matrices(self._table(*sources), len(sources))
        height, width = sources[0].height, sources[0].width
        slabs = (
            code(self._joined(source[rows], form)) for source in sources for rows in _slabs(height, width, _DEVICE_SLAB)
        )
        weight = replace(coded.assemble(slabs, height * len(sources), self.device), order=None)
        order = None if form is None else _order(samples)
        return Matrices(weight, len(sources), None if order is None else order.to(self.device))

    def native(
        self,
        library: Library,
        pieces: Sequence[Piece],
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
    ) -> NativeLinear:
        """The pieces packed for our own kernel."""
        if self.pack.complete:
            for piece in pieces:
                self.tensors.skip(f"{piece.name}.weight", _stored_shape(piece))
        panels = self.pack.panels(_name(pieces), lambda: self._panels([pieces], gated))
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
        return self.pack.panels(name, lambda: self._panels(matrices, gated))

    def _panels(self, matrices: Sequence[Sequence[Piece]], gated: bool) -> Panels:
        """Of matrices of one size, some rows at a time."""
        sources = [self._matrix(pieces) for pieces in matrices]
        samples = [source.samples() for source in sources]
        form = _form(samples)
        height = sources[0].height

        def panels() -> Iterator[Panels]:
            for source in sources:
                for rows in _slabs(height // 2 if gated else height, source.width):
                    parts = source[rows]
                    if gated:
                        parts += source[slice(height // 2 + rows.start, height // 2 + rows.stop)]
                    yield _packed(self._joined(parts, form), gated, self.dtype)

        made = assemble(panels(), height, len(matrices))
        return made if form is None else replace(made, order=_order(samples))

    def _joined(self, parts: Sequence[torch.Tensor | Packed], form: Packed | None) -> torch.Tensor | Packed:
        """One below the other: quantized in the ``form`` they are stored in, or rounded, or plain."""
        if form is not None:
            return stack(parts, form)
        plain = torch.cat([_plain(part).to(self.device, self.dtype) for part in parts])
        rounded = ROUNDING[self.quantize](plain) if self.quantize in ROUNDING else None
        return plain if rounded is None else rounded

    def _matrix(self, pieces: Sequence[Piece]) -> "_Matrix":
        runs = []
        for piece in pieces:
            source = self.tensors.rows(
                f"{piece.name}.weight",
                _stored_shape(piece),
                stored=self.quantize == "stored",
                transposed=piece.transposed,
            )
            runs += [_Run(source, range(*rows.indices(piece.shape[0])), piece.columns) for rows in piece.rows]
        start, stop, _ = pieces[0].columns.indices(pieces[0].shape[1])
        return _Matrix(runs, stop - start)

    def bias(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Of the pieces' rows."""
        parts = []
        for piece in pieces:
            stored = self.tensors.take(f"{piece.name}.bias", (piece.shape[0],))
            parts += [stored[run] for run in piece.rows]
        return torch.cat(parts).to(self.device, self.compute)


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one of the checkpoint's matrices."""

    source: Rows[torch.Tensor | Packed]
    rows: range
    columns: slice

    def __getitem__(self, rows: slice) -> torch.Tensor | Packed:
        some = self.rows[rows]
        part = self.source[slice(some.start, some.stop, some.step)]
        return part[:, self.columns] if isinstance(part, torch.Tensor) else part.columns(self.columns)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Runs of rows, one below the other, read when they are asked for."""

    runs: Sequence[_Run]
    width: int

    @property
    def height(self) -> int:
        return sum(len(run.rows) for run in self.runs)

    def __getitem__(self, rows: slice) -> list[torch.Tensor | Packed]:
        """What these rows are made of."""
        found, at = [], 0
        for run in self.runs:
            start, stop = max(rows.start - at, 0), min(rows.stop - at, len(run.rows))
            if start < stop:
                found.append(run[start:stop])
            at += len(run.rows)
        return found

    def samples(self) -> list[torch.Tensor | Packed]:
        """A row of each run."""
        return [run[0:1] for run in self.runs]


_SLAB = 1 << 16
"""Numbers of a matrix that are read and packed at once, so that little memory is needed beside what is kept."""
_DEVICE_SLAB = 1 << 22
"""The same for a GPU, which takes many at once."""


def _slabs(height: int, width: int, numbers: int = _SLAB) -> Iterator[slice]:
    """Rows of a matrix, in runs of whole panels."""
    step = max(numbers // width // OUTPUTS, 1) * OUTPUTS
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _form(matrices: Sequence[Sequence[torch.Tensor | Packed]]) -> Packed | None:
    """What holds all parts exactly; None if some are plain, or lie above others with columns in another order."""
    parts = [part for part in chain.from_iterable(matrices) if not isinstance(part, torch.Tensor)]
    if len(parts) < sum(map(len, matrices)) or not all(
        one_order([part.order for part in matrix if isinstance(part, Quantized)]) for matrix in matrices
    ):
        return None
    return common(parts)


def _order(matrices: Sequence[Sequence[torch.Tensor | Packed]]) -> torch.Tensor | None:
    """int32 [matrices, inner]: the input that each column is of; None if they are in the order of inputs in all."""
    orders = [part.order for part, *_ in matrices if isinstance(part, Quantized)]
    if all(order is None for order in orders):
        return None
    usual = torch.arange(matrices[0][0].shape[1])
    return torch.stack([usual if order is None else order for order in orders]).int()


_COLUMNS: Mapping[type[Packed], int] = {Quantized: 16, Float8: 4, Codes: 8}
"""Our kernels multiply groups of a multiple of so many."""


def _packed(matrix: torch.Tensor | Packed, gated: bool, dtype: torch.dtype) -> Panels:
    """``dtype``: of what no kernel multiplies as it is."""
    if isinstance(matrix, torch.Tensor) or matrix.group % _COLUMNS[type(matrix)]:
        plain = _plain(matrix).to(dtype)
        return pack(_interleave(plain) if gated else plain)
    packed: Packed = matrix.rows(_interleave) if gated else matrix
    match packed:
        case Quantized():
            return pack_quantized(packed.stored, packed.scale, packed.min, bits=packed.bits, zero=packed.zero)
        case Float8():
            return pack_float8(packed.values, packed.scale)
        case Codes():
            return pack_codes(packed.codes, packed.table, packed.scale, packed.factor)


def _name(pieces: Sequence[Piece]) -> str:
    """What a pack calls the matrix of the pieces."""
    return " ".join(
        f"{p.name}[{r.start}:{r.stop}:{r.step or 1},{p.columns.start}:{p.columns.stop}]" for p in pieces for r in p.rows
    )


def _stored_shape(piece: Piece) -> tuple[int, int]:
    return (piece.shape[1], piece.shape[0]) if piece.transposed else piece.shape


def _plain(part: torch.Tensor | Packed) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else part.dequantize()


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """The panels of the first half and those of the second by turns, each half filled up to whole panels."""
    halves = rows.view(2, rows.shape[0] // 2, -1)
    halves = torch.nn.functional.pad(halves, (0, 0, 0, -halves.shape[1] % 16))
    return halves.view(2, halves.shape[1] // 16, 16, -1).transpose(0, 1).reshape(-1, rows.shape[1])
