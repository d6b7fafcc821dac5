"""Files of weights, each tensor ready to be read: safetensors, torch's own, GGUF. Knows formats, no model."""

import json
import math
import pickle
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tgi.core.errors import StartupError
from tgi.core.headers import REDUNDANT
from tgi.core.numbers import WIDTH
from tgi.core.pickled import read_pickled
from tgi.quantization import gguf
from tgi.quantization.quantized import Entry


def read_files(paths: Sequence[Path], folder: Path, stack: ExitStack) -> dict[str, Entry]:
    """The tensors of one checkpoint in one or more files; an index of them is not needed. ``folder``: has the index of
    a GGUF file. ``stack``: closes the files."""
    if paths and paths[0].suffix == ".gguf":
        return _gguf(paths, folder / "gguf_index.json")
    entries: dict[str, Entry] = {}
    for path in paths:
        found = _pickled(path) if path.suffix in (".bin", ".pt") else _safetensors(path, stack)
        for name, entry in found.items():
            if name in entries:
                raise StartupError(f"{path}: tensor {name} is also in {entries[name].path}")
            entries[name] = entry
    return entries


def _safetensors(path: Path, stack: ExitStack) -> dict[str, Entry]:
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path}: not a readable safetensors file: {error}") from None
    entries = {}
    for name in file.keys():  # noqa: SIM118  # a file handle has no iterator
        if REDUNDANT.search(name):
            continue
        stored = file.get_slice(name)
        kind, shape = stored.get_dtype(), tuple(stored.get_shape())
        if kind not in WIDTH:
            raise StartupError(f"{path}: tensor {name} has type {kind}, which is not implemented")
        entries[name] = Entry(path, shape, math.prod(shape) * WIDTH[kind], kind, _Mapped(file, name))
    return entries


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A tensor of a safetensors file."""

    file: Any
    name: str

    def __getitem__(self, rows: slice) -> torch.Tensor:
        tensor: torch.Tensor = self.file.get_tensor(self.name)
        return tensor.reshape(tensor.shape or 1)[rows]


def _pickled(path: Path) -> dict[str, Entry]:
    """A file of torch.save's. What its pickle may do is judged before torch, which is as strict, reads it."""
    rows = {name: row for name, row in read_pickled(path).items() if not REDUNDANT.search(name)}
    for name, row in rows.items():
        if row.dtype not in WIDTH:
            raise StartupError(f"{path}: tensor {name} has type {row.dtype}, which is not implemented")
    try:
        archive = zipfile.is_zipfile(path)  # else a file of torch's before 1.6, which can't be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise StartupError(f"{path}: not a readable file of torch.save's: {error}") from None
    return {
        name: Entry(
            path,
            row.shape,
            math.prod(row.shape) * WIDTH[row.dtype],
            row.dtype,
            state[name].detach().reshape(row.shape or 1),
        )
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
        stored = gguf.Stored(data[row["offset"] : end], row["type"], shape, row.get("order"), row.get("shift", 0.0))
        entries[name] = Entry(path, shape, row["bytes"], "F32", stored, gguf.Kept(stored))
    return entries
