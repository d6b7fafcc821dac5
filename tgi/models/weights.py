"""A model's weights by the names that its dataflow knows: every tensor once, none forgotten."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from tgi.core.adapter import read_adapter
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.model_config import Experts
from tgi.core.numbers import PLAIN
from tgi.models.adapter import merge
from tgi.models.config import DecoderConfig
from tgi.models.files import read_files
from tgi.quantization.quantized import Dequantized, Entry, Packed, Rows
from tgi.quantization.scheme import METHODS


class Weights:
    """A checkpoint from which every tensor is taken once, none forgotten."""

    def __init__(self, entries: dict[str, Entry], progress: Callable[[int, int], None]) -> None:
        """``entries`` is emptied, so that what was read from a file at once goes as it is taken."""
        self._left = entries
        self._where = " or ".join(sorted({str(entry.path) for entry in entries.values()})) or "no file of weights"
        self._total = sum(entry.bytes for entry in entries.values())
        self._done = 0
        self._progress = progress

    @property
    def orders(self) -> dict[str, torch.Tensor]:
        """Of the columns of quantized matrices that have their own."""
        return {name: entry.order for name, entry in self._left.items() if entry.order is not None}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor ``name``; StartupError if it isn't there or has another shape than the config implies."""
        return self._taken(name, shape).values[:]

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """Count it as taken: its content is known already."""
        self._taken(name, shape)

    def rows(
        self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False
    ) -> Rows[torch.Tensor | Packed]:
        """The same for a matrix, or its transpose, whose rows will be asked for. ``stored``: quantized if they are
        stored so."""
        entry = self._taken(name, shape)
        if stored and entry.stored is not None and entry.turned == transposed:
            return entry.stored
        return entry.values[:].T if transposed else entry.values

    def factor(self, name: str) -> float | None:
        """A tensor that is one positive number, if it is there; StartupError if it is anything else."""
        if name not in self._left:
            return None
        entry = self._taken(name, self._left[name].shape)
        number = entry.values[:].flatten().float()
        if len(number) != 1 or not 0 < number.item() < math.inf:
            raise StartupError(f"{entry.path}: tensor {name}: expected one positive number, got {number.tolist()[:4]}")
        return number.item()

    def _taken(self, name: str, shape: tuple[int, ...]) -> Entry:
        if (entry := self._left.pop(name, None)) is None:
            raise StartupError(f"{self._where}: tensor {name} is missing")
        if entry.shape != shape:
            raise StartupError(f"{entry.path}: tensor {name} has shape {entry.shape}, the config implies {shape}")
        self._done += entry.bytes
        self._progress(self._done, self._total)
        return entry

    def finish(self) -> None:
        """StartupError if anything is left: what a model does not use, it does not compute."""
        if self._left:
            name = min(self._left)
            others = f" (nor are {len(self._left) - 1} others)" if len(self._left) > 1 else ""
            raise StartupError(f"{self._left[name].path}: tensor {name} is not used by this architecture{others}")


@contextmanager
def open_weights(files: ModelFiles, config: DecoderConfig, progress: Callable[[int, int], None]) -> Iterator[Weights]:
    """The weights of a model. Where the head is the embedding, a stored one is a copy of it."""
    with ExitStack() as stack:
        entries = config.used(read_files([Path(path) for path in files.weights], Path(files.folder), stack))
        embedding, head = f"{config.embed_name}.weight", f"{config.head_name}.weight"
        if config.scheme is not None:
            unpack = importlib.import_module(METHODS[config.scheme.method].module).unpack
            plain, entries = entries, unpack(entries, config.scheme)
            for name in entries.keys() - plain.keys() - {head}:
                # Packed tensors are the same for modules whose weights are [in, out].
                entries[name] = _turned(entries[name]) if config.transposed else entries[name]
            if head in entries and entries[head].shape[0] == -(-config.shape.vocab // 32) * 32:
                # ExLlamaV2 fills matrices up to whole words of its kernels.
                entries[head] = replace(entries[head], shape=(config.shape.vocab, *entries[head].shape[1:]))
        if config.shape.tied:
            entries.pop(head, None)
        if config.experts is not None:
            entries = _unstacked(entries, config.experts)
        if files.adapter:
            description, *paths = map(Path, files.adapter)
            own = read_files(paths, Path(files.folder), stack)
            merged = merge(entries, own, read_adapter(description), transposed=config.transposed)
            for name in (embedding, head):
                if config.shape.tied and merged.get(name) is not entries.get(name):
                    raise StartupError(f"{paths[0]}: changes tensor {name}, which is embedding and head in one")
            entries = merged
        if config.unit_head and head in entries:
            entries[head] = replace(entries[head], values=_Unit(entries[head].values), stored=None)
        for name, entry in entries.items():
            if entry.kind not in PLAIN:
                rule = "no quantization_config explains" if config.scheme is None else f"{config.scheme.method} forbids"
                raise StartupError(f"{entry.path}: tensor {name} has type {entry.kind}, which {rule}")
        yield Weights(entries, progress)


def _turned(entry: Entry) -> Entry:
    """The transpose of a quantized matrix, whose own rows stay at hand."""
    return replace(entry, shape=entry.shape[::-1], values=_Transpose(entry.values), turned=True)


@dataclass(frozen=True, slots=True)
class _Transpose:
    matrix: Rows[torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.matrix[:].T[rows]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A matrix with rows of length 1."""

    matrix: Rows[torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return torch.nn.functional.normalize(self.matrix[rows].float())


def _unstacked(entries: Mapping[str, Entry], experts: Experts) -> dict[str, Entry]:
    """Every expert's matrices by names of their own."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stack = next((stack for stack in experts.stacks if name.endswith(f".{experts.block}.{stack.name}")), None)
        if stack is None:
            found[name] = entry
            continue
        count = experts.count * len(stack.matrices)
        rows, rest = divmod(math.prod(entry.shape[:-1]), count)
        if rest:
            raise StartupError(
                f"{entry.path}: tensor {name} has shape {entry.shape}, the config implies {count} matrices"
            )
        shape = (entry.shape[-1], rows) if stack.transposed else (rows, entry.shape[-1])
        for at, (expert, matrix) in enumerate(product(range(experts.count), stack.matrices)):
            own = slice(at * rows, (at + 1) * rows)
            values: Rows[torch.Tensor] = _OneOf(entry.values, own, stack.transposed)
            stored = None
            if entry.stored is not None:
                stored = _Part(entry.stored, range(own.start, own.stop))
                values = _OneOf(Dequantized(stored), slice(None), stack.transposed)
            module = f"{name.removesuffix(stack.name)}experts.{expert}.{matrix}"
            found[f"{module}.weight"] = Entry(
                entry.path, shape, entry.bytes // count, entry.kind, values, None if stack.transposed else stored
            )
    return found


@dataclass(frozen=True, slots=True)
class _OneOf:
    """One of several matrices that lie one behind the other."""

    stack: Rows[torch.Tensor]
    own: slice
    """Its rows, if all are counted."""
    transposed: bool

    def __getitem__(self, rows: slice) -> torch.Tensor:
        matrix = self.stack[:].flatten(0, -2)[self.own]
        return (matrix.T if self.transposed else matrix)[rows]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a quantized matrix, or of a stack of them."""

    stack: Rows[torch.Tensor | Packed]
    own: range

    def __getitem__(self, rows: slice) -> torch.Tensor | Packed:
        own = self.own[rows]
        return self.stack[own.start : own.stop : own.step]
