"""Starts engine and router, watches both, ends both. Knows their command lines and status pipes, nothing of their work.

One ``select`` waits for everything: signals (by the wakeup descriptor, SIGCHLD among them), status lines and standard
error of the children. There is no polling and no thread.
"""

import contextlib
import ctypes
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tgi.core.config import Settings
from tgi.core.errors import StartupError
from tgi.core.messages import Failed, Loading, Ready, Status
from tgi.launcher.errors import ShardCannotStart, ShardFailed, WebserverCannotStart, WebserverFailed
from tgi.launcher.progress import Progress

log = logging.getLogger(__name__)

ENGINE = (sys.executable, "-m", "tgi.engine.process")
ROUTER = (sys.executable, "-m", "tgi.router.app")

FAREWELL = 5.0
"""Seconds that one process has to end cleanly after the other failed: the router's open requests get their errors."""

_SPINS = {"GOMP_SPINCOUNT": "2000"}
"""How long OpenMP's threads keep a processor while they wait for a step, if the operator doesn't say: some 20 µs. By
itself OpenMP would keep it from step to step, though router and clients need it."""

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LONGEST_SOCKET_PATH = 107
_BACKLOG = 2048

_libc = ctypes.CDLL(None, use_errno=True)


def bind(host: str, port: int) -> socket.socket:
    """The server's socket, not listening yet: a busy port or an unknown name is found before anything is loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise WebserverCannotStart(f"`--hostname` {host} is no address: {error}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unavailable(host, port, error) from None
    return listener


def _unavailable(host: str, port: int, error: OSError) -> WebserverCannotStart:
    return WebserverCannotStart(
        f"can't listen on {host}:{port}: {error.strerror}. Choose others with `--hostname` and `--port`."
    )


def supervise(
    settings: Settings,
    listener: socket.socket | None,
    started: float,
    engine: Sequence[str] | None = ENGINE,
    router: Sequence[str] = ROUTER,
) -> None:
    """Serve until a signal comes, then return; raise the error of the child that ended before.

    Without ``engine`` the router finds one that runs already; without a listener there is no router. The listener is
    closed here: while the router drains, new connections must be refused, not left waiting.
    """
    path = _write(settings)
    grace = settings.graceful_termination_timeout
    with listener or contextlib.nullcontext(), _Wakeup() as wakeup:
        if listener is not None:
            _listen(listener)
        watch = _Watch(wakeup)
        try:
            if engine is not None:
                log.info("Starting shard")
                watch.spawn(_SHARD, (*engine, "--settings", path))
            if listener is not None:
                log.info("Starting Webserver")
                fd = listener.fileno()
                watch.spawn(_WEBSERVER, (*router, "--settings", path, "--listen-fd", str(fd)), fd)
            if watch.until_ready():
                if listener is not None:
                    log.info("Connected: ready after %.1f s", time.monotonic() - started)
                    log.info(_invitation(listener, settings))
                watch.until_signal()
            log.info("Shutting down on %s", watch.signals[0].name)
        except StartupError:
            grace = min(FAREWELL, grace)
            raise
        finally:
            if listener is not None:
                listener.close()
            watch.stop_all(grace)


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _unavailable(host, port, error) from None


def _write(settings: Settings) -> str:
    """settings.json, readable by this user only: it holds the API key, which must not show in any argument list."""
    if len(os.fsencode(settings.socket)) > _LONGEST_SOCKET_PATH:
        shorter = "TMPDIR to a shorter folder" if settings.uds_path is None else "`--uds-path` to a shorter one"
        raise StartupError(f"the path {settings.socket} is too long for a Unix socket; set {shorter}")
    path = Path(settings.run_dir) / "settings.json"
    path.touch(0o600, exist_ok=False)
    path.write_bytes(msgspec.json.encode(settings))
    return str(path)


def _invitation(listener: socket.socket, settings: Settings) -> str:
    """A command to paste, with the address that was really taken."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    key = "" if settings.api_key is None else "-H 'Authorization: Bearer <the API key>' "
    body = '{"messages":[{"role":"user","content":"What is deep learning?"}],"max_tokens":40}'
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"Try: curl {address}/v1/chat/completions -H 'Content-Type: application/json' {key}-d '{body}'"


@dataclass(frozen=True, slots=True)
class _Role:
    """What a child is called in the log, and its end, before and after it was ready."""

    name: str
    crash: str
    unstarted: type[StartupError]
    failed: type[StartupError]


_SHARD = _Role("shard", "Shard 0 crashed", ShardCannotStart, ShardFailed)
_WEBSERVER = _Role("webserver", "Webserver Crashed", WebserverCannotStart, WebserverFailed)


class _Child:
    """A process, and what it said on its status pipe and on its standard error."""

    def __init__(self, role: _Role, process: subprocess.Popen[bytes]) -> None:
        self.role = role
        self.process = process
        self.streams: dict[int, Callable[[bytes], None]] = {}
        """Open descriptors to read from, and who takes the bytes."""
        self.ready = False
        self.failure: str | None = None
        self.loading: Progress | None = None
        self._unread = b""
        self._last_words = b""

    def take_status(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            try:
                status = msgspec.json.decode(line, type=Status)
            except msgspec.DecodeError as error:
                status = Failed(f"its status line {line!r} can't be read: {error}")
            if self.loading is not None and not isinstance(status, Loading):
                self.loading.close()
            match status:
                case Loading(done, total):
                    self.loading = self.loading or Progress("Loading weights", total)
                    self.loading.reach(done)
                case Ready():
                    self.ready = True
                    log.info("%s ready", self.role.name.capitalize())
                case Failed(message):
                    self.failure = message

    def take_stderr(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, data)
        self._last_words = (self._last_words + data)[-4096:]

    def error(self) -> StartupError:
        """The real cause: what the child reported, else how it ended and its last line on standard error."""
        cause = self.failure
        if cause is None:
            code = self.process.wait()
            if code == -signal.SIGKILL:
                cause = "killed by SIGKILL, as the kernel does when memory runs out"
            elif code < 0:
                cause = f"killed by {signal.Signals(-code).name}"
            else:
                cause = f"exited with status {code}"
            if words := self._last_words.decode(errors="replace").strip():
                cause += f": {words.splitlines()[-1]}"
        return (self.role.failed if self.ready else self.role.unstarted)(cause)


class _Wakeup:
    """Signals as readable bytes. While it is open, SIGCHLD and the ending signals do nothing else."""

    def __enter__(self) -> "_Wakeup":
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in (*_ENDINGS, signal.SIGCHLD)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous)
        self.reader.close()
        self._writer.close()

    def read(self) -> list[signal.Signals]:
        """The ending signals that came since the last call."""
        return [signal.Signals(byte) for byte in self.reader.recv(4096) if byte in _ENDINGS]


class _Watch:
    """The children and everything that is heard from them and from the operator."""

    def __init__(self, wakeup: _Wakeup) -> None:
        self.signals: list[signal.Signals] = []
        self._wakeup = wakeup
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup.reader, selectors.EVENT_READ)

    def spawn(self, role: _Role, command: Sequence[str], *passed: int) -> None:
        """Start a child in its own process group: Ctrl-C reaches only the launcher, which ends the rest in order."""
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

        status, its_status = os.pipe()
        stderr, its_stderr = os.pipe()
        try:
            process = subprocess.Popen(
                (*command, "--status-fd", str(its_status)),
                stdin=subprocess.DEVNULL,
                stderr=its_stderr,
                pass_fds=(its_status, *passed),
                process_group=0,
                env=_SPINS | os.environ,
                preexec_fn=die_with_parent,
            )
        finally:
            os.close(its_status)
            os.close(its_stderr)
        child = _Child(role, process)
        child.streams = {status: child.take_status, stderr: child.take_stderr}
        for fd in child.streams:
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, child)
        self._children.append(child)

    def until_ready(self) -> bool:
        """False if a signal came first. The end of a child raises its error."""
        while not self.signals:
            if all(child.ready for child in self._children):
                return True
            self._wait_for_news()
        return False

    def until_signal(self) -> None:
        """The end of a child raises its error."""
        while not self.signals:
            self._wait_for_news()

    def _wait_for_news(self) -> None:
        self._wait(None)
        for child in self._children:
            if child.process.poll() is not None:
                self._hear(child)
            if child.failure is not None or child.process.returncode is not None:
                error = child.error()
                log.error("%s: %s", child.role.crash, error)
                raise error

    def stop_all(self, grace: float) -> None:
        """End the children, the youngest first, each within ``grace`` seconds; one more signal ends the patience."""
        patience = len(self.signals)
        for child in reversed(self._children):
            name = child.role.name
            if child.loading is not None:
                child.loading.close()
            if child.process.poll() is None:
                log.info("Terminating %s", name)
                child.process.terminate()
                log.info("Waiting for %s to gracefully shutdown", name)
            deadline = time.monotonic() + grace
            while child.process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0 or len(self.signals) > patience:
                    log.warning("Killing %s", name)
                    os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()
                else:
                    self._wait(left)
            self._hear(child)
            log.info("%s terminated", name)
        self._selector.close()

    def _wait(self, timeout: float | None) -> None:
        """Sleep until something happens, and take all of it in."""
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, _Child):
                self._hear(key.data)
            else:
                self.signals += self._wakeup.read()

    def _hear(self, child: _Child) -> None:
        for fd, take in list(child.streams.items()):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 65536):
                    take(data)
                self._selector.unregister(fd)
                os.close(fd)
                del child.streams[fd]
