"""Through the runner and its paged cache: chunked prefill, decoding and shared prefixes give transformers' logits."""

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import DEVICES, Engine, load, pools, reference, reference_logits, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import FAMILIES, write_model
from tgi.core.config import BLOCK_SIZE
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime.runner import Runner

PAGES = 24
LENGTH = 70

WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("mistral", {"sliding_window": 21}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7}),
}
MODELS = {family: (family, {}) for family in FAMILIES} | WINDOWS


class Pair:
    """Two requests in one cache, their pages mixed, each at its own place."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        model = load(folder, device, max_total_tokens=LENGTH)
        own = pools(model, PAGES)
        self.runner = Runner.of(model, own, 512, torch.float32, torch.device(device))
        self.kinds = len(own)
        self.ids = [tokens(LENGTH, seed).tolist() for seed in (3, 4)]
        pages = torch.randperm(PAGES, generator=torch.Generator().manual_seed(5)).tolist()
        self.pages = [pages[0::2], pages[1::2]]

    def step(self, *chunks: tuple[int, int, int]) -> list[torch.Tensor]:
        """Logits behind each chunk (request, start, end), in the order of the chunks."""
        works = [self._work(*chunk) for chunk in chunks]
        launched = self.runner.launch(works)
        assert launched.logits is not None
        rows = dict(zip(launched.drawing, launched.logits.cpu(), strict=True))
        return [rows[index] for index in range(len(works))]

    def _work(self, request: int, start: int, end: int) -> Work:
        ids = self.ids[request][:end]
        submit = Submit(request, ids, end, 1, [], Sampling(top_n_tokens=1), 0.0)  # which takes logits
        pages = self.pages[request][: -(-end // BLOCK_SIZE)]
        return Work(submit, ids, start, end - start, end, True, [array("i", pages)] * self.kinds, {})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", MODELS.values(), ids=MODELS.keys(), indirect=True)
def test_chunks_decodes_and_mixed_steps(folder: Path, device: str):
    pair = Pair(folder, device)
    theirs = [reference_logits(reference(folder), torch.tensor(ids)) for ids in pair.ids]
    plan = [
        [(0, 0, 5)],
        [(1, 0, 33), (0, 5, 6)],
        [(0, 6, 40), (1, 33, 34)],
        [(1, 34, 35), (0, 40, 41)],
        [(0, 41, 42), (1, 35, 36)],
        [(1, 36, 70), (0, 42, 70)],
    ]
    for chunks in plan:
        for (request, _, end), ours in zip(chunks, pair.step(*chunks), strict=True):
            assert (ours - theirs[request][end - 1]).abs().max() < 1e-4


def test_a_shared_prefix_and_a_start_from_nothing_are_the_same(tmp_path: Path):
    """A prefix hit, and a request that lost its pages and computes all again, change no logit."""
    pair = Pair(write_model(tmp_path, "llama"))
    (first,) = pair.step((0, 0, 50))
    pair.ids[1] = pair.ids[0]
    pair.pages[1][:3] = pair.pages[0][:3]
    (hit,) = pair.step((1, 48, 50))
    assert (hit - first).abs().max() < 1e-5
    pair.pages[0] = pair.pages[0][::-1]
    (again,) = pair.step((0, 0, 50))
    assert torch.equal(again, first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", MODELS.values(), ids=MODELS.keys(), indirect=True)
def test_requests_that_are_preempted_generate_what_the_reference_does(folder: Path, device: str):
    """Three requests in a cache that holds about two of them, scheduled in small steps."""
    engine, theirs = Engine(folder, device, blocks=8, step_tokens=24), reference(folder)
    prompts = [tokens(20 + number, seed=number).tolist() for number in range(3)]
    engine.run(*(Submit(number, ids, len(ids), 40, [], Sampling(), 0.0) for number, ids in enumerate(prompts)))
    assert engine.preempted
    for number, prompt in enumerate(prompts):
        text = engine.text(number)
        logits = reference_logits(theirs, torch.tensor(prompt + text))[len(prompt) - 1 : -1]
        assert len(text) == 40
        assert logits.argmax(-1).tolist() == text


def test_preemption_changes_no_wish(tmp_path: Path):
    """What the next token is made of is rebuilt from the ids, whatever happened to the request in between."""
    folder = write_model(tmp_path, "llama")
    wishes: list[dict[str, Any]] = [
        {"min_p": 0.2, "temperature": 2.0},
        {"min_tokens": 30, "frequency_penalty": 0.5},
        {"watermark": (0.4, 3.0), "repetition_penalty": 1.3},
    ]
    stops = list(range(0, 431, 7))
    submits = []
    for number, wish in enumerate(wishes):
        sampling = Sampling(greedy=False, seed=number, **wish)
        ids = tokens(20, seed=number).tolist()
        submits.append(Submit(number, ids, 20, 40, stops if number == 1 else [], sampling, 0.0))
    crowd = Engine(folder, blocks=7, step_tokens=24)
    crowd.run(*submits)
    assert crowd.preempted == {1, 2}
    assert not set(crowd.text(1)[:30]) & set(stops)
    assert len(crowd.text(1)) < 40, "behind the thirtieth, a stop token ends it soon"
    for submit in submits:
        alone = Engine(folder)
        alone.run(submit)
        assert alone.text(submit.id) == crowd.text(submit.id)


@pytest.mark.parametrize(("folder", "sizes"), [("gemma3", [16, 4]), ("starcoder2", [3])], ids=["gemma3", "starcoder2"])
def test_behind_a_window_blocks_are_given_up_and_a_later_turn_finds_the_end(
    tmp_path: Path, folder: str, sizes: list[int]
):
    """A request of 200 tokens where layers with a window have room for 64 or 48; then one that goes on from there."""
    if folder == "gemma3":
        write_model(tmp_path, folder)
    else:
        family, config = VARIANTS["starcoder2-window"]
        write_reference(tmp_path, family, **config | {"max_position_embeddings": 512})
    engine, theirs = Engine(tmp_path, blocks=sizes, step_tokens=20), reference(tmp_path)
    prompt = tokens(160).tolist()
    engine.run(Submit(1, prompt, 160, 40, [], Sampling(), 0.0))
    later = prompt + engine.text(1) + [5, 6, 7]
    engine.run(Submit(2, later, 203, 20, [], Sampling(), 0.0))
    assert not engine.faults
    assert not engine.preempted
    assert engine.deltas[2][0].cached == 192
    for number, ids in ((1, prompt), (2, later)):
        text = engine.text(number)
        logits = reference_logits(theirs, torch.tensor(ids + text))[len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == text
