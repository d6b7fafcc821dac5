"""On CPU a request's logits are the same to the bit: alone, in a crowd, however its prompt is cut, preempted or not,
whatever the cache holds, for any number of threads."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import Engine, pools, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tgi.core.messages import Sampling, Submit
from tgi.engine.request import Request
from tgi.engine.scheduler import Scheduler
from tgi.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="torch's own kernels promise no such thing")

WAYS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "stored": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "stored": torch.int8, "quantize": "int8"},
    "int4": {"dtype": torch.bfloat16, "stored": torch.bfloat16, "quantize": "int4"},
    "fp8": {"dtype": torch.bfloat16, "stored": torch.float8_e4m3fn, "quantize": "fp8"},
    "nf4": {"dtype": torch.bfloat16, "stored": torch.float8_e5m2, "quantize": "bitsandbytes-nf4"},
}


def requests() -> list[Submit]:
    """Prompts of all lengths, some with the same beginning; greedy and drawn."""
    chance = random.Random(7)
    shared = tokens(70, 100).tolist()
    submits = []
    for number in range(12):
        ids = shared[: chance.choice([0, 20, 48, 70])] + tokens(chance.randrange(1, 90), number).tolist()
        sampling = Sampling(seed=number, greedy=number % 2 == 0, temperature=1.5, top_p=0.9)
        submits.append(Submit(number, ids, len(ids), chance.randrange(2, 12), [], sampling, 0.0))
    return submits


def trace(engine: Engine, scheduler: Scheduler, submits: Sequence[Submit]) -> dict[tuple[int, int], torch.Tensor]:
    """(request, tokens it had) → the logits from which its next token came or, where there are none, the token and its
    log-probability."""
    found = {}
    for submit in submits:
        assert scheduler.add(Request(0, submit)) is None
    while not scheduler.idle:
        plan = scheduler.schedule()
        works = [chunk.work() for chunk in plan.chunks]
        launched = engine.runner.launch(works)
        seen = {}
        if launched.logits is not None:
            seen = {at: logits.clone() for at, logits in zip(launched.drawing, launched.logits, strict=True)}
        results = engine.runner.sample(launched)
        for at in launched.plain:
            (token,) = results[at].tokens
            seen[at] = torch.tensor([token.id, token.logprob], dtype=torch.float64)
        assert seen.keys() == {at for at, work in enumerate(works) if work.samples}
        for at, value in seen.items():
            key = works[at].submit.id, len(works[at].tokens)
            assert key not in found or torch.equal(found[key], value), "a resumed request"
            found[key] = value
        scheduler.commit(plan, results)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2-moe"])
def test_logits_are_the_same_to_the_bit(tmp_path: Path, family: str, way: str) -> None:
    if family in VARIANTS:
        kind, config = VARIANTS[family]
        folder = write_reference(tmp_path, kind, **config)
    else:
        folder = write_model(tmp_path, family, **({"sliding_window": 37} if family == "mistral" else {}))
    engine = Engine(folder, **WAYS[way])
    submits = requests()
    alone: dict[tuple[int, int], torch.Tensor] = {}
    for submit in submits:
        alone |= trace(engine, Scheduler(pools=pools(engine.model, 64), step_tokens=512, max_running=8), [submit])
    threads = torch.get_num_threads()
    chance = random.Random(3)
    try:
        for count, step_tokens, blocks in ((1, 512, 64), (2, 37, 64), (3, 16, 64), (2, 60, 14)):
            torch.set_num_threads(count)
            scheduler = Scheduler(pools=pools(engine.model, blocks), step_tokens=step_tokens, max_running=8)
            for _ in range(2):  # the second time with what the first left in the cache
                together = trace(engine, scheduler, chance.sample(submits, len(submits)))
                assert together.keys() == alone.keys()
                assert all(torch.equal(together[key], alone[key]) for key in alone)
    finally:
        torch.set_num_threads(threads)
