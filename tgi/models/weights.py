"""Checkpoints on disk, read tensor by tensor: safetensors files, or one GGUF file. Knows no model."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError

Progress = Callable[[int, int], None]


class Weights(Protocol):
    """A checkpoint that knows what has been taken from it."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...

    def finish(self) -> None:
        """StartupError if a tensor that means something was never taken."""


@contextmanager
def open_weights(files: ModelFiles, *, tied: bool, progress: Progress) -> Iterator[Weights]:
    """``tied``: the head is the embedding, so a stored lm_head is a copy of it."""
    paths = [Path(path) for path in files.weights]
    if any(path.suffix == ".gguf" for path in paths):
        if len(paths) != 1:
            raise StartupError(f"{paths[0]}: expected one GGUF file, got {len(paths)} files")
        yield GgufWeights(paths[0], Path(files.folder) / "gguf_index.json", progress)
        return
    with SafetensorsFiles(paths, tied, progress) as weights:
        yield weights


_NOT_WEIGHTS = ("arguments", "args", "training")
"""A safetensors file with one of these in its name holds a training run's settings."""

_REDUNDANT = re.compile(r"rotary_emb\.inv_freq$|masked_bias$")
"""Tensors that some exports hold and that follow from the config."""


class SafetensorsFiles:
    """One checkpoint in one or more files; their index is not needed."""

    def __init__(self, paths: list[Path], tied: bool, progress: Progress) -> None:
        self._stack = ExitStack()
        self._files: dict[str, tuple[Path, Any]] = {}
        self._progress = progress
        self._done = self._total = 0
        for path in paths:
            if path.suffix != ".safetensors" or any(word in path.name for word in _NOT_WEIGHTS):
                continue
            self._open(path)
        self._left = {name for name in self._files if not _REDUNDANT.search(name)}
        if tied:
            self._left.discard("lm_head.weight")

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise StartupError(f"{path}: not a readable safetensors file: {error}") from None
        self._total += path.stat().st_size
        for name in file.keys():  # noqa: SIM118  # not a mapping: it has no iterator
            if name in self._files:
                raise StartupError(f"{path}: tensor {name} is also in {self._files[name][0].name}")
            self._files[name] = path, file

    def __enter__(self) -> "SafetensorsFiles":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The stored tensor, a view of the mapped file."""
        if name not in self._files:
            where = ", ".join(sorted({path.name for path, _ in self._files.values()})) or "no file"
            raise StartupError(f"{where}: tensor {name} is missing")
        if name not in self._left:
            raise StartupError(f"tensor {name} is asked for twice")
        path, file = self._files[name]
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise StartupError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {shape}")
        self._left.remove(name)
        self._done += tensor.nbytes
        self._progress(self._done, self._total)
        return tensor

    def finish(self) -> None:
        if self._left:
            name = min(self._left)
            raise StartupError(
                f"{self._files[name][0]}: tensor {name} is not used by this architecture ({len(self._left)} in all)"
            )
        self._progress(self._total, self._total)


_PLAIN = {"F32": np.float32, "F16": np.float16}


class GgufWeights:
    """One GGUF file by the index that was made of it at import: parsing its own header takes seconds."""

    def __init__(self, path: Path, index: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress
        try:
            self._index: Mapping[str, Any] = json.loads(index.read_bytes())
            # Copy on write, since torch has no read-only tensors; a plain array, since slices of a memmap are slow.
            self._data = np.asarray(np.memmap(path, np.uint8, mode="c"))
        except (OSError, ValueError) as error:
            raise StartupError(f"{path}: not readable by {index}: {error}") from None
        self._left = set(self._index)
        self._done, self._total = 0, sum(entry["bytes"] for entry in self._index.values())

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor in float32, or a view of the file where it is stored as plain floats."""
        if (entry := self._index.get(name)) is None:
            raise StartupError(f"{self._path}: tensor {name} is missing")
        if name not in self._left:
            raise StartupError(f"tensor {name} is asked for twice")
        if tuple(entry["shape"]) != shape:
            raise StartupError(f"{self._path}: tensor {name} has shape {entry['shape']}, the config asks for {shape}")
        stored = self._data[entry["offset"] : entry["offset"] + entry["bytes"]]
        if stored.nbytes != entry["bytes"]:
            raise StartupError(f"{self._path}: truncated: tensor {name} ends behind the file")
        values = _dequantize(stored, entry["type"], shape)
        if heads := entry.get("permuted_heads"):
            values = _unpermute(values, heads)
        self._left.remove(name)
        self._done += entry["bytes"]
        self._progress(self._done, self._total)
        return values

    def finish(self) -> None:
        if self._left:
            name = min(self._left)
            raise StartupError(
                f"{self._path}: tensor {name} is not used by this architecture ({len(self._left)} in all)"
            )


def _dequantize(stored: Any, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """ggml's blocks, as uint8, to values."""
    if kind in _PLAIN:
        return torch.from_numpy(stored.view(_PLAIN[kind])).view(shape)
    if kind == "BF16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).view(shape)
    from gguf import GGMLQuantizationType, dequantize

    return torch.from_numpy(dequantize(stored.reshape(*shape[:-1], -1), GGMLQuantizationType[kind]))


def _unpermute(values: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's llama files hold the rows of each head of q and k so that the two values that rotate together lie side by
    side: 0, half, 1, half + 1, …; this restores 0, 1, …, half, half + 1, …"""
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
