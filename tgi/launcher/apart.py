"""Engine and router started by hand, each by its own command; a socket's path joins them.

Beside the engine's socket lies a file with its settings, from which the router learns model and limits.
"""

import contextlib
import fcntl
import tempfile
from pathlib import Path

import msgspec

from tgi.core.config import BLOCK_SIZE, Limits, ModelFiles, Settings
from tgi.launcher.claim import beside, claim
from tgi.launcher.errors import ArgumentValidation, WebserverCannotStart
from tgi.launcher.flags import Options
from tgi.launcher.launch import begin, engine_settings, with_http
from tgi.launcher.shards import shards
from tgi.launcher.supervisor import bind, supervise

_CLIENTS_LIMITS = (
    "max_concurrent_requests",
    "max_best_of",
    "max_stop_sequences",
    "max_top_n_tokens",
    "max_client_batch_size",
    "validation_workers",
    "payload_limit",
)


def serve_engine(options: Options, started: float) -> None:
    """One engine, until a signal comes. ``started``: time.monotonic(). Raises StartupError."""
    options = begin(options)
    socket = Path(f"{options.uds_path}-0").absolute()
    with claim(socket, "--uds-path") as tell, tempfile.TemporaryDirectory(prefix="tgi-") as run_dir:
        settings = tell(engine_settings(options, run_dir))
        supervise(settings, None, started, shards(settings.ranks))


def serve_router(options: Options, started: float) -> None:
    """One router before an engine that runs or loads, until a signal comes. Raises StartupError."""
    options = begin(options, "tokenizer_name")
    engine = _settings_of(Path(options.master_shard_uds_path).absolute())
    _check_model(options, engine.model)
    listener = bind(options.hostname, options.port)
    with listener, tempfile.TemporaryDirectory(prefix="tgi-") as run_dir:
        settings = msgspec.structs.replace(
            engine,
            run_dir=run_dir,
            limits=_limits(options, engine.limits),
            tokenizer_config_path=options.tokenizer_config_path or engine.tokenizer_config_path,
            json_output=options.json_output,
            log_level=options.log_level,
            log_colorize=options.log_colorize,
            graceful_termination_timeout=options.graceful_termination_timeout,
        )
        supervise(with_http(settings, options), listener, started, engine=None)


def _settings_of(socket: Path) -> Settings:
    """Of the engine on this socket, which may still be loading."""
    nobody = WebserverCannotStart(
        f"there is no engine on {socket} (`--master-shard-uds-path`). Start one with `text-generation-server serve "
        f"MODEL_ID --uds-path {str(socket).removesuffix('-0')}`."
    )
    try:
        with beside(socket).open("rb") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                raise nobody
            text = file.read()
    except FileNotFoundError:
        raise nobody from None
    if not text:
        raise WebserverCannotStart(f"the engine on {socket} is still looking for its model's files")
    try:
        return msgspec.json.decode(text, type=Settings)
    except msgspec.DecodeError as error:
        raise WebserverCannotStart(f"{beside(socket)} is not of this version: {error}") from None


def _check_model(options: Options, model: ModelFiles) -> None:
    """Token ids mean something to one tokenizer only."""
    name = options.tokenizer_name
    if name is not None and name != model.model_id and Path(name).absolute() != Path(model.model_id).absolute():
        raise ArgumentValidation(f"`--tokenizer-name` is {name}, but the engine serves {model.model_id}")
    if options.revision is not None and options.revision != model.revision:
        raise ArgumentValidation(
            f"`--revision` is {options.revision}, but the engine serves {model.revision or 'main'}"
        )


def _limits(options: Options, engine: Limits) -> Limits:
    """The router's own; of the engine's it may only lower what one request takes."""
    for name, grain in (("max_batch_prefill_tokens", 1), ("max_batch_total_tokens", BLOCK_SIZE), ("max_batch_size", 1)):
        given, real = getattr(options, name), getattr(engine, name)
        if given is not None and given // grain * grain != real:
            raise ArgumentValidation(f"`{name}` is {real} in the engine, which was started with it. Given: {given}")
    for name in ("max_total_tokens", "max_input_tokens"):
        given, real = getattr(options, name), getattr(engine, name)
        if given is not None and given > real:
            raise ArgumentValidation(f"`{name}` must be <= {real}, what the engine serves. Given: {given}")
    total = options.max_total_tokens or engine.max_total_tokens
    inputs = options.max_input_tokens
    if inputs is None:
        inputs = min(engine.max_input_tokens, total - 1)
    if inputs >= total:
        raise ArgumentValidation("`max_input_tokens` must be < `max_total_tokens`")
    own = {name: getattr(options, name) for name in _CLIENTS_LIMITS}
    return msgspec.structs.replace(engine, max_input_tokens=inputs, max_total_tokens=total, **own)
