"""Our models beside transformers' on the same folder, in float32."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny import write_model
from tgi.attention.base import AttnSpec, Turn
from tgi.attention.sdpa import SdpaAttention
from tgi.core.config import KVPool, ModelFiles
from tgi.core.messages import Delta, Fault, Sampling, Submit
from tgi.engine.request import Request
from tgi.engine.scheduler import Plan, Scheduler
from tgi.models.registry import Model, load_model
from tgi.runtime.runner import Drawing, Runner


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch alone, as on a GPU."""
    monkeypatch.setattr("tgi.kernels.library.library", lambda: None)
    monkeypatch.setattr("tgi.runtime.kvcache.BACKENDS", (SdpaAttention,))


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> None:
    """Our own kernels where they can do it, or torch."""
    if request.param == "torch":
        request.getfixturevalue("without_kernels")


class FullAttention:
    """The definition of attention, without a cache: sequences that begin at position 0, one behind the other."""

    def __init__(self, specs: Sequence[AttnSpec], lengths: Sequence[int]) -> None:
        self._specs = specs
        self._lengths = list(lengths)

    def __call__(self, layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        spec = self._specs[layer]
        q, k, v = turn(qkv)
        outs = []
        for q_, k_, v_ in zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True):
            place = torch.arange(len(q_), device=q_.device)
            seen = place[None] <= place[:, None]
            if spec.window is not None:
                seen &= place[None] > place[:, None] - spec.window
            heads = [t.transpose(0, 1)[None] for t in (q_, k_, v_)]
            if spec.softcap is None and spec.slopes is None:
                out = scaled_dot_product_attention(*heads, attn_mask=seen, scale=spec.scale, enable_gqa=True)
            else:
                k_, v_ = (t.repeat_interleave(spec.heads // spec.kv_heads, 1) for t in heads[1:])
                scores = heads[0] @ k_.transpose(-1, -2) * spec.scale
                if spec.softcap is not None:
                    scores = (scores / spec.softcap).tanh() * spec.softcap
                if spec.slopes is not None:
                    behind = place[:, None] - place[None]
                    scores = scores - torch.tensor(spec.slopes, device=q_.device)[:, None, None] * behind
                out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v_
            outs.append(out[0].transpose(0, 1).reshape(len(q_), -1))
        return torch.cat(outs)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: object) -> Model:
    """Our model of a folder."""
    weights = sorted(str(path) for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}"))
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=weights)
    return load_model(files, dtype, torch.device(device), progress=lambda done, total: None, **options)  # type: ignore[arg-type]  # options are load_model's


