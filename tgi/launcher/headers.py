"""What a model's files of weights say of their tensors. Reads no numbers, imports no torch."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tgi.core.adapter import place
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.pickled import read_pickled


class Header(NamedTuple):
    """One tensor. Equal ones are one and the same, under several names."""

    type: str
    """As its format names it; for pickles as safetensors does."""
    shape: tuple[int, ...]
    place: tuple[object, ...]
    """Where it lies."""


def read_headers(files: ModelFiles) -> dict[str, Header]:
    """By name, as the model will have them. StartupError names the file that can't be read."""
    headers: dict[str, Header] = {}
    for path in map(Path, files.weights):
        if path.suffix == ".gguf":
            headers |= _parsed(Path(files.folder) / "gguf_index.json", lambda index: json.loads(index.read_bytes()))
        else:
            headers |= _file(path)
    for path in map(Path, files.adapter[1:]):
        headers |= replaced(path)
    return headers


def replaced(adapter: Path) -> dict[str, Header]:
    """The base's tensors that the weights of an adapter hold as a whole."""
    try:
        places = {place(name): header for name, header in _file(adapter).items()}
    except ValueError as error:
        raise StartupError(f"{adapter}: {error}") from None
    return {name: header for (name, part), header in places.items() if part == "whole"}


def _file(path: Path) -> dict[str, Header]:
    if path.suffix not in (".bin", ".pt"):
        return _parsed(path, _safetensors)
    return {
        name: Header(tensor.dtype, tensor.shape, (path, tensor.storage, tensor.offset, tensor.stride))
        for name, tensor in read_pickled(path).items()
    }


def _parsed(path: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Header]:
    """Of rows with type and shape."""
    try:
        return {
            name: Header(str(row.get("dtype") or row["type"]), tuple(map(int, row["shape"])), (path, name))
            for name, row in read(path).items()
        }
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path} can't be read: {error}") from None


def _safetensors(path: Path) -> dict[str, Any]:
    """Name → dtype and shape. The format: a 64-bit length and as many bytes of JSON, then the data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        tensors: dict[str, Any] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors
