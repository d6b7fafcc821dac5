"""Starts engine and routers, watches and ends them; what is lost after it has served is started again. Knows their
command lines and status pipes, nothing of their work.

One ``select`` waits for everything: signals (by the wakeup descriptor, SIGCHLD among them), status lines and standard
error of the children. There is no polling and no thread.
"""

import contextlib
import ctypes
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from tgi.core import board
from tgi.core.config import Settings
from tgi.core.errors import StartupError
from tgi.core.messages import Failed, Loading, Ready, Status
from tgi.launcher.errors import ShardCannotStart, ShardFailed, WebserverCannotStart, WebserverFailed
from tgi.launcher.progress import Progress

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A process to start."""

    words: Sequence[str]
    inherited: Sequence[int] = ()
    """Descriptors that it gets besides."""
    environment: Mapping[str, str] = {}
    """Variables that it gets if the operator hasn't set them."""


Group = Callable[[], AbstractContextManager[Sequence[Command]]]
"""The processes of a unit: an engine's shards, or one router. It is entered for each start and left when they run, so
that what they inherit can be made anew each time, and closed here."""


def alone(*words: str, inherited: Sequence[int] = ()) -> Group:
    """A unit of one process."""
    return lambda: contextlib.nullcontext([Command(words, inherited)])


ROUTER = (sys.executable, "-m", "tgi.router.app")

FAREWELL = 5.0
"""Seconds that one process has to end cleanly after the other failed: the router's open requests get their errors."""

_SOON = 10.0
"""Seconds of service after which the next loss of a unit has nothing to do with the one before."""
_LONGEST_DELAY = 30.0
"""Seconds before a unit that is lost again and again is started again: at first 0, then 0.5, 1, 2, 4…"""
_ATTEMPTS = 3
"""Starts in a row that may fail of a unit that has served."""

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
    engine: Group | None,
    router: Sequence[str] = ROUTER,
) -> None:
    """Serve until a signal comes, then return; raise the error of what can't go on.

    Without ``engine`` routers find one that runs already; without a listener there is no router. The listener is
    closed here: while routers drain, new connections must be refused, not left waiting.
    """
    path = _write(settings)
    grace = settings.graceful_termination_timeout
    with (
        listener or contextlib.nullcontext(),
        _Wakeup() as wakeup,
        os.fdopen(os.memfd_create("tgi-routers"), "wb") as memory,
    ):
        if listener is not None:
            _listen(listener)
        watch = _Watch(wakeup, path)
        try:
            if engine is not None:
                watch.start_engine(engine)
            if listener is not None:
                watch.start_routers(router, listener.fileno(), memory.fileno(), settings.router_workers)
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
    start: str
    crash: str
    unstarted: type[StartupError]
    failed: type[StartupError]
    number: str = ""
    """Behind what is said of it, where there may be several."""


def _webserver(number: str) -> Callable[[int], _Role]:
    crash = f"Webserver Crashed{number}"
    role = _Role("webserver", "Starting Webserver", crash, WebserverCannotStart, WebserverFailed, number)
    return lambda _: role


def _shard(rank: int) -> _Role:
    return _Role("shard", "Starting shard", f"Shard {rank} crashed", ShardCannotStart, ShardFailed, f" rank={rank}")


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
        self._end: os.waitid_result | None = None
        """How it has ended, or was stopped."""
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
                    log.info("%s ready%s", self.role.name.capitalize(), self.role.number)
                case Failed(message):
                    self.failure = message

    def take_stderr(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, data)
        self._last_words = (self._last_words + data)[-4096:]

    @property
    def lost(self) -> bool:
        """Whether it says that it can't go on, has ended, or hangs: what a signal has stopped nobody may set going."""
        if self._end is None:
            # It isn't waited for by that: until then its number is its own.
            flags = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            self._end = os.waitid(os.P_PID, self.process.pid, flags)
        return self.failure is not None or self._end is not None

    def error(self) -> StartupError:
        """Of what is lost. The real cause: what it reported, else how it ended and its last line on standard error."""
        cause = self.failure
        if cause is None:
            assert self._end is not None
            words = self._last_words.decode(errors="replace").strip()
            match self._end.si_code, self._end.si_status:
                case os.CLD_EXITED, status:
                    cause = f"exited with status {status}"
                case os.CLD_STOPPED, number:
                    cause = f"stopped by {signal.Signals(number).name}"
                case _, signal.SIGKILL:
                    cause = "killed by SIGKILL, as the kernel does when memory runs out"
                case _, signal.SIGALRM:
                    cause, words = "it hung in a step; where, stands above", ""
                case _, number:
                    cause = f"killed by {signal.Signals(number).name}"
            if words:
                cause += f": {words.splitlines()[-1]}"
        return (self.role.failed if self.ready else self.role.unstarted)(cause)