def logits(model: Model, *sequences: torch.Tensor) -> torch.Tensor:
    """Logits of every token of fresh sequences, computed in one flat batch."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length, device=sequences[0].device) for length in lengths])
    return model.logits(model.forward(torch.cat(sequences), positions, FullAttention(model.specs, lengths))).clone()


def pools(model: Model, blocks: int | Sequence[int]) -> list[KVPool]:
    """One for each kind of layer, of this size or these."""
    windows = sorted({spec.window or math.inf for spec in model.specs} or {math.inf}, reverse=True)
    sizes = [blocks] * len(windows) if isinstance(blocks, int) else blocks
    return [
        KVPool(size, None if window == math.inf else int(window)) for size, window in zip(sizes, windows, strict=True)
    ]


class Engine:
    """Scheduler, runner and a model; ``run`` gives every request to its end."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        *,
        blocks: int | Sequence[int] = 64,
        step_tokens: int = 512,
        stored: torch.dtype = torch.float32,
        ahead: bool = False,
        **options: Any,
    ) -> None:
        """``ahead``: as if the device ran by itself. ``options`` are load_model's."""
        self.model = load(folder, device, **options)
        own = pools(self.model, blocks)
        group: Any = options.get("group")
        self.runner = Runner.of(self.model, own, step_tokens, stored, torch.device(device), group)
        self.runner._forward.ahead |= ahead
        self.scheduler = Scheduler(pools=own, step_tokens=step_tokens, max_running=8, ahead=ahead)
        self.deltas: dict[int, list[Delta]] = defaultdict(list)
        self.faults: list[Fault] = []
        self.preempted: set[int] = set()

    def run(self, *submits: Submit) -> None:
        for submit in submits:
            assert self.scheduler.add(Request(0, submit)) is None
        under_way: tuple[Plan, Drawing] | None = None
        while not self.scheduler.idle:
            running = list(self.scheduler.running)
            plan = self.scheduler.schedule()
            self.preempted |= {r.submit.id for r in running if r not in self.scheduler.running}
            launched = self.runner.launch([chunk.work() for chunk in plan.chunks]) if plan.chunks else None
            before, under_way = under_way, None
            if before is not None:
                self._book(*before)
            if launched is not None:
                drawing = self.runner.draw(launched, [chunk.work() for chunk in plan.chunks])
                if self.runner.ahead:
                    under_way = plan, drawing
                else:
                    self._book(plan, drawing)

    def _book(self, plan: Plan, drawing: Drawing) -> None:
        for _, message in self.scheduler.commit(plan, self.runner.collect(drawing)):
            if isinstance(message, Delta):
                self.deltas[message.id].append(message)
            else:
                self.faults.append(message)
        self.scheduler.check_integrity()

    def text(self, number: int) -> list[int]:
        return [token.id for delta in self.deltas[number] for token in delta.tokens]


def reference(folder: Path, attention: str = "eager") -> torch.nn.Module:
    """transformers' model of the same folder; every tensor must have found its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def write_reference(folder: Path, family: str, **config: Any) -> Path:
    """A model of transformers' own making, with weights that tell apart what a model may mix up."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, *sequences: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(sequence[None]).logits[0] for sequence in sequences])


Theirs = Callable[[torch.Tensor], torch.Tensor]
"""Logits of a sequence's tokens."""


def same_in_a_batch(folder: Path, theirs: Theirs) -> None:
    long, short = tokens(50), tokens(23, seed=1)
    ours = logits(load(folder, max_total_tokens=64), long, short)
    expected = torch.cat([theirs(long), theirs(short)])
    assert expected.std() > 0.3, "logits this flat would hide a mistake"
    assert (ours - expected).abs().max() < 1e-4


def same_through_the_cache(folder: Path, theirs: Theirs) -> None:
    """Greedy, two requests of different length, chunked and preempted, with the log-probabilities of every token;
    then one that goes on where the first ended."""
    engine = Engine(folder, blocks=10, step_tokens=24)
    submits = [
        Submit(number, tokens(length, seed=number).tolist(), length, 12, [], Sampling(), 0.0, prompt_logprobs=True)
        for number, length in enumerate((70, 33))
    ]
    engine.run(*submits)
    told = [*submits[0].token_ids, *engine.text(0), 3]
    again = Submit(2, told, len(told), 5, [], Sampling(), 0.0)
    engine.run(again)
    assert not engine.faults
    assert engine.deltas[2][0].cached == 80
    for submit in (*submits, again):
        deltas = engine.deltas[submit.id]
        drawn = [token for delta in deltas for token in delta.tokens]
        ids = submit.token_ids + [token.id for token in drawn]
        expected = theirs(torch.tensor(ids))[:-1].log_softmax(-1)
        scores = [*(token.logprob for delta in deltas for token in delta.prompt), *(token.logprob for token in drawn)]
        chosen = expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)[-len(scores) :]
        assert (torch.tensor(scores) - chosen).abs().max() < 1e-4


def tokens(length: int, seed: int = 0, vocab: int = 431) -> torch.Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model folder; the test's parameter is (family, overrides)."""
    family, overrides = request.param
    return write_model(tmp_path / family, family, **overrides)
