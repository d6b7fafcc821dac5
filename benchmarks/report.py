"""Records of runs → tables in Markdown. Knows what is to be reached; measures nothing."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from records import OURS, PRECISIONS, Data, Record

_LLAMA = "llama.cpp"
BITS = {"32-bit": 32, "16-bit": 16, "8-bit": 8.5, "4-bit": 4.5}
"""Of a weight, with its share of a scale: what a step at one stream must read at least."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder computes and reads for a token."""

    block_weights: int
    """Of all layers' matrices."""
    head_weights: int
    """Of the projection to the vocabulary, which is also the embedding if these are tied."""
    attention: int
    """Floating-point operations of a token per token of its context."""
    cached: int
    """Numbers in the KV cache per token."""

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        config = json.loads((folder / "config.json").read_text())
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        size = config.get("head_dim") or hidden // heads
        layer = hidden * (2 * heads + 2 * kv_heads) * size + 3 * hidden * config["intermediate_size"]
        return cls(
            layers * layer, hidden * config["vocab_size"], 4 * layers * heads * size, 2 * layers * kv_heads * size
        )

    @property
    def weights(self) -> int:
        return self.block_weights + self.head_weights

    def flop(self, requests: float, prompt: float, new: float) -> float:
        """Of ``requests`` with so many prompt tokens (not cached) and new tokens in all, each prompt as long as others.
        The attention of new tokens is left out."""
        return (
            2 * self.block_weights * prompt + self.attention * prompt * (prompt / requests) / 2 + 2 * self.weights * new
        )


@dataclass(frozen=True, slots=True)
class Target:
    ratio: float
    """To the best of the peers in ``against``, of the same precision."""
    share: float | None = None
    """Of the ceiling."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one figure of a workload."""

    title: str
    workload: str
    figure: str
    unit: str
    lower: bool = False
    """Whether less is better."""
    targets: Mapping[str, Target] | None = None
    """By precision."""
    against: str = ""
    """The peer that counts; "" for the best."""
    ceiling: Callable[[Shape, Record, str, Record], float] | None = None
    """(shape, ceilings of the round, precision, cell) → the figure's bound."""


def _bandwidth(shape: Shape, ceiling: Record, precision: str, _cell: Record) -> float:
    bound: float = ceiling["read_gb_s"] * 1e9 / (shape.weights * BITS[precision] / 8)
    return bound


def _gemm(shape: Shape, ceiling: Record, _precision: str, cell: Record) -> float:
    flop = shape.flop(cell["requests"], cell["prompt_tokens"] - cell["cached_tokens"], cell["tokens"])
    bound: float = cell["tokens"] / (flop / (ceiling["gemm_gflop_s"] * 1e9))
    return bound


def _gemm_prefill(shape: Shape, ceiling: Record, _precision: str, cell: Record) -> float:
    fresh = cell["prompt_tokens"] - cell["cached_tokens"]
    bound: float = fresh / (shape.flop(1, fresh, 0) / (ceiling["gemm_gflop_s"] * 1e9))
    return bound


def _three(*ratios: float, share: float | None = None) -> dict[str, Target]:
    """For 16, 8 and 4 bits; the share is asked of 16 bits."""
    found = {precision: Target(ratio) for precision, ratio in zip(PRECISIONS[1:], ratios, strict=False)}
    return found | {"16-bit": Target(ratios[0], share)}


ROWS = [
    Row(
        "1 stream, decode",
        "W1",
        "decode_tokens_s",
        "tok/s",
        False,
        _three(1.5, 1.5, 1.3, share=0.8),
        "llama.cpp",
        _bandwidth,
    ),
    Row("8 streams", "W2", "tokens_s", "tok/s", False, _three(1.5, 1.8, 1.6), "", _gemm),
    Row("32 streams", "W3", "tokens_s", "tok/s", False, _three(1.5, 2.0, 1.7, share=0.75), "", _gemm),
    Row("prefill of 4,000 tokens", "W6", "prefill_tokens_s", "tok/s", False, _three(1.35, 1.7, 1.5), "", _gemm_prefill),
    Row("small, first run", "W4", "first_wall_s", "s", True, _three(0.7, 0.5, 0.6)),
    Row("small, second run", "W4", "second_wall_s", "s", True, _three(0.65, 0.5, 0.6)),
    Row("long, first run", "W5", "first_wall_s", "s", True, _three(0.75, 0.6)),
    Row("long, second run", "W5", "second_wall_s", "s", True, _three(0.4, 0.4)),
]

