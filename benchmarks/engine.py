"""The engine alone: scheduler and runner in this process, no router and no client.

    python benchmarks/engine.py --requests 1 8 32
    GOMP_SPINCOUNT=0 python benchmarks/engine.py          # how OpenMP's threads wait matters on shared cores

Prints tokens per second and where a decoding step's time goes, in milliseconds (medians).
"""

import argparse
import random
import statistics
import tempfile
import time

from tgi.core.config import BLOCK_SIZE, Limits, Settings
from tgi.core.messages import Sampling, Submit
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store
from tgi.runtime.runner import Runner


def run(runner: Runner, limits: Limits, requests: int, prompt: int, new: int) -> str:
    """All requests at once, greedy, to their full length."""
    scheduler = Scheduler(
        blocks=limits.max_batch_total_tokens // BLOCK_SIZE,
        step_tokens=limits.max_batch_prefill_tokens,
        max_running=requests,
    )
    chance = random.Random()
    for number in range(requests):
        ids = [chance.randrange(runner.vocab_size) for _ in range(prompt)]
        scheduler.add(Request(0, Submit(number, ids, prompt, new, [], Sampling(), 0.0)))
    parts: list[tuple[float, float, float, float]] = []
    begin = time.perf_counter()
    while not scheduler.idle:
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        times.append(time.perf_counter())
        launched = runner.launch([chunk.work() for chunk in plan.chunks])
        times.append(time.perf_counter())
        results = runner.sample(launched)
        times.append(time.perf_counter())
        scheduler.commit(plan, results)
        times.append(time.perf_counter())
        if not any(chunk.prefills for chunk in plan.chunks):
            a, b, c, d, e = times
            parts.append((e - a, c - b, d - c, (b - a) + (e - d)))
    rate = requests * new / (time.perf_counter() - begin)
    step, forward, sample, rest = (1e3 * statistics.median(column) for column in zip(*parts, strict=True))
    return f"| {requests} | {rate:.1f} | {step:.2f} | {forward:.2f} | {sample:.2f} | {rest:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-id", default=flags.DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    files = resolve_model(arguments.model_id, None, store(flags.cache_options()))
    longest = arguments.prompt + arguments.new
    limits = Limits(
        max_input_tokens=longest - 1,
        max_total_tokens=longest,
        max_batch_prefill_tokens=512,
        max_batch_total_tokens=max(arguments.requests) * -(-longest // BLOCK_SIZE) * BLOCK_SIZE,
        max_batch_size=max(arguments.requests),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model=files, limits=limits, run_dir=folder)
        runner = Runner.load(settings, lambda done, total: None)
    print("| requests | tokens/s | step | forward | sampling | scheduling |\n|---|---|---|---|---|---|")
    for requests in arguments.requests:
        run(runner, limits, requests, arguments.prompt, 4)  # warms up
        print(run(runner, limits, requests, arguments.prompt, arguments.new), flush=True)


if __name__ == "__main__":
    main()
