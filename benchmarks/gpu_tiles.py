"""Which tiles of Triton's kernels are fastest on this device: FOLDER/tiles.json gets a row for it, which is to be taken
over into tgi/kernels/triton/tiles.json. Nothing is tuned when a server starts."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from device import seconds
from gpu_kernels import WISHES, drawing, layers
from gpu_run import Run
from synthetic import synthetic
from tgi.attention.base import AttentionBackend, AttnSpec, Precision
from tgi.core.messages import Sampling, Token
from tgi.kernels.triton import tiles
from tgi.runtime.kvcache import BACKENDS

Tile = Mapping[str, int]
Work = Callable[[], torch.Tensor]
Prepare = Callable[[], Work]
"""Work is prepared anew for each tile: some of it may depend on tiles already."""

_TILE = tiles.tile
_GAIN = 0.98
"""Of its time that a better tile takes at most; less is noise."""
_CLOSE = 0.02
"""Difference of results, relative, that rounding explains."""


class Trial:
    """In the place of ``tiles.tile``: tells kernels what is tried, and notes who asks."""

    def __init__(self, table: Mapping[str, Tile]) -> None:
        self.table = dict(table)
        self.asked: dict[str, None] = {}

    def __call__(self, kernel: str, device: torch.device) -> Tile:
        self.asked[kernel] = None
        return self.table[kernel]

    def install(self) -> None:
        """In all modules that are loaded."""
        for name, module in list(sys.modules.items()):
            if name.startswith("tgi.") and getattr(module, "tile", None) is _TILE:
                module.tile = self  # type: ignore[attr-defined]  # it is there


def tune(run: Run) -> None:
    path = Path(tiles.__file__).with_name("tiles.json")
    table = json.loads(path.read_text())
    name = "cpu" if run.device.type == "cpu" else torch.get_device_module(run.device).get_device_name()
    row = table.setdefault(name, {})
    trial = Trial(table["any"] | row)
    done: set[str] = set()
    for title, prepare, graph in _workloads(run):
        with run.attempt(title), torch.inference_mode():
            prepare()()  # loads what asks
            trial.install()
            trial.asked.clear()
            prepare()()
            for kernel in [kernel for kernel in trial.asked if kernel not in done]:
                done.add(kernel)
                found, before, after = tuned(trial, kernel, prepare, run.device, graph=graph)
                row[kernel] = dict(found)
                run.journal.write("tile", kernel=kernel, what=title, tile=dict(found), before=before, after=after)
                out = {device: dict(sorted(own.items())) for device, own in table.items()}
                (run.out / "tiles.json").write_text(json.dumps(out, indent=2) + "\n")


def tuned(
    trial: Trial, kernel: str, prepare: Prepare, device: torch.device, *, graph: bool
) -> tuple[Tile, float, float]:
    """One constant after the other, as long as that helps: the best tile, and the seconds before and after."""

    def measured(tile: Tile) -> tuple[torch.Tensor, float]:
        trial.table[kernel] = tile
        torch.manual_seed(0)
        work = prepare()
        return work().float(), seconds(work, device, graph=graph)

    best = trial.table[kernel]
    expected, before = measured(best)
    least, tried, better = before, [best], True
    while better:
        better = False
        for tile in [tile for tile in _neighbours(best) if tile not in tried]:
            tried.append(tile)
            try:
                found, taken = measured(tile)
            except Exception:  # too large for a multiprocessor, or nothing that the kernel can be made of
                continue
            if taken < _GAIN * least and float((found - expected).norm() / expected.norm()) < _CLOSE:
                best, least, better = tile, taken, True
    trial.table[kernel] = best
    return best, before, least


def _neighbours(tile: Tile) -> Iterator[Tile]:
    for name, value in tile.items():
        for other in (value + 1, value - 1) if name == "num_stages" else (2 * value, value // 2):
            if other > 0:
                yield {**tile, name: other}


def _workloads(run: Run) -> Iterator[tuple[str, Prepare, bool]]:
    """(title, what makes work that runs kernels and returns something of what they made, whether a graph holds it)."""
    sizes, device = run.sizes, run.device
    heads, kv_heads, dim = (sizes.model[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    spec = AttnSpec(heads, kv_heads, dim, dim**-0.5)
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    batch, context = sizes.batches[-1], sizes.contexts[len(sizes.contexts) // 2]
    for fixed in (False, True):
        precision = Precision(compute, compute, fixed)
        made = next(each for each in BACKENDS if each.declines(spec, precision, device) is None)
        for starts, length in (([context - 1] * batch, 1), ([0], sizes.prompts[-1])):
            title = f"attention, {len(starts)} of {length}{', fixed' * fixed}"
            yield title, partial(_attention, made, spec, precision, device, starts, length), True
    model = synthetic(sizes.model | {"num_hidden_layers": 2}, None, device)
    ids = torch.arange(max(sizes.drawn), device=device)

    def forward() -> torch.Tensor:
        return model.forward(ids, ids, lambda layer, qkv, turn: qkv[:, : heads * dim].contiguous())  # type: ignore[union-attr]  # a paged one

    yield "layers", lambda: forward, True
    logits = torch.randn(max(sizes.drawn), sizes.model["vocab_size"], device=device)
    for name, wish in WISHES.items():
        yield f"sampling, {name}", partial(_sampling, logits, wish), False


def _attention(
    made: type[AttentionBackend],
    spec: AttnSpec,
    precision: Precision,
    device: torch.device,
    starts: Sequence[int],
    length: int,
) -> Work:
    work, outs = layers(made(spec, precision, device), spec, precision, starts, length, 1)

    def first() -> torch.Tensor:
        work()
        return outs[0]

    return first


def _sampling(logits: torch.Tensor, wish: Sampling) -> Work:
    draw = drawing(logits, wish)

    def ids() -> torch.Tensor:
        return torch.tensor([token.id for token in draw() if isinstance(token, Token)])

    return ids
