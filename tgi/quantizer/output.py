"""The folder that is written: a shard for each layer and one for the rest, so that what is done stays done."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tgi.core.errors import StartupError

_STATE = "tgi_quantize.json"
"""What the folder is made of and how: another run goes on where this one ended only if both are the same."""
_QUANTIZATION = "quantization_config"
"""Key of a shard's metadata: what another run needs to read it."""
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", "gguf_index.json", "quantize_config.json", "quant_config.json", _STATE)


class Output:
    """The folder, locked against other processes until it is left."""

    def __init__(self, folder: Path, made_of: Mapping[str, object], shards: int) -> None:
        """``made_of``: JSON. StartupError if the folder holds something else, or another process writes it."""
        self.folder = folder
        self._shards = shards
        state = folder / _STATE
        try:
            if not state.exists():
                folder.mkdir(parents=True, exist_ok=True)
                if any(folder.iterdir()):
                    raise StartupError(f"{folder} holds other files; name an empty folder, or one that isn't there")
                draft = folder.parent / f".{folder.name}.{os.getpid()}"
                draft.write_text(json.dumps(made_of, indent=2) + "\n")
                draft.replace(state)
            self._lock = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StartupError(f"{folder}: {error.strerror}") from None
        try:
            self._claim(made_of)
        except StartupError:
            os.close(self._lock)
            raise
        self.complete = (folder / "config.json").exists()
        self.done = next((number for number in range(shards) if not self.shard(number).exists()), shards)
        """Shards that are there, from the first on."""

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _claim(self, made_of: Mapping[str, object]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = json.loads((self.folder / _STATE).read_bytes())
        except BlockingIOError:
            raise StartupError(f"{self.folder} is being written by another process") from None
        except ValueError as error:
            raise StartupError(f"{self.folder / _STATE}: not valid JSON: {error}") from None
        for key, value in made_of.items():
            if there.get(key) != value:
                raise StartupError(
                    f"{self.folder} was begun with {key}: {there.get(key)!r}, not {value!r}; name another folder"
                )

    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` that the first shard was written with."""
        with safe_open(self.shard(0), framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()[_QUANTIZATION])
        return found

    def shard(self, number: int) -> Path:
        """The file, from 0 on."""
        return self.folder / f"model-{number + 1:05}-of-{self._shards:05}.safetensors"

    def write(self, number: int, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]) -> None:
        """A shard, whole or not at all."""
        draft = self.folder / ".draft"
        told = {"format": "pt", _QUANTIZATION: json.dumps(quantization)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, draft, told)
        draft.replace(self.shard(number))
        self.done = number + 1

    def finish(self, source: Path, config: Mapping[str, Any]) -> None:
        """All shards are there: what else a model folder has, most of it from ``source``, config.json last."""
        places: dict[str, str] = {}
        for number in range(self._shards):
            with safe_open(self.shard(number), framework="pt") as file:
                places |= dict.fromkeys(file.keys(), self.shard(number).name)
        size = sum(self.shard(number).stat().st_size for number in range(self._shards))
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in sorted(source.iterdir()):
            copied = any(fnmatch(path.name, pattern) for pattern in _COPIED)
            if path.is_file() and copied and not any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
                shutil.copyfile(path, self.folder / path.name)
        draft = self.folder / ".config"
        draft.write_text(json.dumps(config, indent=2) + "\n")
        draft.replace(self.folder / "config.json")
        self.complete = True
