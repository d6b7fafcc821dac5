"""This server beside others: same weights, same prompts, same machine, servers in turns, ceilings in the same run.

    pip install -e '.[bench]'
    python benchmarks/compare.py --peers llama.cpp vllm --model FOLDER --llama-bin DIR --gguf-dir DIR \
        --vllm-python FILE --out FOLDER
    python benchmarks/compare.py --quick --precisions 16-bit --only W1 W2 ...      # a look, nothing to keep
    python benchmarks/compare.py --out FOLDER --report                             # tables and plots anew

Each figure is appended to FOLDER/data.jsonl at once; the same command again measures what is missing. Then
FOLDER/compare.md and .svg are written. benchmarks/README.md says where to get the others and what the workloads are.
"""

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import uvloop

import machine
from client import BenchmarkError, run
from records import OURS, PRECISIONS, Data, Journal, Record
from report import Shape, markdown
from servers import RECIPES, Places, Recipe, Server, start
from workloads import FULL, QUICK, WORKLOADS, Figures, Prompts, Sizes


class Comparison:
    """One run over all rounds."""

    def __init__(self, arguments: argparse.Namespace, places: Places, journal: Journal, shape: Shape) -> None:
        self._arguments = arguments
        self._places = places
        self._journal = journal
        self._shape = shape
        self._sizes: Sizes = QUICK if arguments.quick else FULL
        self._tokenizer = Path(arguments.model) / "tokenizer.json"

    def measure(self, recipes: list[Recipe]) -> None:
        for number in range(self._arguments.rounds):
            turns = [(recipe, missing) for recipe in recipes if (missing := self._missing(number, recipe))]
            if not turns:
                continue
            machine.wait_for_quiet(os.getsid(0), self._arguments.quiet, self._arguments.patience)
            self._journal.write("ceiling", round=number, **machine.ceilings(self._places.threads))
            for recipe, missing in turns:
                try:
                    uvloop.run(self._serve(number, recipe, missing))
                except BenchmarkError as error:
                    self._fail(number, recipe, "start", error)

    def _missing(self, number: int, recipe: Recipe) -> list[str]:
        keys = {"round": number, "server": recipe.server, "precision": recipe.precision}
        done = {cell["workload"] for cell in self._journal.data.of("cell", clean=True, **keys)}
        return [w for w in self._arguments.only if w in recipe.workloads and w not in done]

    async def _serve(self, number: int, recipe: Recipe, workloads: list[str]) -> None:
        """Start it, run its workloads, tell its start and its memory."""
        keys = {"round": number, "server": recipe.server, "precision": recipe.precision}
        log = self._arguments.out / "logs" / f"{number}-{recipe.server}-{recipe.form}.log".replace(" ", "-")
        with start(recipe, self._places, log) as server:
            times = await server.begin(self._prompts(number, "start").text(16), self._arguments.patience + 600)
            if "W1" in recipe.workloads:  # where a server has two recipes, the one of most workloads stands for it
                self._journal.write("start", **keys, **times)
            await self._load(server, number, "warm")
            held = 0.0
            for workload in workloads:
                try:
                    held += await self._cell(server, workload, keys)
                except BenchmarkError as error:
                    self._fail(number, recipe, workload, error)
                if workload == "W3":
                    resident = server.resident
                    tokens = recipe.reserved_tokens or held
                    kv = recipe.reserved_bytes or tokens * self._shape.cached * recipe.kv_bits / 8
                    beyond = resident - self._shape.weights * recipe.bits / 8 - kv
                    self._journal.write("memory", **keys, resident=resident, kv=kv, beyond=beyond)

    async def _cell(self, server: Server, workload: str, keys: Record) -> float:
        """Measure it, again if others disturbed it. Returns how many tokens' keys and values that took."""
        held = 0.0
        for attempt in range(self._arguments.tries):
            machine.wait_for_quiet(server.pid, self._arguments.quiet, self._arguments.patience)
            watch = machine.Watch(server.pid)
            figures = await self._load(server, keys["round"], workload, attempt)
            foreign = watch.foreign()
            clean = sum(foreign.values()) < self._arguments.clean
            self._journal.write("cell", **keys, workload=workload, attempt=attempt, clean=clean, **foreign, **figures)
            held += sum(value for key, value in figures.items() if key.endswith("computed_tokens"))
            if clean:
                break
        return held

    async def _load(self, server: Server, number: int, workload: str, attempt: int = 0) -> Figures:
        prompts = self._prompts(number, workload, attempt)
        try:
            if workload == "warm":
                await run(server.url, [(prompts.text(128), 16) for _ in range(4)], 4)
                return {}
            return await WORKLOADS[workload].run(server.url, prompts, self._sizes)
        except* BenchmarkError as group:
            raise _first(group) from None

    def _prompts(self, *salt: object) -> Prompts:
        """The same for every server."""
        return Prompts(self._tokenizer, f"{self._arguments.seed} {salt}")

    def _fail(self, number: int, recipe: Recipe, workload: str, error: BenchmarkError) -> None:
        self._journal.write(
            "error", round=number, server=recipe.server, precision=recipe.precision, workload=workload, error=str(error)
        )


