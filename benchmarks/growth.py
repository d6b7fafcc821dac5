"""How cost grows: a step's time with rows and with context, time to first token with load, the router's with tokens.

    python benchmarks/growth.py --model FOLDER --precisions 16-bit 8-bit --out FOLDER
    python benchmarks/growth.py --model FOLDER --only rows context ...

Steps are measured in the engine alone, load on a server. Writes FOLDER/growth.jsonl, .md and .svg.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import uvloop

from client import arrive, run, summary
from engine import Step, load, middle
from engine import run as run_engine
from machine import processes
from overhead import role
from records import OURS, Journal, Record
from servers import RECIPES, TGI, Places, Server, start
from workloads import Prompts

ROUTER = "tgi.router.app"


@dataclass(frozen=True, slots=True)
class Curve:
    """One panel: how a figure grows with another, a line for each precision."""

    title: str
    x: str
    x_label: str
    y: str
    y_label: str


CURVES = {
    "rows": Curve("Step and rows", "rows", "requests that decode", "step_ms", "step, ms"),
    "context": Curve("Step and context", "context", "tokens of context, one request", "step_ms", "step, ms"),
    "load": Curve("Time to first token and load", "arrivals_s", "requests per second", "ttft_p50_ms", "p50, ms"),
    "router": Curve("Router and tokens", "tokens_s", "tokens per second", "router_cores", "router, cores"),
}


def engine_curves(arguments: argparse.Namespace, precision: str, write: Callable[..., None]) -> None:
    """Steps of growing batches of short requests, and of one request that grows."""
    options = TGI[precision].split()
    if "rows" in arguments.only:
        runner, settings = load(arguments.model, options, requests=max(arguments.rows), context=128)
        for rows in arguments.rows:
            _, steps = run_engine(
                runner, settings, rows, 16, 16 + rows // 8
            )  # the first still decode as the last begin
            write("rows", precision=precision, rows=rows, **told(middle(steps)))
        del runner
    if "context" in arguments.only:
        runner, settings = load(arguments.model, options, requests=1, context=max(arguments.contexts))
        for context in arguments.contexts:
            _, steps = run_engine(runner, settings, 1, context - 16, 16)
            write("context", precision=precision, context=context, **told(middle(steps)))


def told(step: Step) -> dict[str, float]:
    parts = {"step": step.whole} | step.stages | step.kernels
    return {f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()}


async def server_curves(
    arguments: argparse.Namespace, precision: str, server: Server, write: Callable[..., None]
) -> None:
    """Requests of 128 tokens in and 32 out, at random times; then closed loops of growing width."""
    prompts = Prompts(Path(arguments.model) / "tokenizer.json", "growth")
    await server.begin(prompts.text(16))
    if "load" in arguments.only:
        for rate in arguments.rates:
            count = max(10, round(rate * arguments.seconds))
            gaps = [random.Random(f"{rate} {number}").expovariate(rate) for number in range(count)]
            requests = [(prompts.text(128), 32) for _ in range(count)]
            write(
                "load",
                precision=precision,
                arrivals_s=rate,
                **summary(await arrive(server.url, requests, list(accumulate(gaps)))),
            )
    if "router" in arguments.only:
        for streams in arguments.streams:
            requests = [(prompts.text(32), 64) for _ in range(2 * streams)]
            before = router_cpu(server)
            figures = summary(await run(server.url, requests, streams))
            cores = (router_cpu(server) - before) / figures["wall_s"]
            per_thousand = 1e3 * cores / figures["tokens_s"]
            write("router", precision=precision, router_cores=cores, router_cores_per_1000=per_thousand, **figures)


def router_cpu(server: Server) -> float:
    return sum(process.cpu for process in processes(server.pid) if role(process.command) == ROUTER)


def table(records: Sequence[Record]) -> str:
    lines = []
    for kind, curve in CURVES.items():
        if mine := [record for record in records if record["kind"] == kind]:
            lines += [f"| weights | {curve.x_label} | {curve.y_label} |", "|---|---|---|"]
            lines += [f"| {r['precision']} | {r[curve.x]:g} | {r[curve.y]:.4g} |" for r in mine] + [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--precisions", nargs="+", default=["16-bit"], choices=list(TGI))
    parser.add_argument("--only", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4, 6, 8, 10], help="requests per second")
    parser.add_argument("--seconds", type=float, default=15, help="of each rate")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64, 128])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.out / "growth.jsonl")
    launcher = str(Path(sys.executable).with_name("text-generation-launcher"))
    places = Places(model=str(Path(arguments.model).resolve()), tgi=launcher, threads=os.cpu_count() or 1)
    for precision in arguments.precisions:
        engine_curves(arguments, precision, journal.write)
        if {"load", "router"} & set(arguments.only):
            recipe = next(r for r in RECIPES if (r.server, r.precision) == (OURS, precision))
            with start(recipe, places, arguments.out / "growth.log") as server:
                uvloop.run(server_curves(arguments, precision, server, journal.write))
    records = [record for kind in CURVES for record in journal.data.of(kind)]
    (arguments.out / "growth.md").write_text(table(records))
    print(table(records))
    from plots import curves, grouped

    panels = [
        (curve.title, curve.x_label, curve.y_label, lines)
        for kind, curve in CURVES.items()
        if (lines := grouped(journal.data.of(kind), "precision", curve.x, curve.y))
    ]
    curves(arguments.out / "growth.svg", panels)


if __name__ == "__main__":
    main()
