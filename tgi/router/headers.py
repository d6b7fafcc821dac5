"""The ``x-…`` headers with which TGI tells what a request cost."""

from collections.abc import Sequence

from tgi.router.pipeline import Run


def of_stream(compute_type: str, prompts: Sequence[str]) -> dict[str, str]:
    """What is known before the first token. ``x-accel-buffering`` asks proxies to pass events on at once."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": str(sum(map(len, prompts))),
        "x-accel-buffering": "no",
    }


def of_answer(compute_type: str, runs: Sequence[Run], *, compute_time: bool = True) -> dict[str, str]:
    """Of finished runs, summed; ``compute_time`` as /v1/completions has none. Milliseconds, but for x-compute-time."""
    times = [run.times for run in runs]
    milliseconds = {
        "x-total-time": sum(_ms(t.total) for t in times),
        "x-validation-time": sum(_ms(t.validation) for t in times),
        "x-queue-time": sum(_ms(t.queue) for t in times),
        "x-inference-time": sum(_ms(t.inference) for t in times),
        "x-time-per-token": sum(_ms(t.inference / run.tokens) for t, run in zip(times, runs, strict=True)),
    }
    seconds = {"x-compute-time": str(sum(t.total for t in times))} if compute_time else {}
    return {
        "x-compute-type": compute_type,
        **seconds,
        "x-compute-characters": str(sum(len(run.generation.text) for run in runs)),
        **{name: str(value) for name, value in milliseconds.items()},
        "x-prompt-tokens": str(sum(len(run.generation.token_ids) for run in runs)),
        "x-generated-tokens": str(sum(run.tokens for run in runs)),
    }


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
