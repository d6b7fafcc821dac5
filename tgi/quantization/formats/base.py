"""What formats have in common: a matrix's stored tensors, judged by what files' headers tell of them, and the bytes
that they become. No torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from tgi.core.errors import StartupError

FLOATS = ("F16", "BF16", "F32")
GRAIN = 16
"""Columns that share a scale in our kernels for integers: a multiple of this, …"""
WIDEST = 128
"""… and no more, for activations are rounded in the same groups."""


class Stored(Protocol):
    """A tensor of a checkpoint, of which no number is known."""

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> str:
        """Number format, as safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Stored)


@dataclass(frozen=True, slots=True)
class Module(Generic[T]):
    """The tensors that stand for a matrix, or for a stack of them."""

    name: str
    """What their names begin with."""
    method: str
    parts: Mapping[str, T]
    """By what stands behind that."""

    @property
    def path(self) -> Path:
        return next(iter(self.parts.values())).path

    def part(self, part: str, kinds: tuple[str, ...], *shapes: tuple[int, ...], rule: str = "") -> T:
        """One that must be there, of one of the ``kinds`` and, by a ``rule``, of one of the ``shapes``, if there are
        any; else StartupError."""
        if part not in self.parts:
            raise StartupError(f"{self.path}: tensor {self.name}{part} is missing, which {self.method} implies")
        found = self.parts[part]
        if found.kind not in kinds:
            raise self.wrong(part, f"has type {found.kind}, {self.method} implies {' or '.join(kinds)}")
        if shapes and found.shape not in shapes:
            says = f"{self.method} with {rule}" if rule else self.method
            implied = " or ".join(map(str, dict.fromkeys(shapes)))
            raise self.wrong(part, f"has shape {found.shape}, {says} implies {implied}")
        if 0 in found.shape:
            raise self.wrong(part, f"has shape {found.shape}, which is empty")
        return found

    def matrix(self, part: str, kinds: tuple[str, ...], *multiples: int) -> tuple[int, ...]:
        """The shape of one that must be there, with as many axes as there are ``multiples``, of which each is one."""
        shape = self.part(part, kinds).shape
        if len(shape) != len(multiples) or any(size % times for size, times in zip(shape, multiples, strict=True)):
            raise self.wrong(part, f"has shape {shape}, {self.method} implies multiples of {multiples}")
        return shape

    def wrong(self, part: str, what: str) -> StartupError:
        return StartupError(f"{self.parts[part].path}: tensor {self.name}{part} {what}")


class Size(NamedTuple):
    """Of a quantized matrix, or a stack of them."""

    shape: tuple[int, ...]
    width: float | None
    """Bytes of a number with its share of scales, as our kernels hold it; None: plain, since none multiplies it."""


def integers(shape: tuple[int, ...], bits: int, run: int, scale: int) -> Size:
    """Of integers. ``run``: columns whose scales and minima, ``scale`` bytes, are the same; multiples of it too."""
    unit = widest(run)
    return Size(shape, None if unit % GRAIN else (0.5 if bits <= 4 else 1) + scale / unit)


def widest(run: int) -> int:
    """The largest part of ``run`` columns that our kernels can do or, if there is none, the largest of at most
    WIDEST."""
    sizes = [size for size in range(1, WIDEST + 1) if run % size == 0]
    return max(sizes, key=lambda size: (size % GRAIN == 0, size))


class Held(NamedTuple):
    """What a stored tensor has of a quantized matrix."""

    numbers: int
    width: float | None
    """As in Size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(ABC):
    """How a checkpoint says that its weights are quantized."""

    PARTS: ClassVar[tuple[str, ...]]
    """What stands behind a module's name in those of its tensors. Which may be missing ``size`` knows."""
    MADE: ClassVar[str] = "weight"
    """What stands there in the name of the matrix."""
    BESIDE: ClassVar[frozenset[str]] = frozenset()
    """Last parts of the names of tensors that change nothing."""

    method: str
    rounds: bool = False
    """What is multiplied by float8 is meant to be rounded to it, too."""

    @property
    def names(self) -> tuple[str, ...]:
        """What ``--quantize`` may call it."""
        return (self.method,)

    @abstractmethod
    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        """Of the names of each module's tensors."""

    @abstractmethod
    def size(self, module: Module[T]) -> Size:
        """Of what a module's tensors make; StartupError names the tensor that can't be, and the rule."""

    def modules(self, tensors: Mapping[str, T]) -> Iterator[Module[T]]:
        """What is quantized; StartupError if it is there twice."""
        for name in self.beginnings(tensors):
            parts = {part: tensors[name + part] for part in self.PARTS if name + part in tensors}
            module = Module(name, self.method, parts)
            if self.MADE not in self.PARTS and (weight := name + self.MADE) in tensors:
                raise module.wrong(next(iter(parts)), f"stands for {weight}, which is also there")
            yield module

    def beside(self, name: str) -> bool:
        """Whether a tensor changes nothing."""
        return name.rpartition(".")[2] in self.BESIDE

    def held(self, tensors: Mapping[str, Stored]) -> dict[str, Held]:
        """The tensors that stand for quantized matrices, and what stands beside them. The others are as they are."""
        found = {name: Held(0, None) for name in tensors if self.beside(name)}
        for module in self.modules(tensors):
            size = self.size(module)
            found |= {module.name + part: Held(0, None) for part in module.parts}
            found[module.name + next(iter(module.parts))] = Held(math.prod(size.shape), size.width)
        return found
