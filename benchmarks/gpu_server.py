"""The whole server under load on one GPU, and transformers' own continuous batching beside it."""

import asyncio
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import uvloop
from tokenizers import Tokenizer

from client import quantile, summary
from client import run as complete
from gpu_run import Run
from servers import Server, free_port
from synthetic import write_checkpoint
from workloads import Prompts

_LAUNCHER = "import sys; from tgi.cli import launcher; sys.exit(launcher())"
"""The program may not be installed where the package is only found."""


def server(run: Run) -> None:
    """Starts, and loads at saturation; then what `--deterministic` costs."""
    folder = write_checkpoint(run.scratch / "model", run.sizes.model, run.device)
    full, compared = run.sizes.load, run.sizes.compared
    forms = {"bfloat16": ("--dtype bfloat16", (compared, full)), "fp8": ("--quantize fp8", (full,))}
    if run.device.type != "cpu":  # where every answer is so
        forms["deterministic"] = ("--deterministic", (compared,))
    for form, (options, loads) in forms.items():
        with run.attempt(form):
            uvloop.run(_serve(run, form, folder, options.split(), loads))


async def _serve(run: Run, form: str, folder: Path, options: list[str], loads: Sequence[tuple[int, int, int]]) -> None:
    most, prompt, new = run.sizes.load
    port, prompts = free_port(), Prompts(folder / "tokenizer.json", form)
    command = [sys.executable, "-c", _LAUNCHER, "--model-id", str(folder), "--device", run.device.type]
    command += ["--hostname", "127.0.0.1", "--port", str(port), "--max-total-tokens", str(2 * (prompt + new))]
    command += ["--max-batch-size", str(most), "--max-concurrent-requests", str(2 * most), *options]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with Server(command, port, run.scratch / f"{form}.log", {"PYTHONPATH": path}) as server:
        run.journal.write("start", form=form, **await server.begin(prompts.text(16), run.left))
        # What is made when it is first used, and in idle moments.
        await complete(server.url, [(prompts.text(16), 16) for _ in range(most)], most)
        await asyncio.sleep(run.sizes.rest)
        for streams, prompt, new in loads:
            figures = summary(
                await complete(server.url, [(prompts.text(prompt), new) for _ in range(streams)], streams)
            )
            cell = {"server": "tgi", "form": form, "streams": streams, "prompt": prompt, "new": new}
            run.journal.write("load", **cell, **figures)


def transformers(run: Run) -> None:
    """One of the server's loads in transformers' own continuous batching, in this process and without HTTP."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = write_checkpoint(run.scratch / "model", run.sizes.model, run.device)
    tokenizer, prompts = Tokenizer.from_file(str(folder / "tokenizer.json")), Prompts(folder / "tokenizer.json", "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=run.device).eval()
    streams, prompt, new = run.sizes.compared
    ids = [tokenizer.encode(prompts.text(prompt), add_special_tokens=False).ids for _ in range(streams)]
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By itself it takes nearly all memory, which others need of a CPU's.
    cache = None
    if run.device.type == "cpu":
        from transformers import ContinuousBatchingConfig

        cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch(
        ids, generation_config=config, continuous_batching_config=cache, record_timestamps=True
    ).values()
    assert len(found) == streams, f"{len(found)} of {streams} answers came"
    begin = min(answer.created_time for answer in found)
    wall = max(answer.timestamps[-1] for answer in found) - begin
    tokens = sum(len(answer.generated_tokens) for answer in found)
    first = [answer.timestamps[0] - begin for answer in found]
    gaps = [b - a for answer in found for a, b in pairwise(answer.timestamps)]
    cell = {"server": "transformers", "form": "bfloat16", "streams": streams, "prompt": prompt, "new": new}
    cell |= {"wall_s": wall, "tokens": tokens, "tokens_s": tokens / wall}
    cell |= {"ttft_p50_ms": 1e3 * quantile(first, 0.5), "ttft_p99_ms": 1e3 * quantile(first, 0.99)}
    cell |= {"itl_p50_ms": 1e3 * quantile(gaps, 0.5), "itl_p99_ms": 1e3 * quantile(gaps, 0.99)}
    run.journal.write("load", **cell)
