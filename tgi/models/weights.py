"""Checkpoints on disk, read tensor by tensor: safetensors files, or one GGUF file. Knows no model."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        if paths and paths[0].suffix == ".gguf":
            entries = _gguf(paths, Path(files.folder) / "gguf_index.json")
        else:
            entries = _safetensors(paths, stack)
        head = f"{config.head_name}.weight"
        if not any(name.startswith(config.prefix) for name in entries):
            entries = {name if name == head else config.prefix + name: entry for name, entry in entries.items()}
        if config.unit_head and head in entries:
            entries[head] = _unit_rows(entries[head])
        tied = config.shape.tied
        ignored = {
            name
            for name in entries
            if _REDUNDANT.search(name) or (tied and name == head) or name.startswith(config.spare)
        }
        yield Weights({name: entry for name, entry in entries.items() if name not in ignored}, progress)


def _unit_rows(entry: Entry) -> Entry:
    """The same matrix with rows of length 1."""

    def read() -> torch.Tensor:
        return torch.nn.functional.normalize(entry.read().float())

    return replace(entry, read=read, read_stored=read)


_NOT_WEIGHTS = ("arguments", "args", "training")
"""A safetensors file with one of these in its name holds a training run's settings."""

_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Stored types that are plain numbers. Others (int8, float8) mean something only together with scales."""


def _safetensors(paths: Sequence[Path], stack: ExitStack) -> dict[str, Entry]:
    """One checkpoint in one or more files; an index of them is not needed."""
    entries: dict[str, Entry] = {}
    for path in paths:
        if any(word in path.name for word in _NOT_WEIGHTS):
            continue
        try:
            file: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise StartupError(f"{path}: not a readable safetensors file: {error}") from None
        for name in file.keys():  # noqa: SIM118  # a file handle has no iterator
            if name in entries:
                raise StartupError(f"{path}: tensor {name} is also in {entries[name].path}")
            stored = file.get_slice(name)
            if (kind := stored.get_dtype()) not in _WIDTH:
                raise StartupError(f"{path}: tensor {name} has type {kind}, which is not implemented")
            shape = tuple(stored.get_shape())
            read = partial(file.get_tensor, name)
            entries[name] = Entry(path, shape, math.prod(shape) * _WIDTH[kind], read, read)
    return entries


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
