"""GGUF files seen as model folders: their metadata, written as the JSON files that every other part reads. No torch."""

import hashlib
import json
from pathlib import Path

from tgi.core.errors import StartupError
from tgi.core.model_config import ModelShape
from tgi.launcher.gguf.config import convert_config
from tgi.launcher.gguf.reader import read_gguf
from tgi.launcher.layout import write_folder

__all__ = ["import_gguf"]

_VERSION = 3
"""Part of a folder's key: raised when what is written into it changes."""


def import_gguf(path: Path, cache: Path) -> Path:
    """The folder under ``cache`` with config.json, tokenizer.json, tokenizer_config.json, generation_config.json and
    gguf_index.json of the file at ``path``; written on first use. StartupError names what can't be read.

    The key is the file's path, size, modification time and first bytes: a file that was replaced is read anew without
    hashing gigabytes.
    """
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    key = hashlib.sha256(f"{_VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} ".encode() + head).hexdigest()
    folder = cache / f"{path.stem}-{key[:16]}"
    if folder.is_dir():
        return folder
    try:
        return write_folder(folder, _convert(path))
    except OSError as error:
        raise StartupError(f"{cache}: {error.strerror}: no place for what is read from {path}") from None


def _convert(path: Path) -> dict[str, str]:
    """File name → text of everything in the folder."""
    from tgi.launcher.gguf.tokenizer import convert_tokenizer  # builds on the tokenizers package, slow to import

    file = read_gguf(path)
    try:
        config, index = convert_config(file)
        tokenizer, tokenizer_config, generation_config = convert_tokenizer(file)
        tokenizer_config["model_max_length"] = ModelShape.read(config).max_position_embeddings
    except StartupError as error:
        raise StartupError(f"{path}: {error}") from None
    return {
        "config.json": json.dumps(config, indent=2),
        "gguf_index.json": json.dumps(index),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation_config, indent=2),
    }
