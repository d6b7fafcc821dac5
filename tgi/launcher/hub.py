"""A model repository on the hub and in the hub's cache, through huggingface_hub, imported where it is needed."""

import logging
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tgi.launcher import layout
from tgi.launcher.errors import DownloadError
from tgi.launcher.progress import Progress

log = logging.getLogger(__name__)

T = TypeVar("T")


class Unreachable(Exception):
    """The hub gives no answer, or must not be asked."""

    def __init__(self, cause: str, *, offline: bool = False) -> None:
        super().__init__(cause)
        self.offline = offline


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository in the cache."""

    folder: Path
    sha: str
    pipeline_tag: str | None = None


@dataclass(frozen=True, slots=True)
class Repository:
    """What is wanted of the hub."""

    name: str
    revision: str | None
    file: str | None
    """A GGUF file in it; None: the repository is the model."""
    cache: str | None
    """huggingface_hub's folder; None: its own choice."""
    token: str | None
    """None: what huggingface_hub finds, HF_TOKEN first."""
    weights: Path | None
    """Files of weights come from this folder instead."""
    bare: bool = False
    """No weights are wanted, only what says what the model is."""

    def cached(self) -> Snapshot | None:
        """All that is wanted, from the cache, without touching the network."""
        name = self.revision or "main"
        try:
            sha = name if re.fullmatch("[0-9a-f]{40}", name) else (self._folder / "refs" / name).read_text().strip()
            folder = self._folder / "snapshots" / sha
            if self.file is not None:
                (folder / self.file).stat()
            elif layout.adapter(folder) is not None:
                pass
            elif self.bare:
                layout.described(folder)
            else:
                layout.whole(folder, self.weights or folder)
        except (OSError, DownloadError):
            return None
        return Snapshot(folder, sha)

    def fetch(self, deadline: float) -> Snapshot:
        """Ask the hub and download what the cache lacks.

        Raises Unreachable if there is no answer after ``deadline`` seconds, DownloadError for everything else.
        """
        info = self._ask(deadline)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        snapshot = Snapshot(self._folder / "snapshots" / info.sha, info.sha, info.pipeline_tag)
        absent = [name for name in self._wanted(list(sizes)) if not (snapshot.folder / name).exists()]
        if absent:
            with Progress(f"Downloading {self.name}", sum(sizes[name] for name in absent)) as progress:
                for name in absent:
                    log.info("Downloading %s of %s", name, self.name)
                    self._download(name, info.sha, progress)
        else:
            log.info("Files are already present on the host. Skipping download.")
        self._name(info.sha)
        return snapshot

    def _wanted(self, names: list[str]) -> list[str]:
        try:
            if self.file is None:
                return layout.needed(names, with_weights=self.weights is None and not self.bare)
            if self.file not in names:
                raise DownloadError(f"there is no {self.file}; {layout.no_weights(names)}")
            return [self.file]
        except DownloadError as error:
            raise DownloadError(f"{self.name}: {error}") from None

    @property
    def _folder(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(self.cache or HF_HUB_CACHE).expanduser() / f"models--{self.name.replace('/', '--')}"

    def _name(self, sha: str) -> None:
        """Note which commit the revision is, last of all: where its name leads, nothing that was wanted is missing."""
        reference = self._folder / "refs" / (self.revision or "main")
        if self.revision != sha and not (reference.exists() and reference.read_text().strip() == sha):
            reference.parent.mkdir(parents=True, exist_ok=True)
            draft = reference.with_name(f".{reference.name}-{threading.get_native_id()}")
            draft.write_text(sha)
            draft.replace(reference)

    def _ask(self, deadline: float) -> Any:
        """The hub's ModelInfo, with the sizes of the files."""
        import httpx
        from huggingface_hub import HfApi, constants, errors

        # Else it would ask for a list of programs to name in its requests. This server tells nobody who runs it.
        constants.HF_HUB_DISABLE_TELEMETRY = True

        def ask() -> Any:
            api = HfApi(token=self.token)
            return api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=deadline)

        try:
            return _within(deadline, ask)
        except errors.OfflineModeIsEnabled:
            raise Unreachable("HF_HUB_OFFLINE is set", offline=True) from None
        except errors.HFValidationError as error:
            raise DownloadError(f"`--model-id` {self.name}: {error}") from None
        except errors.GatedRepoError:
            raise DownloadError(
                f"{self.name} is gated: ask for access on its page, and set HF_TOKEN to a token that may read it"
            ) from None
        except errors.RevisionNotFoundError:
            raise DownloadError(f"{self.name} has no revision {self.revision} (`--revision`)") from None
        except errors.RepositoryNotFoundError:
            raise DownloadError(
                f"the hub has no model {self.name}, or it is private and HF_TOKEN may not read it"
            ) from None
        except errors.HfHubHTTPError as error:
            cause = error.server_message or _first_line(error)
            if error.response.status_code in (401, 403):
                raise DownloadError(f"the hub refuses {self.name}; is HF_TOKEN right? {cause}") from None
            raise Unreachable(cause) from None
        except (httpx.HTTPError, OSError) as error:
            raise Unreachable(_first_line(error)) from None

    def _download(self, name: str, sha: str, progress: Progress) -> None:
        from huggingface_hub import hf_hub_download

        class Meter:
            """As much of tqdm as huggingface_hub calls. Where it counts bytes that arrive and bytes that are written,
            the latter are passed on."""

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

        meter: Any = Meter
        try:
            hf_hub_download(self.name, name, revision=sha, cache_dir=self.cache, token=self.token, tqdm_class=meter)
        except Exception as error:  # the transports beneath have exceptions of their own, none of them a bug of ours
            raise DownloadError(
                f"{name} of {self.name} into {self._folder}: {error or type(error).__name__}"
            ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError. A client's own timeout counts neither the name's lookup nor each address."""
    outcome: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            outcome.put(_raiser(error))
        else:
            outcome.put(lambda: result)

    threading.Thread(target=run, daemon=True).start()
    try:
        take = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    return take()


def _raiser(error: Exception) -> Callable[[], Any]:
    def throw() -> Any:
        raise error

    return throw
