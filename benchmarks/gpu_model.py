"""A whole model in this process: a synthetic Llama-3.1-8B under load, and a small model beside transformers."""

import gc
import importlib.util
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import log_softmax

from device import Trace, copied
from engine import load
from gpu_run import Run
from quality import Loss, Reader, figures, windows
from synthetic import synthetic, write_checkpoint
from tgi.core.config import BLOCK_SIZE, KVPool, ModelFiles, Settings
from tgi.core.messages import Sampling, Step, StepStats, Submit, Token, ToRouter
from tgi.core.vocabulary import Vocabulary
from tgi.engine.loop import Loop
from tgi.engine.scheduler import Scheduler
from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.index import PACKAGES
from tgi.launcher.launch import store
from tgi.runtime.runner import Runner

FORMS: dict[str, str | None] = {"bfloat16": None, "fp8": "fp8", "int4": "int4"}
"""Of weights, as ``--quantize`` names them."""
_STEP = 4096
"""Tokens of the largest step."""


class Answered(Exception):
    """All that was asked came."""


@dataclass(slots=True)
class Client:
    """In the place of the engine's mailbox: asks, and notes what comes."""

    asked: deque[Submit] = field(default_factory=deque)
    tokens: dict[int, list[Token]] = field(default_factory=dict)
    steps: list[StepStats] = field(default_factory=list)
    oldest: int = 0

    def poll(self, *, wait: bool) -> Iterator[tuple[int, Submit]]:
        if wait and not self.asked:
            raise Answered
        while self.asked:
            yield 0, self.asked.popleft()

    def wake(self) -> None: ...

    def send(self, router: int, message: ToRouter) -> None:
        assert isinstance(message, Step) and not message.faults, message
        if message.stats is not None:
            self.steps.append(message.stats)
        for delta in message.deltas:
            self.tokens.setdefault(delta.id, []).extend(delta.tokens)


class Engine:
    """Scheduler, runner and their loop, as they serve."""

    def __init__(self, runner: Runner, pools: Sequence[KVPool], step: int, rows: int) -> None:
        """``step``: its most tokens; ``rows``: its most requests."""
        self.client = Client()
        scheduler = Scheduler(pools=pools, step_tokens=step, max_running=rows, ahead=runner.ahead)
        self._loop = Loop(self.client, scheduler, runner, _no_vocabulary)  # type: ignore[arg-type]  # all of a mailbox that it uses
        self.run([])  # captures graphs

    @classmethod
    def of(cls, runner: Runner, settings: Settings) -> "Engine":
        return cls(runner, settings.pools, settings.limits.max_batch_prefill_tokens, settings.limits.max_batch_size)

    def run(self, submits: Sequence[Submit]) -> dict[int, list[Token]]:
        """All at once, to their ends. The tokens of each."""
        self.client.asked.extend(submits)
        self.client.tokens, self.client.steps = {}, []
        with suppress(Answered):
            self._loop.run()
        return self.client.tokens


def _no_vocabulary() -> Vocabulary:
    raise AssertionError("nobody asks for a grammar")


def step(run: Run) -> None:
    """Decoding steps by rows, and what lies idle of the device in the largest."""
    for form, quantize in FORMS.items():
        with run.attempt(form):
            _steps(run, form, quantize)
        _free(run.device)