class _Unit:
    """Processes that are lost together, an engine's shards or one router, and when they are to be started again."""

    def __init__(self, name: str, role: Callable[[int], _Role], group: Group, on_loss: Callable[[], None]) -> None:
        """``role``: of each process, by its place in the group."""
        self.name = name
        self.role = role
        self.group = group
        self.on_loss = on_loss
        self.children: list[_Child] = []
        self.due = math.inf
        """When to start them."""
        self._ready = 0.0
        """When all were ready; 0.0: they aren't."""
        self._lost = 0.0
        """When they were lost last."""
        self._delay = 0.0
        """Before they are started again when they are lost next."""
        self._failures = 0
        """Starts in a row that failed."""

    @property
    def ready(self) -> bool:
        return self._ready > 0

    def look(self) -> None:
        """Whether all are ready now."""
        if not self.ready and self.children and all(child.ready for child in self.children):
            self._ready = time.monotonic()
            self._failures = 0
            if self._lost:
                log.info("The %s serves again after %.1f s", self.name, self._ready - self._lost)

    def lose(self) -> bool:
        """They are gone. Whether they are to be started again: not if they never served, or fail at every start."""
        now = time.monotonic()
        if not self.ready:
            self._failures += 1
        elif now - self._ready > _SOON:
            self._delay = 0.0
        served = self.ready or self._lost > 0
        if not served or self._failures == _ATTEMPTS:
            return False
        if self._delay:
            log.warning("Restarting the %s in %g s", self.name, self._delay)
        else:
            log.warning("Restarting the %s", self.name)
        self.due = now + self._delay
        self._delay = min(max(0.5, 2 * self._delay), _LONGEST_DELAY)
        if self.ready:
            self._ready, self._lost = 0.0, now
        return True


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

    def __init__(self, wakeup: _Wakeup, settings: str) -> None:
        """``settings``: the file that every child reads."""
        self.signals: list[signal.Signals] = []
        self._wakeup = wakeup
        self._settings = settings
        self._engine: list[_Unit] = []
        """None or one."""
        self._routers: list[_Unit] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup.reader, selectors.EVENT_READ)

    def start_engine(self, group: Group) -> None:
        self._engine = [_Unit("engine", _shard, group, lambda: None)]
        self._start(self._engine[0])

    def start_routers(self, words: Sequence[str], listener: int, memory: int, count: int) -> None:
        """``count`` processes that accept from ``listener`` and tell each other what they do in ``memory``."""
        words = (*words, "--listen-fd", str(listener))
        for worker in range(count):
            number, group = "", alone(*words, inherited=[listener])
            if count > 1:
                number = f" worker={worker}"
                its = ("--memory-fd", str(memory), "--worker", str(worker))
                group = alone(*words, *its, inherited=[listener, memory])
            forget = partial(board.clear, memory, worker)
            self._routers.append(_Unit(f"webserver{number}", _webserver(number), group, forget))
            self._start(self._routers[-1])

    def until_ready(self) -> bool:
        """False if a signal came first. Raises as ``until_signal``."""
        while not self.signals:
            if all(unit.ready for unit in self._units):
                return True
            self._tend()
        return False

    def until_signal(self) -> None:
        """The loss of a unit that is not started again raises its error."""
        while not self.signals:
            self._tend()

    def stop_all(self, grace: float) -> None:
        """End the routers, whose open requests need the engine, then the engine, each within ``grace`` seconds.

        One more signal ends the patience.
        """
        patience = len(self.signals)
        self._stop(self._routers, grace, patience, self._engine)
        self._stop(self._engine, grace, patience)
        self._selector.close()

    def _tend(self) -> None:
        """Wait for something to happen and do what it asks for."""
        self._wait(min(unit.due for unit in self._units) - time.monotonic())
        for unit in self._units:
            if time.monotonic() >= unit.due:
                self._start(unit)
            unit.look()
            if (error := self._end_if_lost(unit)) is not None and not unit.lose():
                raise error

    @property
    def _units(self) -> Sequence[_Unit]:
        return (*self._routers, *self._engine)

    def _start(self, unit: _Unit) -> None:
        unit.due = math.inf
        with unit.group() as commands:
            for place, command in enumerate(commands):
                unit.children.append(self._spawn(unit.role(place), command))

    def _end_if_lost(self, unit: _Unit) -> StartupError | None:
        """One process' end is that of all: what the others compute is nothing without it. The error of the first."""
        lost = [child for child in unit.children if self._is_lost(child)]
        if not lost:
            return None
        error = lost[0].error()
        for child in unit.children:
            self._kill(child)  # with the processes that it may have started
        # The next ones need their memory. Nobody outlives SIGKILL for long, unless a device hangs.
        heard = len(self.signals)
        while any(child.process.poll() is None for child in unit.children) and len(self.signals) == heard:
            self._wait(math.inf)
        for child in unit.children:
            self._forget(child)
        unit.children = [child for child in unit.children if child.process.poll() is None]
        unit.on_loss()
        return error

    def _is_lost(self, child: _Child) -> bool:
        """Says why, if so."""
        if not child.lost:
            return False
        self._hear(child)
        log.error("%s: %s", child.role.crash, child.error())
        return True

    def _stop(self, units: Iterable[_Unit], grace: float, patience: int, needed: Iterable[_Unit] = ()) -> None:
        """``patience``: signals that have come before. ``needed``: without these nothing is left to wait for."""
        children = [child for unit in units for child in unit.children]
        for child in children:
            if child.loading is not None:
                child.loading.close()
            if child.process.poll() is None:
                log.info("Terminating %s%s", child.role.name, child.role.number)
                child.process.terminate()
                log.info("Waiting for %s to gracefully shutdown%s", child.role.name, child.role.number)
        deadline = time.monotonic() + grace
        for child in children:
            while child.process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0 or len(self.signals) > patience:
                    log.warning("Killing %s%s", child.role.name, child.role.number)
                    self._kill(child)
                    child.process.wait()
                else:
                    self._wait(left)
                    for unit in needed:
                        self._end_if_lost(unit)
            self._forget(child)
            log.info("%s terminated%s", child.role.name, child.role.number)

    def _spawn(self, role: _Role, command: Command) -> _Child:
        """Start a child in its own process group: Ctrl-C reaches only the launcher, which ends the rest in order."""
        log.info("%s%s", role.start, role.number)
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

        status, its_status = os.pipe()
        stderr, its_stderr = os.pipe()
        try:
            process = subprocess.Popen(
                (*command.words, "--settings", self._settings, "--status-fd", str(its_status)),
                stdin=subprocess.DEVNULL,
                stderr=its_stderr,
                pass_fds=(its_status, *command.inherited),
                process_group=0,
                env={**_SPINS, **command.environment, **os.environ},
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
        return child

    @staticmethod
    def _kill(child: _Child) -> None:
        if child.process.returncode is None:
            os.killpg(child.process.pid, signal.SIGKILL)

    def _wait(self, seconds: float) -> None:
        """Sleep until something happens, at most so long, and take all of it in."""
        for key, _ in self._selector.select(None if seconds == math.inf else seconds):
            if isinstance(key.data, _Child):
                self._hear(key.data)
            else:
                self.signals += self._wakeup.read()

    def _hear(self, child: _Child) -> None:
        for fd, take in list(child.streams.items()):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 65536):
                    take(data)
                self._close(child, fd)

    def _forget(self, child: _Child) -> None:
        """Hear its last words; nothing of it stays open, whoever else may hold the other ends."""
        self._hear(child)
        for fd in list(child.streams):
            self._close(child, fd)
        if child.loading is not None:
            child.loading.close()

    def _close(self, child: _Child, fd: int) -> None:
        self._selector.unregister(fd)
        os.close(fd)
        del child.streams[fd]
