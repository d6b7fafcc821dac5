"""Packed weights on disk: a model is packed once, and mapped into memory from then on.

A pack is a folder: ``panels.bin`` with all matrices' panels, and ``index.json`` with their names and places. Its name
is a hash of the checkpoint's content and of how it was packed. Packs that nothing has used for a month are removed
when another is written.
"""

import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tgi.core.errors import StartupError
from tgi.kernels.ops import Form
from tgi.kernels.panels import Panels

log = logging.getLogger(__name__)

VERSION = 6
"""Of the panels' layout and of how numbers are rounded: a new one makes all packs anew."""

_UNUSED_DAYS = 30
_WORTH = 8 << 20
"""Bytes; less is packed anew as fast as it is found."""
_SIZES = ("outs", "inner", "group", "zero", "count")
_PARTS = ("weight", "scale", "min", "order", "table", "factors")


class Pack:
    """The panels of one checkpoint: those on disk, or those that are being made and go there one by one.

    What is made is mapped from its file at once, so that no second copy of the weights is ever in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where the pack is or will be; None: nothing is kept on disk."""
        self._folder = folder
        self._index: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self.complete = False
        """Whether the panels are on disk already."""

    @classmethod
    def open(cls, cache: Path | None, weights: Sequence[Path], *how: object) -> "Pack":
        """Of the files ``weights``, packed ``how``. A cache that can't be used is as good as none."""
        if cache is None or sum(path.stat().st_size for path in weights) < _WORTH:
            return cls()
        try:
            digest = hashlib.blake2b(repr((VERSION, how)).encode(), digest_size=16)
            for path in weights:
                digest.update(_content(path, cache))
            pack = cls(cache / digest.hexdigest())
            pack._begin(sum(path.stat().st_size for path in weights))
            return pack
        except (OSError, ValueError) as error:
            log.warning("No packed weights are kept: %s", error)
            return cls()

    def panels(self, name: str, make: Callable[[], Panels]) -> Panels:
        """Those of ``name``, from disk or made now."""
        if not self.complete:
            made = make()
            if self._file is None:
                return made
            try:
                self._index[name] = self._write(made)
            except OSError as error:
                self._give_up(error)
                return made
        assert self._folder is not None
        row = self._index[name]
        fields: dict[str, Any] = {key: row[key] for key in _SIZES}
        fields |= {part: self._map(row[part]) for part in _PARTS if part in row}
        return Panels(Form(row["form"]), **fields)

    def save(self) -> None:
        """All panels are made: keep them for the next start."""
        if self._file is None:
            return
        assert self._folder is not None
        try:
            self._file.close()
            self._file = None
            (self._draft / "index.json").write_text(json.dumps(self._index))
            if self._folder.exists():  # somebody else was faster; what is mapped stays
                shutil.rmtree(self._draft)
            else:
                self._draft.rename(self._folder)
        except OSError as error:
            self._give_up(error)

    @property
    def _draft(self) -> Path:
        assert self._folder is not None
        return self._folder.with_name(f"{self._folder.name}.{os.getpid()}")

    @property
    def _data(self) -> Path:
        assert self._folder is not None
        return (self._folder if self.complete else self._draft) / "panels.bin"

    def _begin(self, size: int) -> None:
        """Read what there is, or make ready to write about ``size`` bytes."""
        assert self._folder is not None
        index = self._folder / "index.json"
        if index.is_file():
            self._index = json.loads(index.read_bytes())
            self.complete = True
            os.utime(self._folder)
            return
        cache = self._folder.parent
        _remove_unused(cache)
        if shutil.disk_usage(cache).free < 2 * size:
            log.warning("No packed weights are kept: %s has no room for %d MB", cache, size >> 20)
            return
        self._draft.mkdir()
        self._file = self._data.open("wb")

    def _write(self, panels: Panels) -> dict[str, Any]:
        assert self._file is not None
        row: dict[str, Any] = {"form": int(panels.form)} | {key: getattr(panels, key) for key in _SIZES}
        for part in _PARTS:
            tensor: torch.Tensor | None = getattr(panels, part)
            if tensor is not None:
                self._file.write(bytes(-self._file.tell() % mmap.ALLOCATIONGRANULARITY))
                dtype = str(tensor.dtype).removeprefix("torch.")
                row[part] = {"at": self._file.tell(), "shape": list(tensor.shape), "dtype": dtype}
                self._file.write(tensor.view(torch.uint8).numpy().data)
        self._file.flush()
        return row

    def _map(self, place: dict[str, Any]) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, place["dtype"])
        size = math.prod(place["shape"]) * dtype.itemsize
        with self._data.open("rb") as file:
            if place["at"] + size > os.fstat(file.fileno()).st_size:
                raise StartupError(f"{self._data} is truncated: remove its folder")
            # Copy on write, since torch has no read-only tensors.
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=place["at"])
        return torch.frombuffer(memory, dtype=dtype).view(place["shape"])

    def _give_up(self, error: OSError) -> None:
        """What was written so far stays mapped; the rest stays in memory."""
        log.warning("No packed weights are kept: %s", error)
        self._file = None
        shutil.rmtree(self._draft, ignore_errors=True)


def _content(path: Path, cache: Path) -> bytes:
    """Hash of a file's content, remembered for as long as the file is the same to the file system."""
    real = path.resolve()
    stat = real.stat()
    identity = repr((str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)).encode()
    cache.mkdir(parents=True, exist_ok=True)
    note = cache / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}.hash"
    if note.is_file() and len(known := note.read_bytes()) == 32:
        os.utime(note)
        return known
    with real.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
    draft = note.with_suffix(f".{os.getpid()}")
    draft.write_bytes(found)
    draft.replace(note)
    return found


def _remove_unused(cache: Path) -> None:
    oldest = time.time() - _UNUSED_DAYS * 86400
    for entry in cache.iterdir():
        if entry.stat().st_mtime < oldest:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
