"""Where an engine listens that others than its launcher's own router may find.

Beside its socket lies a file with its settings. Whoever started the engine holds a lock on that file for as long as it
lives: settings that a dead engine left behind deceive nobody.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from tgi.core.config import Settings
from tgi.launcher.errors import ShardCannotStart


def beside(socket: Path) -> Path:
    """The settings of the engine on this socket."""
    return socket.with_name(f"{socket.name}.json")


@contextmanager
def claim(socket: Path, flag: str) -> Iterator[Callable[[Settings], Settings]]:
    """Keep the path of a socket, which ``flag`` names, for an engine of ours, and yield what tells its settings to
    those who look there. A socket that a dead engine left is removed."""
    path = beside(socket)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardCannotStart(f"there is an engine on {socket} already; choose another `{flag}`") from None
        if socket.is_socket():
            socket.unlink()
        elif socket.exists():
            raise ShardCannotStart(f"{socket} is in the way; choose another `{flag}`")
        try:
            yield partial(_tell, file, socket)
        finally:
            socket.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _tell(file: int, socket: Path, settings: Settings) -> Settings:
    """The same with the socket."""
    settings = msgspec.structs.replace(settings, uds_path=str(socket))
    os.ftruncate(file, 0)
    os.pwrite(file, msgspec.json.encode(settings), 0)
    return settings
