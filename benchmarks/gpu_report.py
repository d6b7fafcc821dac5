"""Records of gpu.py → tables: each figure beside what the device allows, and what is to be reached. Measures nothing.

Of what was measured several times the last counts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from linear import table as linear_table
from records import Data, Record

_KEYS = (
    *("part", "what", "backend", "batch", "context", "cache", "form", "out", "inner", "rows", "wish"),
    *("server", "streams", "prompt", "new", "model"),
)
"""What tells records of a kind apart."""


def latest(data: Data, kind: str, **keys: object) -> list[Record]:
    return [*{tuple(each.get(key) for key in _KEYS): each for each in data.of(kind, **keys)}.values()]


@dataclass(frozen=True, slots=True)
class Target:
    """From the plan of this server's GPU path."""

    title: str
    bound: float
    figure: Callable[[Data], float | None]
    """None: it wasn't measured."""
    most: bool = False
    """Whether it is the most that it may be."""
    unit: str = "%"

    def told(self, data: Data) -> list[str]:
        value = self.figure(data)
        if value is None:
            return [self.title, self._asked, "-", "-"]
        reached = value <= self.bound if self.most else value >= self.bound
        return [self.title, self._asked, self._with_unit(value), "PASS" if reached else "short"]

    @property
    def _asked(self) -> str:
        return f"{'≤' if self.most else '≥'} {self._with_unit(self.bound)}"

    def _with_unit(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:,.1f} {self.unit}"


def _step(form: str) -> Callable[[Data], float | None]:
    return lambda data: next((_share(cell) for cell in latest(data, "step", form=form) if cell["rows"] == 1), None)


def _share(cell: Record) -> float | None:
    """Of the memory's speed, by the bytes that a step must read; a CPU's aren't counted."""
    if not cell["weights"]:
        return None
    share: float = 1e-9 * (cell["weights"] + cell["cached"]) / cell["seconds"] / cell["read_gb_s"]
    return share


def _attention(cache: str) -> Callable[[Data], float | None]:
    def least(data: Data) -> float | None:
        cells = latest(data, "attention", what="decode", cache=cache)
        shares = [_by_reading(data, cell) for cell in cells if cell["batch"] >= 8 and cell["backend"] != "sdpa"]
        return min((share for share in shares if share is not None), default=None)

    return least


def _by_reading(data: Data, cell: Record) -> float | None:
    ceiling = data.ceiling(cell)
    return None if ceiling is None else 1e-9 * cell["bytes"] / cell["seconds"] / ceiling["read_gb_s"]


def _load(form: str, server: str = "tgi", new: int = 1000) -> Callable[[Data], float | None]:
    def rate(data: Data) -> float | None:
        cells = [cell for cell in latest(data, "load", server=server, form=form) if cell["new"] == new]
        return cells[-1]["tokens_s"] if cells else None

    return rate


def _last(kind: str, figure: Callable[[Record], float], **keys: object) -> Callable[[Data], float | None]:
    return lambda data: next((figure(each) for each in reversed(data.of(kind, **keys))), None)


TARGETS = [
    Target("decoding at batch 1, bfloat16, of the bandwidth", 0.75, _step("bfloat16")),
    Target("decoding at batch 1, fp8", 0.65, _step("fp8")),
    Target("decoding at batch 1, int4", 0.55, _step("int4")),
    Target("attention while decoding, batch ≥ 8, the least of all sizes", 0.8, _attention("bfloat16")),
    Target("that attention, cache in fp8", 0.8, _attention("float8_e4m3fn")),
    Target("1000 in, 1000 out, bfloat16", 8000, _load("bfloat16"), unit="tokens/s"),
    Target("1000 in, 1000 out, fp8", 12000, _load("fp8"), unit="tokens/s"),
    Target("idle while decoding", 0.03, _last("trace", lambda each: each["idle"], form="bfloat16"), most=True),
    Target("ready, weights in memory", 20, _last("start", lambda each: each["ready_s"], form="bfloat16"), True, "s"),
    Target(
        "greedy tokens as transformers', float32",
        1.0,
        _last("greedy", lambda each: each["same"] / each["tokens"], form="tgi, float32"),
    ),
    Target("answers alone as among others", 1.0, _last("invariance", lambda each: each["alike"] / each["asked"])),
]


