"""From options to a running server: machine, model, ledger, settings, children. The order in which errors are found."""

import contextlib
import dataclasses
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from tgi import __version__
from tgi.core.config import Settings
from tgi.core.errors import StartupError
from tgi.launcher.claim import claim
from tgi.launcher.download import Store, resolve_model
from tgi.launcher.fit import fit
from tgi.launcher.flags import Options, check
from tgi.launcher.machine import probe
from tgi.launcher.shards import shards
from tgi.launcher.supervisor import bind, supervise

log = logging.getLogger(__name__)

_SECRETS = ("api_key", "hf_api_token", "ngrok_authtoken")


def launch(options: Options, started: float) -> None:
    """Serve until a signal comes. ``started``: time.monotonic(). Raises StartupError with the cause of another end."""
    options = begin(options)
    listener = bind(options.hostname, options.port)
    with listener, tempfile.TemporaryDirectory(prefix="tgi-") as run_dir, _place(options) as tell:
        settings = with_http(tell(engine_settings(options, run_dir)), options)
        supervise(settings, listener, started, shards(settings.ranks))


def _place(options: Options) -> AbstractContextManager[Callable[[Settings], Settings]]:
    """Where the engine listens: in its private folder, unless a place is named."""
    if options.shard_uds_path is None:
        return contextlib.nullcontext(lambda settings: settings)
    return claim(Path(f"{options.shard_uds_path}-0").absolute(), "--shard-uds-path")


def begin(options: Options, subject: str = "model_id") -> Options:
    """Say what was asked, the ``subject`` first of all, and check what needs no model."""
    if options.env:
        log.info("%s", _environment())
    log.info("Args { %s }", _shown(options, subject))
    options = check(options)
    if options.tokenizer_config_path is not None and not Path(options.tokenizer_config_path).is_file():
        raise StartupError(f"`--tokenizer-config-path`: {options.tokenizer_config_path} is no file")
    return options


def engine_settings(options: Options, run_dir: str) -> Settings:
    """Find machine and model, and plan the memory: all that an engine must know."""
    machine = probe(options.device, options.cuda_visible_devices)
    files = resolve_model(options.model_id, options.revision, store(options))
    plan = fit(options, files, machine)
    if plan.ranks > 1:
        log.info("Sharding model on %d processes", plan.ranks)
    each = f", for each of {plan.ranks} ranks" if plan.ranks > 1 else ""
    log.info("Memory on %s%s\n%s", machine.name, each, plan.table())
    if options.max_batch_prefill_tokens is None:
        log.info("Default `max_batch_prefill_tokens` to %d", plan.limits.max_batch_prefill_tokens)
    log.info("Setting max batch total tokens to %d", plan.limits.max_batch_total_tokens)
    return Settings(
        model=files,
        limits=plan.limits,
        pools=plan.pools,
        longest_step=plan.longest_step,
        run_dir=run_dir,
        ranks=plan.ranks,
        master=(options.master_addr, options.master_port),
        device=machine.device,
        dtype=plan.dtype,
        quantize=plan.quantize,
        kv_cache_dtype=options.kv_cache_dtype,
        attention="flashinfer" if options.attention == "flashinfer" else None,
        graphs=plan.graphs,
        deterministic=options.deterministic,
        packed=str(store(options).cache / "packed"),
        compiled=str(store(options).cache / "triton"),
        trust_remote_code=options.trust_remote_code,
        rope_scaling=options.rope_scaling,
        rope_factor=options.rope_factor,
        ledger=plan.ledger,
        prefix_caching=options.prefix_caching,
        tokenizer_config_path=options.tokenizer_config_path,
        watermark_gamma=options.watermark_gamma,
        watermark_delta=options.watermark_delta,
        compute_type=machine.compute_type(plan.ranks),
        json_output=options.json_output,
        log_level=options.log_level,
        log_colorize=options.log_colorize,
        otlp_endpoint=options.otlp_endpoint,
        graceful_termination_timeout=options.graceful_termination_timeout,
    )


def with_http(settings: Settings, options: Options) -> Settings:
    """What a router must know besides."""
    return msgspec.structs.replace(
        settings,
        router_workers=options.router_workers,
        api_key=options.api_key,
        cors_allow_origin=list(options.cors_allow_origin),
        grammars=not options.disable_grammar_support,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        otlp_endpoint=options.otlp_endpoint or settings.otlp_endpoint,
        otlp_service_name=options.otlp_service_name,
        aip_predict_route=options.aip_predict_route,
        aip_health_route=options.aip_health_route,
        git_sha=options.git_sha,
        docker_label=options.docker_label,
        compute_type=options.compute_type or settings.compute_type,
    )


def store(options: Options) -> Store:
    """Where models are kept, by the options."""
    cache = Path(options.xdg_cache_home or Path.home() / ".cache") / "tgi"
    weights = options.weights_cache_override
    return Store(cache, options.huggingface_hub_cache, options.hf_api_token, None if weights is None else Path(weights))


def _shown(options: Options, subject: str) -> str:
    """The subject and the options that were set; secrets are named, not shown."""
    values = dataclasses.asdict(options)
    plain = dataclasses.asdict(Options())
    return ", ".join(
        f"{key}: {'***' if key in _SECRETS else repr(value)}"
        for key, value in values.items()
        if value != plain[key] or key == subject
    )


def _environment() -> str:
    """What this machine is made of, for bug reports."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "N/A"

    nvidia = "N/A"
    if shutil.which("nvidia-smi"):
        nvidia = "\n" + subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    return (
        f"Runtime environment:\ntgi: {__version__}\nTarget: {platform.platform()}\nPython: {sys.version.split()[0]}\n"
        f"torch: {installed('torch')}\nnvidia-smi: {nvidia}"
    )