def _first(group: BaseExceptionGroup[BenchmarkError]) -> BenchmarkError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def about(arguments: argparse.Namespace, places: Places, recipes: list[Recipe]) -> Record:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    versions = f"tgi {version('tgi')} {commit}, torch {version('torch')}"
    servers = {recipe.server.split()[0] for recipe in recipes}
    if "llama.cpp" in servers:
        told = subprocess.run([f"{places.llama_bin}/llama-server", "--version"], capture_output=True, text=True)
        versions += f", llama.cpp {(told.stdout + told.stderr).partition('version: ')[2].splitlines()[0]}"
    if "vllm" in servers:
        ask = "import importlib.metadata as m; print(m.version('vllm'))"
        told = subprocess.run([places.vllm_python, "-c", ask], capture_output=True, text=True)
        versions += f", vLLM {told.stdout.strip()}"
    return {
        "machine": ", ".join(f"{key} {value}" for key, value in machine.description().items()),
        "versions": versions,
        "threads": places.threads,
        "quick": arguments.quick,
        "seed": arguments.seed,
        "commands": list(
            dict.fromkeys(
                f"{' '.join(f'{k}={v}' for k, v in r.environment.items())} {r.command}".strip() for r in recipes
            )
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(recipe.server for recipe in RECIPES if recipe.server != OURS))
    parser.add_argument("--peers", nargs="*", default=[], choices=names, help="servers beside this one")
    parser.add_argument("--without-tgi", action="store_true", help="only the peers")
    parser.add_argument("--precisions", nargs="+", default=["16-bit", "8-bit", "4-bit"], choices=PRECISIONS)
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="W")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny loads: to see that everything works")
    parser.add_argument("--model", help="folder with config.json, tokenizer.json and safetensors")
    launcher = Path(sys.executable).with_name("text-generation-launcher")
    parser.add_argument("--tgi", default=str(launcher), metavar="FILE")
    parser.add_argument("--llama-bin", default="", metavar="DIR", help="holds llama-server")
    parser.add_argument("--gguf-dir", default="", metavar="DIR", help="holds model-F16.gguf, model-Q8_0.gguf, …")
    parser.add_argument("--vllm-python", default="", metavar="FILE")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama.cpp's; others take all cores")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--quiet", type=float, default=0.08, help="cores that others may use when a measurement begins")
    parser.add_argument("--clean", type=float, default=0.1, help="cores that others may use during one")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet")
    parser.add_argument("--tries", type=int, default=2, help="how often a disturbed measurement is made")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE", help="more data.jsonl for the report"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("--model is needed")
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.out / "data.jsonl")
    shape = Shape.read(Path(arguments.model))
    if not arguments.report:
        places = Places(
            model=str(Path(arguments.model).resolve()),
            tgi=arguments.tgi,
            llama_bin=arguments.llama_bin,
            gguf=arguments.gguf_dir,
            vllm_python=arguments.vllm_python,
            threads=arguments.threads,
        )
        servers = ([] if arguments.without_tgi else [OURS]) + arguments.peers
        # Rivals run one after the other: the machine drifts.
        recipes = [
            recipe
            for precision in arguments.precisions
            for server in servers
            for recipe in RECIPES
            if (recipe.server, recipe.precision) == (server, precision)
        ]
        if any(record["quick"] != arguments.quick for record in journal.data.of("run")):
            parser.error(f"{arguments.out} holds figures of other sizes: --quick and full loads don't mix")
        for recipe in recipes:
            places.fill(recipe.command, 0)
        journal.write("run", **about(arguments, places, recipes))
        Comparison(arguments, places, journal, shape).measure(recipes)
    data = Data.read([arguments.out / "data.jsonl", *arguments.merge])
    told = markdown(data, shape)
    (arguments.out / "compare.md").write_text(told)
    print(told)
    if data.servers:
        from plots import bars

        bars(data, arguments.out / "compare.svg")


if __name__ == "__main__":
    main()
