"""The engine alone: scheduler and runner in this process, no router and no client.

    python benchmarks/engine.py --requests 1 8 32 --options "--dtype bfloat16"
    GOMP_SPINCOUNT=0 python benchmarks/engine.py          # how OpenMP's threads wait matters on shared cores

Prints tokens per second and where a decoding step's time goes, in milliseconds (medians): its stages, and the native
kernels of which they are made.
"""

import argparse
import ctypes
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tgi.core.config import BLOCK_SIZE, Settings
from tgi.core.messages import Sampling, Submit
from tgi.engine.request import Request
from tgi.engine.scheduler import Plan, Scheduler
from tgi.kernels.library import library
from tgi.kernels.ops import Kind
from tgi.launcher import flags
from tgi.launcher.launch import engine_settings
from tgi.runtime.runner import Runner

STAGES = ("schedule", "forward", "sample", "commit")
"""Of a step; they follow each other."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where the seconds of a step went."""

    stages: dict[str, float]
    kernels: dict[str, float]
    """Of these, in each kind of native kernel."""

    @property
    def whole(self) -> float:
        return sum(self.stages.values())


class Profile:
    """Seconds in each kind of native kernel since it was made; nothing where there are none."""

    def __init__(self) -> None:
        self._seconds = (ctypes.c_double * len(Kind))()
        self._library = library()
        if self._library is not None:
            self._library.profile(self._seconds)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.profile(None)

    def read(self) -> dict[str, float]:
        return {kind.name.lower(): self._seconds[kind] for kind in Kind if self._seconds[kind]}


def load(model: str, options: Sequence[str], *, requests: int, context: int) -> tuple[Runner, Settings]:
    """A runner as the launcher would make it with these options, with room for so many requests of that length."""
    room = requests * -(-context // BLOCK_SIZE) * BLOCK_SIZE
    bounds = f"--max-total-tokens {context} --max-batch-total-tokens {max(room, 512)} --max-batch-size {requests}"
    line = ["--model-id", model, *bounds.split(), "--max-batch-prefill-tokens", "512", *options]
    with tempfile.TemporaryDirectory() as folder:
        settings = engine_settings(flags.check(flags.parse(line)[0]), folder)
        return Runner.load(settings, lambda done, total: None), settings


def run(runner: Runner, settings: Settings, requests: int, prompt: int, new: int) -> tuple[float, list[Step]]:
    """All requests at once, greedy, to their full length. Tokens per second in all, and the steps that decode all of
    them and nothing else."""
    scheduler = Scheduler(
        pools=settings.pools,
        step_tokens=settings.limits.max_batch_prefill_tokens,
        max_running=requests,
    )
    chance = random.Random()
    for number in range(requests):
        ids = [chance.randrange(runner.vocab_size) for _ in range(prompt)]
        scheduler.add(Request(0, Submit(number, ids, prompt, new, [], Sampling(), 0.0)))
    steps: list[Step] = []
    begin = time.perf_counter()
    with Profile() as profile:
        while not scheduler.idle:
            step, plan = one(runner, scheduler, profile)
            if len(plan.chunks) == requests and not any(chunk.prefills for chunk in plan.chunks):
                steps.append(step)
    rate = requests * new / (time.perf_counter() - begin)
    return rate, steps


def one(runner: Runner, scheduler: Scheduler, profile: Profile) -> tuple[Step, Plan]:
    """Run a step."""
    before = profile.read()
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
    stages = {stage: b - a for stage, (a, b) in zip(STAGES, pairwise(times), strict=True)}
    return Step(stages, {kind: seconds - before.get(kind, 0.0) for kind, seconds in profile.read().items()}), plan


def middle(steps: Sequence[Step]) -> Step:
    """The medians. Raises ValueError if there are no steps."""
    if not steps:
        raise ValueError("no step decoded all requests: the first ended before the last began; ask for more new tokens")

    def medians(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: statistics.median(part.get(name, 0.0) for part in parts) for name in parts[-1]}

    return Step(medians([step.stages for step in steps]), medians([step.kernels for step in steps]))


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
    runner, settings = load(arguments.model_id, options, requests=max(arguments.requests), context=longest)
    titles = ["requests", "tokens/s", "step", *STAGES, "kernels"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for requests in arguments.requests:
        run(runner, settings, requests, arguments.prompt, 4)  # warms up
        rate, steps = run(runner, settings, requests, arguments.prompt, arguments.new)
        step = middle(steps)
        parts = [f"{1e3 * seconds:.3f}" for seconds in (step.whole, *step.stages.values())]
        kernels = ", ".join(f"{kind} {1e3 * seconds:.3f}" for kind, seconds in step.kernels.items() if seconds)
        print(f"| {requests} | {rate:.1f} | {' | '.join(parts)} | {kernels} |", flush=True)


if __name__ == "__main__":
    main()
