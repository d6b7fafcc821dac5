"""What the files of a model repository are called, and whether a folder holds a whole model. Reads no weights."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from tgi.launcher.errors import DownloadError

TOKENIZER = ("tokenizer*.json", "chat_template*", "special_tokens_map.json")
"""Patterns of the files that say how text becomes tokens."""
SMALL_FILES = ("config.json", "quant*_config.json", "generation_config.json", "*.py", *TOKENIZER)
"""Python files are run with `--trust-remote-code` alone."""
_ADAPTER = "adapter_config.json"
_FORMATS = (".safetensors", ".bin", ".pt")
"""Best first. The others are pickles, which are read without running what they say."""
_NOT_WEIGHTS = ("arguments", "args", "training", "optimizer", "scheduler", "adapter_", "consolidated")
"""A file with one of these in its name holds a training run's state, an adapter, or the weights under other names."""


def weights(names: Iterable[str]) -> list[str]:
    """The files of weights at the root of a repository, all of the best format that it has."""
    plain = sorted(name for name in names if "/" not in name and not any(word in name for word in _NOT_WEIGHTS))
    formats = ([name for name in plain if name.endswith(suffix)] for suffix in _FORMATS)
    return next((found for found in formats if found), [])


def needed(names: Iterable[str], *, with_weights: bool = True) -> list[str]:
    """The files to fetch. Small ones first: a broken download then lacks weights, which are counted."""
    names = sorted(names)
    if is_adapter(names):
        return [_ADAPTER, *matching(names, TOKENIZER), _adapter_weights(names)]
    large = weights(names)
    patterns = (*SMALL_FILES, *(f"*{Path(name).suffix}.index.json" for name in large[:1]))
    small = matching(names, patterns)
    if not large and (with_weights or not small):
        raise DownloadError(no_weights(names))
    return small + large if with_weights else small


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names at the root of a repository."""
    return [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)]


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a repository holds a PEFT adapter and no model."""
    names = list(names)
    return _ADAPTER in names and not weights(names)


def adapter(folder: Path) -> tuple[Path, Path] | None:
    """The description and the weights of the adapter in a folder; None if there is none."""
    names = [path.name for path in folder.iterdir()]
    return (folder / _ADAPTER, folder / _adapter_weights(names)) if is_adapter(names) else None


def _adapter_weights(names: Iterable[str]) -> str:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if name in names:
            return name
    raise DownloadError("there is an adapter_config.json without adapter_model.safetensors or adapter_model.bin")


def no_weights(names: Iterable[str]) -> str:
    """Why there is nothing to serve among these files, and what to do."""
    names = sorted(names)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"there are only GGUF files; add the name of one to `--model-id`: {', '.join(gguf)}"
    return "there are no .safetensors, .bin or .pt files of weights"


def described(folder: Path) -> Path:
    """The folder, if it says what the model is, whether or not its weights are there; else DownloadError."""
    for name, lack in (("config.json", "is missing"), ("tokenizer.json", "is missing, and no other tokenizer is read")):
        if not (folder / name).exists():
            raise DownloadError(f"{folder / name} {lack}")
    return folder


def whole(folder: Path, weights_folder: Path) -> list[Path]:
    """The weight files of a model folder; DownloadError names what is missing."""
    described(folder)
    names = [path.name for path in weights_folder.iterdir()]
    found = weights(names)
    if not found:
        raise DownloadError(f"{weights_folder}: {no_weights(names)}")
    if missing := _promised(weights_folder, found) - set(found):
        raise DownloadError(f"{weights_folder / min(missing)} is missing")
    return [weights_folder / name for name in found]


def _promised(folder: Path, found: Sequence[str]) -> set[str]:
    """Weight files that must be there by an index or by a numbering (``-00001-of-00003``)."""
    promised: set[str] = set()
    suffix = Path(found[0]).suffix
    for index in folder.glob(f"*{suffix}.index.json"):
        try:
            promised |= set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DownloadError(f"{index} is not a readable index: {error}") from None
    for name in found:
        if match := re.fullmatch(rf"(.+-)(\d+)(-of-)(\d+){re.escape(suffix)}", name):
            stem, digits, of, count = match.groups()
            promised |= {f"{stem}{part:0{len(digits)}}{of}{count}{suffix}" for part in range(1, int(count) + 1)}
    return promised


def write_folder(folder: Path, files: Mapping[str, str | Path]) -> Path:
    """Make a folder, whole or not at all, of texts and of links to files. OSError if there is no place for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        for name, content in files.items():
            if isinstance(content, str):
                (draft / name).write_text(content, encoding="utf-8")
            else:
                (draft / name).symlink_to(content)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    return folder
