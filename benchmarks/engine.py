"""The engine alone: scheduler and runner in this process, no router and no client.

    python benchmarks/engine.py --requests 1 8 32 --options "--dtype bfloat16"
    GOMP_SPINCOUNT=0 python benchmarks/engine.py          # how OpenMP's threads wait matters on shared cores

Prints tokens per second and where a decoding step's time goes, in milliseconds (medians).
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tgi.core.config import BLOCK_SIZE, Limits
from tgi.core.messages import Sampling, Submit
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler
from tgi.launcher import flags
from tgi.launcher.launch import engine_settings
from tgi.runtime.runner import Runner


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step's stages; they follow each other."""

    schedule: float
    forward: float
    sample: float
    commit: float

    @property
    def whole(self) -> float:
        return self.schedule + self.forward + self.sample + self.commit


def load(model: str, options: Sequence[str], *, requests: int, context: int) -> tuple[Runner, Limits]:
    """A runner as the launcher would make it with these options, with room for so many requests of that length."""
    room = requests * -(-context // BLOCK_SIZE) * BLOCK_SIZE
    bounds = f"--max-total-tokens {context} --max-batch-total-tokens {max(room, 512)} --max-batch-size {requests}"
    line = ["--model-id", model, *options, *bounds.split(), "--max-batch-prefill-tokens", "512"]
    with tempfile.TemporaryDirectory() as folder:
        settings = engine_settings(flags.check(flags.parse(line)[0]), folder)
        return Runner.load(settings, lambda done, total: None), settings.limits


def run(runner: Runner, limits: Limits, requests: int, prompt: int, new: int) -> tuple[float, Step]:
    """All requests at once, greedy, to their full length. Tokens per second in all, and the median step that only
    decodes."""
    scheduler = Scheduler(
        blocks=limits.max_batch_total_tokens // BLOCK_SIZE,
        step_tokens=limits.max_batch_prefill_tokens,
        max_running=requests,
    )
    chance = random.Random()
    for number in range(requests):
        ids = [chance.randrange(runner.vocab_size) for _ in range(prompt)]
        scheduler.add(Request(0, Submit(number, ids, prompt, new, [], Sampling(), 0.0)))
    steps: list[Step] = []
    begin = time.perf_counter()
    while not scheduler.idle:
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        works = [chunk.work() for chunk in plan.chunks]
        times.append(time.perf_counter())
        launched = runner.launch(works)
        times.append(time.perf_counter())
        results = runner.sample(launched)
        times.append(time.perf_counter())
        scheduler.commit(plan, results)
        times.append(time.perf_counter())
        if len(plan.chunks) == requests and not any(chunk.prefills for chunk in plan.chunks):
            a, b, c, d, e = times
            steps.append(Step(b - a, c - b, d - c, e - d))
    rate = requests * new / (time.perf_counter() - begin)
    columns = zip(*((step.schedule, step.forward, step.sample, step.commit) for step in steps), strict=True)
    return rate, Step(*map(statistics.median, columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-id", default=flags.DEFAULT_MODEL)
    parser.add_argument("--options", default="", help="more of the launcher's options, in one string")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    longest = arguments.prompt + arguments.new
    options = arguments.options.split()
    runner, limits = load(arguments.model_id, options, requests=max(arguments.requests), context=longest)
    print("| requests | tokens/s | step | schedule | forward | sample | commit |\n|---|---|---|---|---|---|---|")
    for requests in arguments.requests:
        run(runner, limits, requests, arguments.prompt, 4)  # warms up
        rate, step = run(runner, limits, requests, arguments.prompt, arguments.new)
        parts = (step.whole, step.schedule, step.forward, step.sample, step.commit)
        print(f"| {requests} | {rate:.1f} | {' | '.join(f'{1e3 * part:.3f}' for part in parts)} |", flush=True)


if __name__ == "__main__":
    main()
