"""A process for work that may take any time, memory or stack: both of its ends. It can be killed, which no thread can.

Questions and answers are bytes, in frames as ``core.messages`` has them, over the process's standard input and output.
"""

import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tgi.core.messages import FRAME

FIRST_SECONDS = 60.0
"""For what a new process is asked first: it has to start, too, on a machine that loads a model."""


class LostError(Exception):
    """The process ended without an answer."""


class Worker:
    """Answers one question at a time; is started for the first, and again for the next when it has been lost.

    To be used by one thread at a time.
    """

    def __init__(self, module: str, *arguments: str, first: bytes | None = None, seconds: float | None = None) -> None:
        """``first``: what each new process is asked before anything else. ``seconds`` for an answer."""
        self._command = (sys.executable, "-m", module, *arguments)
        self._first = first
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.greeting = b""
        """The answer to ``first``."""

    def start(self) -> None:
        """Does nothing if it runs. Raises as ``ask``."""
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            if self._first is not None:
                self.greeting = self._exchange(self._first, FIRST_SECONDS)

    def ask(self, question: bytes) -> bytes:
        """Raises TimeoutError for an answer that takes too long, LostError if there will be none; the process is gone
        then. One that was lost before the question is asked anew."""
        for attempt in (1, 2):
            self.start()
            try:
                return self._exchange(question, self._seconds)
            except LostError:
                if attempt == 2:
                    raise
        raise AssertionError

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:
                pass  # waits, and closes the pipes

    def _exchange(self, question: bytes, seconds: float | None) -> bytes:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            write(self._process.stdin, question)
            answer = read(self._process.stdout, deadline)
        except (OSError, LostError) as error:
            self.end()
            if isinstance(error, TimeoutError):
                raise
            raise LostError from error
        return answer


def serve(answer: Callable[[bytes], bytes]) -> None:
    """The process's end: answer questions until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the router, whose end ends this one
    while True:
        try:
            write(sys.stdout.buffer, answer(read(sys.stdin.buffer)))
        except (LostError, BrokenPipeError):  # the router is gone
            return


def bound(memory: int, **limits: int) -> None:
    """Let this process have ``memory`` bytes more than now, and of each of ``limits`` (``cpu`` in seconds, ``stack`` in
    bytes) so much."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limits |= {"data": pages * resource.getpagesize() + memory, "core": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (most, most))


def write(stream: IO[bytes], body: bytes) -> None:
    view = memoryview(FRAME.pack(len(body)) + body)
    while view:
        view = view[stream.write(view) :]
    stream.flush()


def read(stream: IO[bytes], deadline: float | None = None) -> bytes:
    """The body of the next frame. Raises LostError at the stream's end, TimeoutError at the ``deadline``."""
    (length,) = FRAME.unpack(_exactly(stream, FRAME.size, deadline))
    return _exactly(stream, length, deadline)


def _exactly(stream: IO[bytes], size: int, deadline: float | None) -> bytes:
    found, poll = bytearray(), select.poll()
    poll.register(stream, select.POLLIN)
    while len(found) < size:
        if deadline is not None and not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        data = os.read(stream.fileno(), size - len(found))
        if not data:
            raise LostError
        found += data
    return bytes(found)
