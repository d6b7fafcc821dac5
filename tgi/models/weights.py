"""Checkpoints on disk, read tensor by tensor: safetensors files, or one GGUF file. Knows no model."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

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
    with SafetensorsFiles([Path(path) for path in files.weights], tied, progress) as weights:
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
