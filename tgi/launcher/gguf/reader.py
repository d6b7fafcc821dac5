"""The GGUF container (ggml's docs/gguf.md, versions 2 and 3): metadata and the table of tensors. Knows no model.

Every length in the file is checked against the file: a truncated or hostile one ends in StartupError.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tgi.core.errors import StartupError


class _Type(NamedTuple):
    name: str
    elements: int
    """Per block."""
    bytes: int
    """Per block."""


TYPES: Mapping[int, _Type] = {
    0: _Type("F32", 1, 4),
    1: _Type("F16", 1, 2),
    2: _Type("Q4_0", 32, 18),
    3: _Type("Q4_1", 32, 20),
    6: _Type("Q5_0", 32, 22),
    7: _Type("Q5_1", 32, 24),
    8: _Type("Q8_0", 32, 34),
    10: _Type("Q2_K", 256, 84),
    11: _Type("Q3_K", 256, 110),
    12: _Type("Q4_K", 256, 144),
    13: _Type("Q5_K", 256, 176),
    14: _Type("Q6_K", 256, 210),
    30: _Type("BF16", 1, 2),
}
"""ggml's tensor types that the engine can read."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies and how it is stored."""

    type: str
    shape: tuple[int, ...]
    """Rows first, as torch has it; the file has it the other way round."""
    offset: int
    """From the start of the file."""
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Everything in a GGUF file but the tensors' values."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def section(self, prefix: str) -> "Section":
        """The metadata whose keys begin with ``prefix`` and a dot."""
        return Section(
            prefix, {k.removeprefix(f"{prefix}."): v for k, v in self.metadata.items() if k.startswith(f"{prefix}.")}
        )

    def floats(self, name: str) -> list[float] | None:
        """The values of a small F32 tensor, None if the file has none of this name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type != "F32":
            raise StartupError(f"tensor {name} has type {tensor.type}, expected F32")
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            return list(struct.unpack(f"<{tensor.bytes // 4}f", file.read(tensor.bytes)))


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Section:
    """Part of the metadata, by key without prefix, checked for its types as it is read."""

    prefix: str
    values: Mapping[str, Any]

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """The value, None if the file doesn't have it; StartupError if it is of another type."""
        value = self.values.get(key)
        return None if value is None else self._checked(key, value, kind)

    def need(self, key: str, kind: type[_T]) -> _T:
        if (value := self.get(key, kind)) is None:
            raise StartupError(f"{self.prefix}.{key} is missing")
        return value

    def list(self, key: str, kind: type[_T]) -> list[_T] | None:
        values = self.get(key, list)
        return None if values is None else [self._checked(key, value, kind) for value in values]

    def _checked(self, key: str, value: Any, kind: type[_T]) -> _T:
        if kind is float and type(value) is int:
            return kind(value)  # type: ignore[call-arg]  # kind is float
        if type(value) is not kind:
            raise StartupError(f"{self.prefix}.{key}: expected {kind.__name__}, got {str(value)[:80]!r}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of the file at ``path``."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except (OSError, ValueError, struct.error) as error:
        raise StartupError(f"{path}: not a readable GGUF file: {error}") from None


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not start with GGUF")
    cursor.at = 4
    version, tensors, entries = cursor.unpack("<IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}; known: 2, 3")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.unpack("<I")[0])
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(f"split.count: one of {parts} parts; merge them first")
    table = {}
    for _ in range(tensors):
        name = cursor.string()
        (rank,) = cursor.unpack("<I")
        *shape, kind, offset = cursor.unpack(f"<{rank}QIQ")
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise ValueError(f"tensor {name} has ggml type {kind}, which is not implemented; known: {known}")
        table[name] = kind, shape[::-1], offset
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment: {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, {name: _locate(data, start, name, *row) for name, row in table.items()})


def _locate(data: mmap.mmap, start: int, name: str, kind: int, shape: list[int], offset: int) -> GgufTensor:
    type_ = TYPES[kind]
    if not shape or shape[-1] % type_.elements:
        raise ValueError(f"tensor {name} has shape {shape}, which {type_.name} can't hold")
    size = math.prod(shape) // type_.elements * type_.bytes
    if start + offset + size > len(data):
        raise ValueError(f"truncated: tensor {name} ends at byte {start + offset + size} of {len(data)}")
    return GgufTensor(type_.name, tuple(shape), start + offset, size)


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads values one behind the other."""

    __slots__ = ("_data", "at")

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        text = self._data[self.at : self.at + length]
        if len(text) != length:
            raise ValueError(f"truncated: a string of {length} bytes at byte {self.at}")
        self.at += length
        return text.decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            (value,) = self.unpack("<" + _SCALARS[kind])
            return _shortest(value) if kind == 6 else value
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a metadata value of type {kind} at byte {self.at}")
        element, count = self.unpack("<IQ")
        if count > len(self._data):
            raise ValueError(f"truncated: an array of {count} values at byte {self.at}")
        if element == _ARRAY:
            raise ValueError(f"an array of arrays at byte {self.at}")
        if element in _SCALARS:
            return list(self.unpack(f"<{count}{_SCALARS[element]}"))
        return [self.value(element) for _ in range(count)]


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, where Python would read 9.999999747378752e-06."""
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value
