"""Checkpoints on disk, read tensor by tensor: safetensors files, torch's own, or one GGUF file. Knows no model."""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.pickled import read_pickled
from tgi.models.config import DecoderConfig
from tgi.quantization import gguf
from tgi.quantization.quantized import Quantized


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor."""

    path: Path
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], torch.Tensor]
    """In floating point, on CPU; may be a view of the file."""
    read_stored: Callable[[], torch.Tensor | Quantized]
    """The same, and quantized if it is stored so."""


class Weights:
    """A checkpoint from which every tensor is taken once, none forgotten."""

    def __init__(self, entries: Mapping[str, Entry], progress: Callable[[int, int], None]) -> None:
        self._left = dict(entries)
        self._where = " or ".join(sorted({str(entry.path) for entry in entries.values()})) or "no file of weights"
        self._total = sum(entry.bytes for entry in entries.values())
        self._done = 0
        self._progress = progress

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor ``name``; StartupError if it isn't there or has another shape than the config implies."""
        return self._taken(name, shape).read()

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """Count it as taken: its content is known already."""
        self._taken(name, shape)

    def take_stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | Quantized:
        """The same, quantized if it is stored so."""
        return self._taken(name, shape).read_stored()

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


_REDUNDANT = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Tensors that some exports hold and that follow from the config: frequencies, and masks of what comes later."""


@contextmanager
def open_weights(files: ModelFiles, config: DecoderConfig, progress: Callable[[int, int], None]) -> Iterator[Weights]:
    """The weights of a model. Where the head is the embedding, a stored one is a copy of it."""
    paths = [Path(path) for path in files.weights]
    with ExitStack() as stack:
        suffix = paths[0].suffix if paths else ""
        if suffix == ".gguf":
            entries = _gguf(paths, Path(files.folder) / "gguf_index.json")
        elif suffix in (".bin", ".pt"):
            entries = _joined(map(_pickled, paths))
        else:
            entries = _joined(_safetensors(path, stack) for path in paths)
        head = f"{config.head_name}.weight"
        if not any(name.startswith(config.prefix) for name in entries):
            entries = {name if name == head else config.prefix + name: entry for name, entry in entries.items()}
        if config.unit_head and head in entries:
            entries[head] = _unit_rows(entries[head])
        tied = config.shape.tied
        ignored = {
            name
            for name in entries
            if (tied and name == head) or name.startswith(config.spare)
        }
        yield Weights({name: entry for name, entry in entries.items() if name not in ignored}, progress)


def _unit_rows(entry: Entry) -> Entry:
    """The same matrix with rows of length 1."""

    def read() -> torch.Tensor:
        return torch.nn.functional.normalize(entry.read().float())

    return replace(entry, read=read, read_stored=read)


_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Stored types that are plain numbers. Others (int8, float8) mean something only together with scales."""


def _joined(files: Iterable[Mapping[str, Entry]]) -> dict[str, Entry]:
    """One checkpoint of the files' tensors; an index of them is not needed."""
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in file.items():
            if name in entries:
                raise StartupError(f"{entry.path}: tensor {name} is also in {entries[name].path}")
            entries[name] = entry
    return entries


def _safetensors(path: Path, stack: ExitStack) -> dict[str, Entry]:
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path}: not a readable safetensors file: {error}") from None
    entries = {}
    for name in file.keys():  # noqa: SIM118  # a file handle has no iterator
        if _REDUNDANT.search(name):
            continue
        stored = file.get_slice(name)
        if (kind := stored.get_dtype()) not in _WIDTH:
            raise StartupError(f"{path}: tensor {name} has type {kind}, which is not implemented")
        shape = tuple(stored.get_shape())
        read = partial(file.get_tensor, name)
        entries[name] = Entry(path, shape, math.prod(shape) * _WIDTH[kind], read, read)
    return entries


def _pickled(path: Path) -> dict[str, Entry]:
    """A file of torch.save's. What its pickle may do is judged before torch, which is as strict, reads it."""
    rows = {name: row for name, row in read_pickled(path).items() if not _REDUNDANT.search(name)}
    for name, row in rows.items():
        if row.dtype not in _WIDTH:
            raise StartupError(f"{path}: tensor {name} has type {row.dtype}, which is not implemented")
    try:
        archive = zipfile.is_zipfile(path)  # else a file of torch's before 1.6, which can't be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise StartupError(f"{path}: not a readable file of torch.save's: {error}") from None
    return {
        name: Entry(path, row.shape, math.prod(row.shape) * _WIDTH[row.dtype], state[name].detach, state[name].detach)
        for name, row in rows.items()
    }


def _gguf(paths: Sequence[Path], index: Path) -> dict[str, Entry]:
    """A GGUF file by the index that was made at its import: parsing the file's own header takes seconds."""
    if len(paths) != 1:
        raise StartupError(f"{paths[0]}: expected one GGUF file, got {len(paths)} files")
    path = paths[0]
    try:
        rows = json.loads(index.read_bytes())
        # Copy on write, since torch has no read-only tensors. A plain array, since slices of a memmap are slow.
        data = np.asarray(np.memmap(path, np.uint8, mode="c"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path}: not readable by {index}: {error}") from None
    entries: dict[str, Entry] = {}
    for name, row in rows.items():
        shape, end = tuple(row["shape"]), row["offset"] + row["bytes"]
        if end > data.size:
            raise StartupError(f"{path}: truncated: tensor {name} ends at byte {end} of {data.size}")
        stored = gguf.Stored(
            data[row["offset"] : end], row["type"], shape, row.get("permuted_heads"), row.get("shift", 0.0)
        )
        entries[name] = Entry(path, shape, row["bytes"], stored.dequantize, stored.read)
    return entries
