"""Packed weights on disk: a model is packed once, and mapped into memory from then on.

A pack is a folder: ``panels.bin`` with all matrices' panels, and ``index.json`` with their names and places. Its name
is a hash of the checkpoint's content and of how it was packed. Packs that nothing has used for a month are removed
when another is written.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgi.kernels.ops import Form
from tgi.kernels.panels import Panels

log = logging.getLogger(__name__)

VERSION = 1
"""Of the panels' layout and of how numbers are rounded: a new one makes all packs anew."""

_ALIGNMENT = 4096
_UNUSED_DAYS = 30
_WORTH = 8 << 20
"""Bytes; less is packed anew as fast as it is found."""
_PARTS = ("weight", "scale", "min")


@dataclass(slots=True)
class Pack:
    """The panels of one checkpoint: those on disk, or those that will be written by ``save``."""

    folder: Path | None
    """None: nothing is kept on disk."""
    _index: dict[str, Any] | None = None
    _data: Any = None
    _made: dict[str, Panels] = field(default_factory=dict)

    @classmethod
    def open(cls, cache: Path | None, weights: Sequence[Path], *how: object) -> "Pack":
        """Of the files ``weights``, packed ``how``. A cache that can't be read is as good as none."""
        if cache is None:
            return cls(None)
        try:
            digest = hashlib.blake2b(repr((VERSION, how)).encode(), digest_size=16)
            for path in weights:
                digest.update(_content(path, cache))
            pack = cls(cache / digest.hexdigest())
            if (pack._folder / "index.json").is_file():
                pack._index = json.loads((pack._folder / "index.json").read_bytes())
                # Copy on write, since torch has no read-only tensors. A plain array, since slices of a memmap are slow.
                pack._data = np.asarray(np.memmap(pack._folder / "panels.bin", np.uint8, mode="c"))
                os.utime(pack._folder)
            return pack
        except (OSError, ValueError) as error:
            log.warning("No packed weights are kept: %s", error)
            return cls(None)

    @property
    def _folder(self) -> Path:
        assert self.folder is not None
        return self.folder

    @property
    def complete(self) -> bool:
        """Whether the panels are on disk already."""
        return self._index is not None

    def panels(self, name: str, make: Callable[[], Panels]) -> Panels:
        """Those of ``name``, from disk or made now."""
        if self._index is None:
            made = make()
            self._made[name] = made
            return made
        row = self._index[name]
        parts = {part: self._tensor(row[part]) for part in _PARTS if part in row}
        return Panels(Form(row["form"]), row["outs"], row["inner"], group=row["group"], zero=row["zero"], **parts)

    def save(self) -> None:
        """Write what was made, for the next start. What can't be written is only said."""
        if self.folder is None or self.complete:
            return
        cache = self.folder.parent
        try:
            _remove_unused(cache)
            need = sum(tensor.nbytes for panels in self._made.values() for _, tensor in _tensors(panels))
            if need < _WORTH:
                return
            if shutil.disk_usage(cache).free < 2 * need:
                log.warning("No packed weights are kept: %s has no room for %d MB", cache, need >> 20)
                return
            with tempfile.TemporaryDirectory(dir=cache) as draft:
                pack = Path(draft, "pack")
                _write(pack, self._made)
                if not self.folder.exists():
                    pack.rename(self.folder)
        except OSError as error:
            log.warning("No packed weights are kept: %s", error)

    def _tensor(self, place: dict[str, Any]) -> torch.Tensor:
        at, shape, dtype = place["at"], place["shape"], getattr(torch, place["dtype"])
        size = int(np.prod(shape)) * dtype.itemsize
        if at + size > self._data.size:
            raise OSError(f"{self.folder}/panels.bin is truncated: remove the folder")
        return torch.from_numpy(self._data[at : at + size]).view(dtype).view(shape)


def _tensors(panels: Panels) -> Iterator[tuple[str, torch.Tensor]]:
    for part in _PARTS:
        if (tensor := getattr(panels, part)) is not None:
            yield part, tensor


def _write(folder: Path, made: dict[str, Panels]) -> None:
    folder.mkdir()
    index: dict[str, Any] = {}
    at = 0
    with (folder / "panels.bin").open("wb") as file:
        for name, panels in made.items():
            row: dict[str, Any] = {
                "form": int(panels.form),
                "outs": panels.outs,
                "inner": panels.inner,
                "group": panels.group,
                "zero": panels.zero,
            }
            for part, tensor in _tensors(panels):
                dtype = str(tensor.dtype).removeprefix("torch.")
                row[part] = {"at": at, "shape": list(tensor.shape), "dtype": dtype}
                at += file.write(tensor.view(torch.uint8).numpy().tobytes())
                at += file.write(bytes(-at % _ALIGNMENT))
            index[name] = row
    (folder / "index.json").write_text(json.dumps(index))


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
