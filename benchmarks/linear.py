"""Linear layers with every form of weights, beside torch's and beside what the machine allows.

    python benchmarks/linear.py --out FOLDER
    OMP_NUM_THREADS=1 python benchmarks/linear.py --forms bf16 int4/128 --rows 1 --shapes 576x1536 --out FOLDER

Weights are rotated, so that they come from memory and not from a cache. Medians. What the machine allows is a roofline
(Williams, Waterman & Patterson, CACM 2009): a product can't be faster than its weights are read, or than its arithmetic
is done in float32, at the ceilings that machine.py measures. Integers have faster instructions, and may be beyond.
Writes FOLDER/linear.jsonl, to which each run adds a round, and .md, with the medians of all rounds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from machine import Watch, ceilings
from records import Journal, Record
from tgi.kernels.library import library
from tgi.kernels.panels import Panels, pack, pack_codes, pack_float8, pack_quantized
from tgi.quantization.base import LinearMethod, NativeLinear, PackedLinear, PlainLinear

WORKING_SET = 240_000_000
"""Bytes of all weights of one measurement."""

TORCH: dict[str, Callable[[torch.Tensor, None], LinearMethod]] = {"F.linear": PlainLinear, "oneDNN": PackedLinear}
NATIVE = ("fp32", "bf16", "int8/32", "int4/32", "int4/128", "e4m3", "e4m3/128", "codes/16", "codes/32", "codes/64")
"""Number formats, and columns that share a scale."""


def seconds(work: Callable[[], object], runs: int = 9) -> float:
    work()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def panels(form: str, out: int, inner: int) -> Panels:
    """A random matrix."""
    kind, _, columns = form.partition("/")
    scale = torch.rand(out, inner // int(columns or inner))
    match kind:
        case "fp32":
            return pack(torch.randn(out, inner))
        case "bf16":
            return pack(torch.randn(out, inner).bfloat16())
        case "e4m3":
            return pack_float8(torch.randn(out, inner).mul_(64).to(torch.float8_e4m3fn), scale)
        case "codes":
            return pack_codes(torch.randint(16, (out, inner), dtype=torch.uint8), torch.linspace(-1, 1, 16), scale)
    bits = int(kind.removeprefix("int"))
    stored = torch.randint(2**bits, (out, inner), dtype=torch.uint8)
    return pack_quantized(stored, scale.half(), None, bits=bits, zero=2 ** (bits - 1))


def made(form: str, out: int, inner: int) -> tuple[LinearMethod, int]:
    """A layer, and the bytes of its weights."""
    if form in TORCH:
        return TORCH[form](torch.randn(out, inner), None), 4 * out * inner
    native = library()
    assert native is not None
    whole = panels(form, out, inner)
    size = sum(part.nbytes for part in (whole.weight, whole.scale, whole.table) if part is not None)
    return NativeLinear(native, whole, None), size


def measure(form: str, out: int, inner: int, rows: Sequence[int], write: Callable[..., None]) -> None:
    first, size = made(form, out, inner)
    copies = [first, *(made(form, out, inner)[0] for _ in range(WORKING_SET // size))]
    for count in rows:
        watch = Watch(os.getsid(0))
        each = seconds(partial(all_of, copies, torch.randn(count, inner))) / len(copies)
        cell = {"form": form, "out": out, "inner": inner, "rows": count, "seconds": each, "bytes": size}
        write("linear", **cell, **watch.foreign())


def all_of(methods: Sequence[LinearMethod], x: torch.Tensor) -> None:
    for method in methods:
        method(x)


def allowed(cell: Record, ceiling: Record) -> float:
    """Seconds that a product takes at least."""
    reading = cell["bytes"] / ceiling["read_gb_s"]
    arithmetic = 2 * cell["rows"] * cell["out"] * cell["inner"] / ceiling["gemm_gflop_s"]
    return 1e-9 * max(reading, arithmetic)


def table(cells: Sequence[Record], allowances: Sequence[Record]) -> str:
    """Of each product the median of all rounds."""
    ceiling = {key: statistics.median(each[key] for each in allowances) for key in ("read_gb_s", "gemm_gflop_s")}
    rounds: dict[tuple[object, ...], list[Record]] = {}
    for cell in cells:
        rounds.setdefault(tuple(cell[key] for key in ("form", "out", "inner", "rows")), []).append(cell)
    spread = statistics.median(
        (max(times) - min(times)) / statistics.median(times)
        for times in ([cell["seconds"] for cell in each] for each in rounds.values())
    )
    cells = [each[0] | {"seconds": statistics.median(cell["seconds"] for cell in each)} for each in rounds.values()]
    lines = [
        f"Read {ceiling['read_gb_s']:.0f} GB/s, multiply {ceiling['gemm_gflop_s']:.0f} GFLOP/s in float32, with "
        f"{allowances[0]['threads']} threads. Microseconds, and the share of what the machine allows: medians of "
        f"{len(allowances)} rounds, in which half of the products spread over less than {spread:.0%}.",
        "",
    ]
    rows = sorted({cell["rows"] for cell in cells})
    for out, inner in dict.fromkeys((cell["out"], cell["inner"]) for cell in cells):
        mine = [cell for cell in cells if (cell["out"], cell["inner"]) == (out, inner)]
        found = {(cell["form"], cell["rows"]): cell for cell in mine}
        heads = "".join(f" {count} rows |" for count in rows)
        lines += [f"| {out} x {inner} | bits |{heads}", f"|---|---|{'---|' * len(rows)}"]
        for form, size in {cell["form"]: cell["bytes"] for cell in mine}.items():
            told = [
                f"{1e6 * cell['seconds']:.0f} ({allowed(cell, ceiling) / cell['seconds']:.0%})"
                if (cell := found.get((form, count)))
                else "-"
                for count in rows
            ]
            lines.append(f"| {form} | {8 * size / (out * inner):.3g} | {' | '.join(told)} |")
        lines.append("")
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int]:
    out, inner = map(int, text.split("x"))
    return out, inner


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = [*TORCH, *(NATIVE if library() is not None else ())]
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(3072, 576), (4096, 4096)], metavar="OUTxINNER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    journal = Journal(arguments.out / "linear.jsonl")
    threads = torch.get_num_threads()
    journal.write("ceiling", threads=threads, **ceilings(threads))
    for out, inner in arguments.shapes:
        for form in arguments.forms:
            measure(form, out, inner, arguments.rows, journal.write)
    told = table(journal.data.of("linear"), journal.data.of("ceiling"))
    (arguments.out / "linear.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