def markdown(data: Data) -> str:
    """The whole report."""
    run = data.of("run")[-1]
    lines = [f"* {key}: {value}" for key, value in run.items() if key != "kind" and value not in (None, "")]
    lines += ["", *_table(["target", "asked", "measured", ""], [target.told(data) for target in TARGETS])]
    for title, part in _PARTS.items():
        if found := [*part(data)]:
            lines += ["", f"## {title}", "", *found]
    errors = [each for each in data.of("error") if each["at"] >= run["at"]]
    if errors:
        lines += ["", "## Errors", "", *(f"* {each['part']}, {each['what']}: {each['error']}" for each in errors)]
    times = ", ".join(f"{each['part']} {each['seconds']:.0f}" for each in data.of("part") if each["at"] >= run["at"])
    return "\n".join([*lines, "", f"Seconds: {times}.", ""])


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def _of(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ceilings(data: Data) -> Iterator[str]:
    for each in data.of("ceiling")[-1:]:
        copies = ", ".join(f"{int(size) / 1e6:.0f} MB {rate:,.0f}" for size, rate in each["copies_gb_s"].items())
        yield f"Copying, GB/s read and written: {copies}. The largest is what shares below are of. "
        yield f"Matrix products, TFLOP/s: bfloat16 {each['gemm_gflop_s'] / 1e3:.0f}"
        yield f", float8 {each['float8_gflop_s'] / 1e3:.0f}." if "float8_gflop_s" in each else "."


def _attention_table(data: Data) -> Iterator[str]:
    rows = []
    for cell in latest(data, "attention"):
        ceiling = data.ceiling(cell)
        share = None if ceiling is None else _by_roofline(cell, ceiling)
        size = f"{cell['batch']} of {cell['context']}"
        rows.append([cell["what"], size, cell["cache"], cell["backend"], f"{1e6 * cell['seconds']:.0f}", _of(share)])
    if rows:
        yield "Decoding beside the memory's speed, prompts beside the matrix product's."
        yield ""
        yield from _table(["", "requests of tokens", "cache", "by", "µs", "of roofline"], rows)


def _by_roofline(cell: Record, ceiling: Record) -> float:
    if cell["what"] == "decode":
        share: float = 1e-9 * cell["bytes"] / ceiling["read_gb_s"] / cell["seconds"]
    else:
        share = 1e-9 * cell["flop"] / ceiling["gemm_gflop_s"] / cell["seconds"]
    return share


def _linear_table(data: Data) -> Iterator[str]:
    if data.of("linear") and data.of("ceiling"):
        yield from linear_table(latest(data, "linear"), data.of("ceiling")[-1:]).splitlines()


def _sampling_table(data: Data) -> Iterator[str]:
    rows = []
    for cell in latest(data, "sampling"):
        ceiling = data.ceiling(cell)
        share = None if ceiling is None else 1e-9 * cell["bytes"] / ceiling["read_gb_s"] / cell["seconds"]
        kernels = ", ".join(f"{name[:40]} {1e6 * seconds:.0f}" for name, seconds in [*cell["kernels"].items()][:3])
        rows.append([cell["wish"], str(cell["rows"]), f"{1e6 * cell['seconds']:.0f}", _of(share), kernels])
    if rows:
        yield "The roofline is one reading of the logits."
        yield ""
        yield from _table(["", "rows", "µs", "of roofline", "longest kernels, µs"], rows)


def _step_table(data: Data) -> Iterator[str]:
    rows = []
    for cell in latest(data, "step"):
        rate = cell["rows"] / cell["seconds"]
        rows.append(
            [cell["form"], str(cell["rows"]), f"{1e3 * cell['seconds']:.2f}", f"{rate:,.0f}", _of(_share(cell))]
        )
    if rows:
        context = latest(data, "step")[0]["context"]
        yield f"Each request has {context} tokens. The roofline is one reading of weights and cache."
        yield ""
        yield from _table(["weights", "requests", "step, ms", "tokens/s", "of roofline"], rows)
    for each in latest(data, "prompts"):
        yield ""
        yield f"Prompts, {each['form']}: {each['tokens'] / each['seconds']:,.0f} tokens/s."
    for each in latest(data, "trace"):
        longest = [f"{name[:60]} {seconds / each['busy']:.1%}" for name, seconds in [*each["kernels"].items()][:12]]
        yield ""
        yield f"{each['form']}, {each['rows']} requests: idle {each['idle']:.1%}; busy with {', '.join(longest)}."


def _correctness_table(data: Data) -> Iterator[str]:
    rows = [
        [each["form"], f"{each['kl_mean']:.1e}", f"{each['kl_p99']:.1e}", f"{each['same_choice']:.1%}"]
        for each in latest(data, "distribution")
    ]
    if rows:
        yield from _table(["", "KL to transformers in float32, mean", "p99", "same first choice"], rows)
    for each in latest(data, "greedy"):
        yield ""
        yield f"{each['form']}: the first {each['same']} of {each['tokens']} greedy tokens are transformers'."
    for each in latest(data, "invariance"):
        yield ""
        yield f"{each['alike']} of {each['asked']} answers are the same to the bit alone and among {each['among']}."


def _server_table(data: Data) -> Iterator[str]:
    starts = [
        [each["form"], *(f"{each[key]:.1f}" for key in ("port_s", "ready_s", "first_token_s"))]
        for each in latest(data, "start")
    ]
    if starts:
        yield from _table(["seconds from command to", "any answer", "readiness", "first token"], starts)
        yield ""
    rows = []
    for each in latest(data, "load"):
        pairs = [f"{each[f'{key}_p50_ms']:.0f} / {each[f'{key}_p99_ms']:.0f}" for key in ("ttft", "itl")]
        size = f"{each['streams']} of {each['prompt']} / {each['new']}"
        rows.append([each["server"], each["form"], size, f"{each['tokens_s']:,.0f}", *pairs])
    if rows:
        titles = ["", "", "streams of tokens in / out", "output tokens/s"]
        yield from _table([*titles, "TTFT p50 / p99, ms", "between tokens p50 / p99, ms"], rows)
    ratios = {"transformers": ("bfloat16", "transformers"), "--deterministic": ("deterministic", "tgi")}
    for title, (form, server) in ratios.items():
        for each in latest(data, "load", form=form, server=server):
            ours = _load("bfloat16", new=each["new"])(data)
            if ours is not None:
                yield ""
                yield f"bfloat16 beside {title}: {ours / each['tokens_s']:.2f} times."


def _tiles_table(data: Data) -> Iterator[str]:
    rows = [
        [each["kernel"], str(each["tile"]), f"{each['before'] / each['after']:.2f}"] for each in data.of("tile")[-40:]
    ]
    if rows:
        yield from _table(["kernel", "tile", "times as fast"], rows)


_PARTS: dict[str, Callable[[Data], Iterator[str]]] = {
    "What the device allows": _ceilings,
    "Attention": _attention_table,
    "Linear layers": _linear_table,
    "Sampling": _sampling_table,
    "The model": _step_table,
    "Correctness": _correctness_table,
    "The server": _server_table,
    "Tiles": _tiles_table,
}
