"""What a model's files say of its tensors, and what its config.json says: all that is known before weights are read. No
torch."""

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tgi.core.adapter import place
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.model_config import read_config
from tgi.core.pickled import read_pickled


class Header(NamedTuple):
    """One tensor. Equal ones are one and the same, under several names."""

    kind: str
    """Number format, as the file's format names it; for pickles as safetensors does."""
    shape: tuple[int, ...]
    path: Path
    place: tuple[object, ...]
    """Where it lies in the file."""


REDUNDANT = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Tensors that some exports hold and that follow from the config: frequencies, and masks of what comes later."""


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
    return {name: header for name, header in headers.items() if not REDUNDANT.search(name)}


_TOLD = {"gptq_bits": "bits", "gptq_groupsize": "group_size"}
"""Tensors of one number in which TGI's own quantizer says how it quantized, and what a config calls that."""


def read_model(files: ModelFiles) -> dict[str, Any]:
    """The parsed config.json of a model. What tensors say of their quantization overrules it, or takes its place."""
    raw = read_config(files.folder)
    told: dict[str, int] = {}
    for path in map(Path, files.weights):
        if path.suffix == ".safetensors":
            rows = _parsed(path, _safetensors)
            told |= {key: _number(path, name) for name, key in _TOLD.items() if name in rows}
    known = raw.get("quantization_config") or {}
    if len(told) == len(_TOLD) and isinstance(known, dict):
        raw["quantization_config"] = {"quant_method": "gptq"} | known | told
    return raw


def _number(path: Path, name: str) -> int:
    """The integer that is all of a tensor."""
    row = _safetensors(path)[name]
    start, end = row["data_offsets"]
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length + start)
        data = file.read(end - start)
    if row["dtype"] not in ("I32", "I64") or len(data) not in (4, 8):
        raise StartupError(f"{path}: tensor {name}: expected one integer, got {row['dtype']} of shape {row['shape']}")
    return int.from_bytes(data, "little", signed=True)


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
        name: Header(tensor.dtype, tensor.shape, path, (tensor.storage, tensor.offset, tensor.stride))
        for name, tensor in read_pickled(path).items()
    }


def _parsed(path: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Header]:
    """Of rows with type and shape."""
    try:
        return {
            name: Header(str(row.get("dtype") or row["type"]), tuple(map(int, row["shape"])), path, (name,))
            for name, row in read(path).items()
        }
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path}: not a readable {path.suffix[1:]} file: {error}") from None


def _safetensors(path: Path) -> dict[str, Any]:
    """Name → dtype and shape. The format: a 64-bit length and as many bytes of JSON, then the data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        size = path.stat().st_size
        if length > size:
            raise ValueError("its header is longer than the file")
        tensors: dict[str, Any] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    for name, row in tensors.items():
        if 8 + length + row["data_offsets"][1] > size:
            raise ValueError(
                f"it is truncated: tensor {name} ends at byte {8 + length + row['data_offsets'][1]} of {size}"
            )
    return tensors