def _steps(run: Run, form: str, quantize: str | None) -> None:
    sizes, config = run.sizes, run.sizes.model
    # The largest steps are seen in one form; prompts for them take long.
    decoding = sizes.decoding if quantize is None else sizes.decoding[:4]
    most, length = max(decoding), sizes.context + sizes.new
    before = _allocated(run.device)
    model = synthetic(config, quantize, run.device)
    # A step reads a few rows of the embedding.
    weights = max(_allocated(run.device) - before - 2 * config["vocab_size"] * config["hidden_size"], 0)
    pools = [KVPool(most * -(-length // BLOCK_SIZE) + 1)]
    runner = Runner.of(model, pools, _STEP, torch.bfloat16, run.device, graphs=decoding)
    engine = Engine(runner, pools, _STEP, most)
    position = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    reading = copied(sizes.copies[-1], run.device)

    def submits(new: int, first: int = 0, rows: int = most) -> list[Submit]:
        return [_submit(row, sizes.context, new, config["vocab_size"]) for row in range(first, first + rows)]

    engine.run(submits(4, first=most, rows=1 + most // 32))  # compiles kernels
    engine.run(submits(1))  # whose prompts are in the prefix cache from now on
    prompts = [stats.duration for stats in engine.client.steps if stats.prefill_rows]
    run.journal.write("prompts", form=form, tokens=most * sizes.context, seconds=sum(prompts))
    for rows in decoding:
        engine.run(submits(sizes.new, rows=rows))
        plain = [stats for stats in engine.client.steps if not stats.prefill_rows and stats.decode_rows == rows]
        each = statistics.median(stats.duration for stats in plain[4:])
        cached = rows * position * (sizes.context + sizes.new // 2)
        cell = {"form": form, "rows": rows, "context": sizes.context, "seconds": each, "read_gb_s": reading}
        run.journal.write("step", **cell, weights=weights, cached=cached)
    if run.device.type == "cpu" or quantize is not None:  # a CPU's kernels aren't torch's
        return
    with run.attempt(f"{form}, trace"):
        trace = Trace.of(lambda: engine.run(submits(sizes.new)), run.device)
        kernels = {name: total for name, (_, total) in trace.kernels().items()}
        longest = dict(islice(kernels.items(), 20))
        run.journal.write("trace", form=form, rows=most, idle=trace.idle, busy=trace.busy, kernels=longest)


def _free(device: torch.device) -> None:
    """What nobody holds any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def _allocated(device: torch.device) -> int:
    """Bytes; not told of a CPU."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).memory_allocated()


def _submit(row: int, prompt: int, new: int, vocabulary: int) -> Submit:
    chance = torch.Generator().manual_seed(row)
    return Submit(
        row, torch.randint(vocabulary, (prompt,), generator=chance).tolist(), prompt, new, [], Sampling(), 0.0
    )


def correctness(run: Run) -> None:
    """Next-token distributions and greedy answers beside transformers' in float32, whose own in bfloat16 are what ours
    are judged by; and whether answers depend on who else is served."""
    name, files = small_model(run)
    texts = windows(Path(files.folder) / "tokenizer.json", run.sizes.checks[1])[: run.sizes.checks[0]]
    with run.attempt("distributions"):
        _distributions(run, name, files, texts)
    with run.attempt("--deterministic"):
        _invariance(run, name, texts)


def small_model(run: Run) -> tuple[str, ModelFiles]:
    """What a launcher would be told, and its files: the demo model if it is here, else a synthetic one."""
    package = PACKAGES[flags.DEFAULT_MODEL]
    own = store(flags.cache_options())
    places = [own.cache / package.file]
    spec = importlib.util.find_spec(package.parts[0][1].partition("/")[0])
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / package.file)
    found = next((place for place in places if place.exists()), None)
    if found is None or run.device.type == "cpu":
        found = write_checkpoint(run.scratch / "small", run.sizes.checked, run.device)
    return str(found), resolve_model(str(found), None, own)


@torch.inference_mode()
def _distributions(run: Run, name: str, files: ModelFiles, texts: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    length, new = len(texts[0]), run.sizes.new
    path = Path(files.weights[0])
    source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if source else files.folder
    exact = AutoModelForCausalLM.from_pretrained(folder, **source, dtype=torch.float32).to(run.device)
    ids = torch.tensor(texts, device=run.device)
    rows = {"transformers, float32": _rows(exact(ids).logits)}
    prompt = ids[:1, : length // 2]
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    greedy = exact.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, length // 2 :].tolist()
    rows["transformers, bfloat16"] = _rows(exact.bfloat16()(ids).logits)
    del exact
    for dtype in ("float32", "bfloat16"):
        options = ["--dtype", dtype, "--device", run.device.type]
        runner, settings = load(name, options, requests=len(texts), context=length + new)
        reader = Reader(runner, settings, texts)
        rows[f"tgi, {dtype}"] = torch.stack([reader.step(at).cpu() for at in range(length - 1)], 1)
        submit = Submit(0, prompt[0].tolist(), length // 2, new, [], Sampling(), 0.0)
        mine = [token.id for token in Engine.of(runner, settings).run([submit])[0]]
        same = next((at for at, (a, b) in enumerate(zip(mine, greedy, strict=True)) if a != b), new)
        run.journal.write("greedy", model=Path(name).name, form=f"tgi, {dtype}", tokens=new, same=same)
        del runner, reader
        _free(run.device)
    reference = rows["transformers, float32"]
    following = torch.tensor(texts)[:, 1:].flatten()
    right = Loss()
    right.add(reference.flatten(0, 1), reference.flatten(0, 1), following)
    for form, own in rows.items():
        loss = Loss()
        loss.add(own.flatten(0, 1), reference.flatten(0, 1), following)
        run.journal.write("distribution", model=Path(name).name, form=form, **figures(loss, right))


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of what follows each token but the last: float64 [windows, tokens - 1, vocabulary]."""
    return log_softmax(logits[:, :-1].double(), -1).cpu()


def _invariance(run: Run, name: str, texts: list[list[int]]) -> None:
    """The same requests, drawn at temperature 1, alone and among others of other lengths."""
    others = 2 * max(run.sizes.drawn) // len(texts) + 1
    new, length = run.sizes.new, len(texts[0])
    options = ["--device", run.device.type, *(() if run.device.type == "cpu" else ("--deterministic",))]
    runner, settings = load(name, options, requests=min(len(texts) * others, 256), context=length + new)
    engine = Engine.of(runner, settings)
    wish = Sampling(greedy=False, seed=7)
    submits = [
        Submit(row, text[: length - other % (length // 2)], length - other % (length // 2), new, [], wish, 0.0)
        for row, (other, text) in enumerate((other, text) for other in range(others) for text in texts)
    ]
    among = engine.run(submits)
    same = sum(engine.run([submit])[submit.id] == among[submit.id] for submit in submits[: len(texts)])
    run.journal.write("invariance", model=Path(name).name, alike=same, asked=len(texts), among=len(submits))