PER_TOKEN = ("W1", "W2", "W3", "W7")


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    middle = _number(statistics.median(values))
    return middle if len(values) < 2 else f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratios(mine: Sequence[float], theirs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of the medians."""
    own = statistics.median(mine)
    return {server: own / statistics.median(values) for server, values in theirs.items()}


def verdict(row: Row, target: Target, against: Mapping[str, float], share: float | None) -> str:
    """``against``: our ratio to each peer. "-" where what counts wasn't measured."""
    counted = [ratio for server, ratio in against.items() if row.against in ("", server.split()[0])]
    if not counted:
        return "-"
    ratio = max(counted) if row.lower else min(counted)
    reached = ratio <= target.ratio if row.lower else ratio >= target.ratio
    if target.share is not None:
        reached = reached and share is not None and share >= target.share
    return "PASS" if reached else "short"


def main_table(data: Data, shape: Shape) -> Iterator[str]:
    yield from _head(["", "weights", *data.servers, *(f"to {peer}" for peer in data.peers), "of ceiling", "target", ""])
    for row in ROWS:
        for precision in data.precisions:
            yield from _line(data, shape, row, precision)


def _line(data: Data, shape: Shape, row: Row, precision: str) -> Iterator[str]:
    cells = {server: data.cells(server, precision, row.workload) for server in data.servers}
    values = {server: [cell[row.figure] for cell in found] for server, found in cells.items() if found}
    if not values:
        return
    texts = [
        f"{spread(values[server])}{'' if all(cell['clean'] for cell in cells[server]) else ' *'}"
        if server in values
        else "-"
        for server in data.servers
    ]
    share, against = None, {}
    if mine := values.pop(OURS, None):
        against = ratios(mine, values)
        if row.ceiling is not None:
            shares = [
                cell[row.figure] / row.ceiling(shape, ceiling, precision, cell)
                for cell in cells[OURS]
                if (ceiling := data.ceiling(cell)) is not None
            ]
            share = statistics.median(shares) if shares else None
    target = (row.targets or {}).get(precision)
    yield _cells(
        [
            f"{row.title}, {row.unit}",
            precision,
            *texts,
            *(f"{against[peer]:.2f}" if peer in against else "-" for peer in data.peers),
            "-" if share is None else f"{share:.0%}",
            _told(row, target),
            verdict(row, target, against, share) if target and mine else "-",
        ]
    )


def _told(row: Row, target: Target | None) -> str:
    if target is None:
        return "-"
    return f"{'≤' if row.lower else '≥'} {target.ratio:g}x" + (f", ≥ {target.share:.0%}" if target.share else "")


def side_table(data: Data) -> Iterator[str]:
    """Start, memory and evenness, which have targets of their own."""
    titles = [
        "to any answer, s",
        "to readiness, s",
        "to the first token, s",
        "p99 / p50 between tokens",
        "memory after 32 streams, MB",
        "that less weights and KV",
    ]
    yield from _head(["server", "weights", *titles])
    for server in data.servers:
        for precision in data.precisions:
            keys = {"server": server, "precision": precision}
            columns = [data.values("start", figure, **keys) for figure in ("port_s", "ready_s", "first_token_s")]
            columns.append([cell["itl_p99_by_p50"] for cell in data.cells(server, precision, "W7")])
            columns += [
                [value / 1e6 for value in data.values("memory", figure, **keys)] for figure in ("resident", "beyond")
            ]
            if any(columns):
                yield _cells([server, precision, *(spread(values) if values else "-" for values in columns)])
    yield ""
    yield from _side_verdicts(data)


def _side_verdicts(data: Data) -> Iterator[str]:
    for precision in data.precisions:
        keys = {"server": OURS, "precision": precision}
        told = []
        if even := [cell["itl_p99_by_p50"] for cell in data.cells(OURS, precision, "W7")]:
            told.append(_judged("p99 ≤ 2x median", statistics.median(even), 2))
        if first := data.values("start", "first_token_s", **keys):
            for peer, bound in (("vllm", 0.1), ("llama.cpp", 1.5)):
                if theirs := data.values("start", "first_token_s", server=peer, precision=precision):
                    ratio = statistics.median(first) / statistics.median(theirs)
                    told.append(_judged(f"first token ≤ {bound:g}x {peer}'s", ratio, bound))
            told.append(_judged("ready ≤ 3 s", statistics.median(data.values("start", "ready_s", **keys)), 3))
            told.append(_judged("port ≤ 0.5 s", statistics.median(data.values("start", "port_s", **keys)), 0.5))
        if beyond := data.values("memory", "beyond", **keys):
            told.append(_judged("memory beyond ≤ 450 MB", max(beyond) / 1e6, 450))
        if told:
            yield f"* {precision}: {'; '.join(told)}"


def _judged(what: str, value: float, bound: float) -> str:
    return f"{what}: {_number(value)} {'PASS' if value <= bound else 'short'}"


def latency_table(data: Data) -> Iterator[str]:
    yield from _head(["", "weights", "server", "TTFT p50 / p99, ms", "between tokens p50 / p99, ms"])
    for workload in PER_TOKEN:
        for precision in data.precisions:
            for server in data.servers:
                if cells := data.cells(server, precision, workload):
                    pairs = [
                        " / ".join(
                            _number(statistics.median(cell[f"{name}_{p}_ms"] for cell in cells)) for p in ("p50", "p99")
                        )
                        for name in ("ttft", "itl")
                    ]
                    yield _cells([workload, precision, server, *pairs])


def quality_table(data: Data) -> Iterator[str]:
    yield from _head(["weights", "KL to fp32, mean", "p99", "same first choice", "perplexity", "to fp32", "of prefill"])
    for record in {record["form"]: record for record in data.of("quality")}.values():  # the last of each
        yield _cells(
            [
                record["form"],
                f"{record['kl_mean']:.2e}",
                f"{record['kl_p99']:.2e}",
                f"{record['same_choice']:.1%}",
                f"{record['perplexity']:.3f}",
                f"{record['perplexity_ratio']:.4f}",
                f"{record['prefill_perplexity']:.3f}" if "prefill_perplexity" in record else "-",
            ]
        )


def _head(titles: Sequence[str]) -> Iterator[str]:
    yield _cells(titles)
    yield "|" + "---|" * len(titles)


def _cells(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def markdown(data: Data, shape: Shape) -> str:
    """The whole report."""
    lines: list[str] = []
    for run in data.of("run"):
        lines += [f"* {key}: {value}" for key, value in run.items() if key not in ("kind", "commands")]
        lines += [f"* `{command}`" for command in run["commands"]] + [""]
    if found := data.of("ceiling"):
        read, gemm = ([record[key] for record in found] for key in ("read_gb_s", "gemm_gflop_s"))
        lines += [f"Memory reads {spread(read)} GB/s, fp32 GEMM {spread(gemm)} GFLOP/s.", ""]
    if data.servers:
        lines += [
            "Medians of the rounds (lowest to highest).",
            "",
            *main_table(data, shape),
            "",
            "\\* measured while others used the machine. The ceiling of one stream is the memory's speed, of the other "
            "rows that of fp32 arithmetic, which int8 arithmetic may pass.",
            "",
            *side_table(data),
            "",
            *latency_table(data),
            "",
        ]
    if data.of("quality"):
        lines += [*quality_table(data), ""]
    if errors := data.failures():
        lines += [
            "Errors:",
            "",
            *(f"* {e['server']}, {e['precision']}, {e['workload']}: {e['error']}" for e in errors),
            "",
        ]
    return "\n".join(lines)
