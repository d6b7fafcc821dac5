"""The process of `text-generation-server quantize`: reads its job on standard input. Run by the launcher."""

import hashlib
import logging
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from tgi import __version__
from tgi.core import telemetry
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.job import Job
from tgi.core.model_config import read_config
from tgi.launcher.progress import Progress
from tgi.models.config import DecoderConfig, TailConfig
from tgi.models.registry import check
from tgi.models.weights import Weights, open_weights
from tgi.quantization.scheme import read_scheme
from tgi.quantizer import calibration
from tgi.quantizer.folds import layer_name
from tgi.quantizer.output import Output
from tgi.quantizer.sites import Source
from tgi.quantizer.work import Work

log = logging.getLogger("tgi.quantizer.process")  # it is run as __main__


def quantize(job: Job) -> None:
    """Write the quantized model. Raises StartupError, and OSError of the disk."""
    raw = read_config(job.model.folder)
    config = check(raw, trust_remote_code=job.trust_remote_code)
    if isinstance(config, TailConfig):
        raise StartupError(f"{config.shape.architecture} can't be quantized: only architectures of docs/models.md can")
    if config.transposed and job.method in ("int8", "fp8"):
        raise StartupError(
            f"{config.shape.architecture} can't be quantized by `--method {job.method}`: its matrices are stored as "
            "[in, out], for which compressed-tensors has no layout; gptq and awq have one"
        )
    sequences, text = None, ""
    if job.method in ("gptq", "awq"):
        if job.sequence_length > (most := config.shape.max_position_embeddings):
            raise StartupError(f"`--sequence-length {job.sequence_length}`: the model reads {most} tokens")
        text = calibration.read(job.dataset)
        tokenizer = Path(job.model.folder) / "tokenizer.json"
        sequences = calibration.sequences(text, tokenizer, job.samples, job.sequence_length, config.shape.vocab)
    with Output(Path(job.output), _made_of(job, text), config.shape.layers + 1) as output:
        if output.complete:
            log.info("%s holds the quantized model already", output.folder)
            return
        if output.done:
            log.info("Going on behind layer %d of %d", output.done, config.shape.layers)
        quantization = _write(job, config, _dtype(raw), output, sequences)
        plain = {key: raw[key] for key in raw if key not in ("quantization_config", "compression_config")}
        output.finish(Path(job.model.folder), plain | {"quantization_config": quantization})
        log.info("The quantized model is in %s", output.folder)


def _write(
    job: Job, config: DecoderConfig, dtype: torch.dtype | None, output: Output, sequences: torch.Tensor | None
) -> dict[str, Any]:
    """All shards. Returns what config.json must say of them."""
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(job.model, config, _silent))
        finished: dict[str, Weights] = {}
        if output.done and sequences is not None:
            scheme = read_scheme({"quantization_config": output.quantization()})
            shards = [str(output.shard(number)) for number in range(output.done)]
            files = ModelFiles(model_id=job.model.model_id, folder=job.output, weights=shards)
            made = stack.enter_context(open_weights(files, replace(config, scheme=scheme), _silent))
            layers = range(min(output.done, config.shape.layers))
            finished = {f"{layer_name(config, layer)}.": made for layer in layers}
        embedding, head = f"{config.embed_name}.weight", f"{config.head_name}.weight"
        source = Source(weights, finished, {head: embedding} if config.shape.tied else {})
        with torch.inference_mode():
            work = Work(job, config, source, output, dtype)
            weights.finish()
            with Progress(f"Quantizing {job.model.model_id}", work.total) as progress:
                work.run(sequences, progress.reach)
        return work.quantization


def _silent(done: int, total: int) -> None:
    """Nothing is read yet."""


def _made_of(job: Job, text: str) -> dict[str, object]:
    """What the result depends on, as JSON."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if text else None
    files = [Path(path) for path in (*job.model.weights, *job.model.adapter)]
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"version": __version__, **job.settings, "text": digest, "weights": weights}


def _dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    """What the config says that weights are in."""
    found = getattr(torch, str(raw.get("torch_dtype") or raw.get("dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def main() -> int:
    """The exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    telemetry.setup("text_generation_server", job.log_level, job.json_output, colour=job.log_colorize)
    try:
        quantize(job)
    except (StartupError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
