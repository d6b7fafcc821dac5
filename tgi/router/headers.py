"""The ``x-…`` headers with which TGI tells what a request cost."""

from collections.abc import Callable, Sequence

from tgi.router.metrics import Times
from tgi.router.pipeline import Run


def of_stream(compute_type: str, prompts: Sequence[str]) -> dict[str, str]:
    """What is known before the first token. ``x-accel-buffering`` asks proxies to pass events on at once."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": str(sum(map(len, prompts))),
        "x-accel-buffering": "no",
    }


def of_answer(compute_type: str, runs: Sequence[Run], choices: int = 1, *, compute_time: bool = True) -> dict[str, str]:
    """Of finished runs. Milliseconds, but for x-compute-time, which /v1/completions has not.

    Each ``choices`` runs in a row are answers to one prompt: their tokens are added up, and of their times the longest
    counts. All is summed over prompts, as TGI does.
    """
    prompts = [runs[start : start + choices] for start in range(0, len(runs), choices)]

    def longest(time: Callable[[Times, Run], float]) -> list[float]:
        return [max(time(run.times, run) for run in answers) for answers in prompts]

    durations = {
        "x-total-time": longest(lambda t, _: t.total),
        "x-validation-time": longest(lambda t, _: t.validation),
        "x-queue-time": longest(lambda t, _: t.queue),
        "x-inference-time": longest(lambda t, _: t.inference),
        "x-time-per-token": longest(lambda t, run: t.inference / max(1, run.tokens)),
    }
    firsts = runs[::choices]
    return {
        "x-compute-type": compute_type,
        **({"x-compute-time": str(sum(durations["x-total-time"]))} if compute_time else {}),
        "x-compute-characters": str(sum(len(run.generation.text) for run in firsts)),
        **{name: str(sum(int(seconds * 1000) for seconds in each)) for name, each in durations.items()},
        "x-prompt-tokens": str(sum(len(run.generation.token_ids) for run in firsts)),
        "x-generated-tokens": str(sum(run.tokens for run in runs)),
    }
