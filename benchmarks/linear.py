"""Linear layers with every form of weights, beside torch's and beside what the machine allows.

    python benchmarks/linear.py --out FOLDER
    OMP_NUM_THREADS=1 python benchmarks/linear.py --forms bf16 int4/128 --rows 1 --shapes 576x1536 --out FOLDER
    python benchmarks/linear.py --device cuda --shapes 4096x4096 14336x4096 --out FOLDER

Each is first compared with the product by float32 weights. Weights are rotated, so that they come from memory and not
from a cache. Medians; on a GPU those of a captured graph. What the machine allows is a roofline (Williams, Waterman &
Patterson, CACM 2009): a product can't be faster than its weights are read, or than its arithmetic is done (in float32,
on a GPU in bfloat16), at ceilings that are measured first. Integers have faster instructions, and may be beyond. Writes
FOLDER/linear.jsonl, to which each run adds a round, and .md, with the medians of all rounds.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import device as devices
from client import BenchmarkError
from machine import Watch, ceilings
from records import Journal, Record
from tgi.kernels.library import library
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, NativeLinear, PackedLinear, PlainLinear
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.parts import E2M1
from tgi.quantization.quantized import Packed, Quantized

WORKING_SET = 240_000_000
"""Bytes of all weights of one measurement."""
CLOSE = 0.03
"""Of the largest difference to float32 that counts as right, relative to the product."""

TORCH: dict[str, Callable[[torch.Tensor, None], LinearMethod]] = {"F.linear": PlainLinear, "oneDNN": PackedLinear}
QUANTIZED = (
    *("int8/32", "int8", "int4/32", "int4/128", "int4/128+min", "e4m3", "e4m3/128", "codes/16", "codes/32", "codes/64"),
    *("e2m1/16", "e2m1/32"),
)
"""Numbers, columns that share a scale, and perhaps a minimum."""
FORMS = {"cpu": (*TORCH, *(("fp32", "bf16", *QUANTIZED) if library() else ())), "cuda": ("F.linear", *QUANTIZED)}


def random(form: str, out: int, inner: int) -> torch.Tensor | Packed:
    """A matrix."""
    kind, _, columns = form.removesuffix("+min").partition("/")
    scale = torch.rand(out, inner // int(columns or inner)) / inner**0.5
    match kind:
        case "e4m3":
            return Float8(torch.randn(out, inner).to(torch.float8_e4m3fn), scale)
        case "codes" | "e2m1":
            table = E2M1.to(scale.device) if kind == "e2m1" else torch.linspace(-1, 1, 16)
            return Codes(torch.randint(16, (out, inner), dtype=torch.uint8), table, scale)
        case "int8" | "int4":
            bits = int(kind.removeprefix("int"))
            stored = torch.randint(2**bits, (out, inner), dtype=torch.uint8)
            if form.endswith("+min"):
                return Quantized(bits, 0, stored, scale, -scale * 2 ** (bits - 1))
            return Quantized(bits, 2 ** (bits - 1), stored, scale.half())
    return torch.randn(out, inner)


@dataclass(frozen=True, slots=True)
class Given:
    """A checkpoint of one matrix."""

    matrix: torch.Tensor | Packed

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> "Given":
        return self

    def __getitem__(self, rows: slice) -> torch.Tensor | Packed:
        return self.matrix[rows] if isinstance(self.matrix, torch.Tensor) else self.matrix.rows(lambda part: part[rows])


def made(form: str, matrix: torch.Tensor | Packed, device: str) -> tuple[LinearMethod, int]:
    """The layer that a server would have of the matrix, and the bytes of its weights."""
    if device == "cpu" and form in TORCH:
        assert isinstance(matrix, torch.Tensor)
        return TORCH[form](matrix.clone(), None), matrix.nbytes
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    native, stored = library() if device == "cpu" else None, None if isinstance(matrix, torch.Tensor) else "stored"
    checkpoint = Checkpoint(Given(matrix), dtype, torch.device(device), Group(), native, stored)  # type: ignore[arg-type]  # all that is asked of it
    out, inner = matrix.shape
    method = checkpoint.linear([Piece("it", (out, inner), [slice(0, out)], slice(0, inner))], bias=False)
    if isinstance(method, NativeLinear):
        parts = (method.panels.weight, method.panels.scale, method.panels.min, method.panels.table)
        return method, sum(part.nbytes for part in parts if part is not None)
    return method, 2 * out * inner if isinstance(method, PlainLinear) else method.weight.bytes  # type: ignore[attr-defined]  # a CodedLinear


def measure(
    form: str,
    out: int,
    inner: int,
    rows: Sequence[int],
    device: str,
    write: Callable[..., None],
    working_set: int = WORKING_SET,
) -> None:
    """Raises BenchmarkError if it is wrong."""
    with torch.device(device):
        matrix = random(form, out, inner)
    first, size = made(form, matrix, device)
    copies = [first, *(made(form, matrix, device)[0] for _ in range(working_set // size))]
    exact = (matrix if isinstance(matrix, torch.Tensor) else matrix.dequantize()).to(device)
    for count in rows:
        x = torch.randn(count, inner, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        expected = x.float() @ exact.T
        error = float((first(x) - expected).norm() / expected.norm())
        if not error < CLOSE:
            raise BenchmarkError(f"{form}, {out} x {inner}, {count} rows: wrong by {error:.1%}")
        watch = Watch(os.getsid(0))
        each = devices.seconds(partial(all_of, copies, x), x.device) / len(copies)
        cell = {"form": form, "out": out, "inner": inner, "rows": count, "seconds": each, "bytes": size}
        write("linear", **cell, error=error, **watch.foreign())


def all_of(methods: Sequence[LinearMethod], x: torch.Tensor) -> None:
    for method in methods:
        method(x)


def allowed(cell: Record, ceiling: Record) -> float:
    """Seconds that a product takes at least."""
    reading = cell["bytes"] / ceiling["read_gb_s"]
    arithmetic = 2 * cell["rows"] * cell["out"] * cell["inner"] / ceiling["gemm_gflop_s"]
    return 1e-9 * max(reading, arithmetic)


def _where(ceiling: Record) -> str:
    return f"bfloat16 on {ceiling['gpu']}" if "gpu" in ceiling else f"float32, with {ceiling['threads']} threads"


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
        f"Read {ceiling['read_gb_s']:.0f} GB/s, multiply {ceiling['gemm_gflop_s']:.0f} GFLOP/s in "
        f"{_where(allowances[0])}. Microseconds, and the share of what the machine allows: medians of "
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
    parser.add_argument("--device", choices=list(FORMS), default="cpu")
    parser.add_argument("--forms", nargs="+", choices=list(dict.fromkeys((*FORMS["cpu"], *FORMS["cuda"]))))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(3072, 576), (4096, 4096)], metavar="OUTxINNER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    journal = Journal(arguments.out / "linear.jsonl")
    device, threads = arguments.device, torch.get_num_threads()
    if device == "cpu":
        journal.write("ceiling", threads=threads, **ceilings(threads))
    else:
        journal.write("ceiling", gpu=torch.cuda.get_device_name(), **devices.ceilings(torch.device(device)))
    for out, inner in arguments.shapes:
        for form in arguments.forms or FORMS[device]:
            measure(form, out, inner, arguments.rows, device, journal.write)
    told = table(journal.data.of("linear"), journal.data.of("ceiling"))
    (arguments.out / "linear.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
