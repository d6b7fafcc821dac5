"""The engine process: loads, opens the mailbox, says ready, steps for ever. Run by the launcher."""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

from tgi.core import child
from tgi.core.config import BESIDE_DECODES, BLOCK_SIZE, Settings
from tgi.core.messages import Hello, Loading, Ready
from tgi.core.vocabulary import Vocabulary
from tgi.engine.mailbox import Mailbox
from tgi.engine.scheduler import Scheduler

log = logging.getLogger(__name__)


def serve(settings: Settings, place: child.Place, report: child.Report) -> None:
    """Load the model and run the step loop until the process is ended. Raises StartupError."""
    begin = time.monotonic()
    if settings.compiled is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", settings.compiled)  # which it reads when it is imported
    from tgi.engine.loop import Loop  # torch: over a second
    from tgi.runtime.ranks import Follower, Leader, fingerprint, join
    from tgi.runtime.runner import Runner

    faulthandler.register(signal.SIGALRM, chain=True)  # a step that hangs says where, and ends the process
    limits = settings.limits
    group = join(settings, place)
    loaded = fingerprint(settings.model)
    runner = Runner.load(settings, lambda done, total: report(Loading(done, total)), group)
    if place.rank:
        _trim()
        report(Ready())
        Follower(socket.socket(fileno=place.lines[0])).run(runner, loaded, settings.longest_step)
        return
    if place.lines:
        runner.leader = Leader([socket.socket(fileno=line) for line in place.lines])
        runner.leader.wait(loaded)
    scheduler = Scheduler(
        pools=settings.pools,
        step_tokens=limits.max_batch_prefill_tokens,
        max_running=limits.max_batch_size,
        beside=BESIDE_DECODES.get(settings.device),
        ahead=runner.ahead,
        prefix_caching=settings.prefix_caching and runner.paged,
    )
    if runner.ahead:
        runner.warm(len(settings.pools))
    mailbox = Mailbox(settings.socket, Hello(time.time_ns(), runner.implementation))
    _trim()
    log.info(
        "Model loaded in %.1f s: %s in %s on %s, %d blocks of %d tokens",
        time.monotonic() - begin,
        settings.model.model_id,
        settings.dtype,
        settings.device,
        settings.pools[0].blocks,
        BLOCK_SIZE,
    )
    if runner.implementation is not None:
        log.info("It runs %s", runner.implementation.forward)
    report(Ready())
    config = settings.tokenizer_config_path
    vocabulary = partial(Vocabulary.load, Path(settings.model.folder), None if config is None else Path(config))
    Loop(mailbox, scheduler, runner, vocabulary, settings.longest_step).run()


def _trim() -> None:
    """glibc keeps what packing the weights has freed."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


if __name__ == "__main__":
    code = child.run("text_generation_engine", serve)
    sys.stdout.flush()
    os._exit(code)  # no tear-down of torch: it may hang on the device that has just failed
