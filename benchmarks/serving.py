"""Load on OpenAI-compatible servers: time to first token, time between tokens, tokens per second.

    python benchmarks/serving.py tgi=http://127.0.0.1:3000 vllm=http://127.0.0.1:8000 --rounds 3 --out results.json

Servers take turns, round by round, each with prompts it has never seen. Figures are medians over the rounds with their
spread, and ratios to the first server. Prompts are text; their length is calibrated by the servers' own token counts.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

WORDS = """apple river stone cloud paper window garden letter summer winter music table market bridge engine forest
silver copper island harbor lantern mirror ladder button candle carpet basket bottle kitchen village mountain""".split()

CEILING = """
import json, time, torch
def best(f, n=7):
    times = []
    for _ in range(n):
        t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return min(times)
a = torch.ones(100_000_000); x = torch.randn(2048, 2048); w = torch.ops.mkldnn._reorder_linear_weight(x, None)
linear = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
print(json.dumps({"read_gb_s": 0.4 / best(a.sum), "gemm_gflop_s": 2 * 2.048**3 / best(linear)}))
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed request, times in seconds."""

    begin: float
    stamps: list[float]
    """Arrival of each chunk of text."""
    end: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str
    model: str


async def complete(client: httpx.AsyncClient, server: Server, prompt: str, new: int) -> Answer:
    """Stream one completion of exactly ``new`` tokens; raises RuntimeError on any error or shortfall."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    begin = time.perf_counter()
    stamps: list[float] = []
    tokens = 0
    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{server.name}: {response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(f"{server.name}: {event['error']}")
            if any(choice["text"] for choice in event["choices"]):
                stamps.append(time.perf_counter())
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    end = time.perf_counter()
    if tokens != new or not stamps:
        raise RuntimeError(f"{server.name}: {tokens} tokens instead of {new}")
    return Answer(begin, stamps, end, tokens)


def text(words: int, chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


async def words_for(client: httpx.AsyncClient, server: Server, tokens: int) -> int:
    """How many words of ``text`` make about ``tokens`` tokens for this server."""
    probe = {"model": server.model, "prompt": text(200, random.Random(0)), "max_tokens": 1}
    usage = (await client.post(f"{server.url}/v1/completions", json=probe)).raise_for_status().json()["usage"]
    return round(tokens * 200 / int(usage["prompt_tokens"]))


async def load(
    client: httpx.AsyncClient, server: Server, words: int, new: int, concurrency: int, requests: int
) -> dict[str, float]:
    """``requests`` completions, ``concurrency`` at a time."""
    chance = random.Random()
    prompts = iter([text(words, chance) for _ in range(requests)])
    answers: list[Answer] = []

    async def worker() -> None:
        for prompt in prompts:
            answers.append(await complete(client, server, prompt, new))

    await asyncio.gather(*[worker() for _ in range(concurrency)])
    wall = max(a.end for a in answers) - min(a.begin for a in answers)
    first = [a.stamps[0] - a.begin for a in answers]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer.stamps)]
    return {
        "tokens_s": sum(a.tokens for a in answers) / wall,
        "ttft_p50_ms": 1e3 * statistics.median(first),
        "ttft_p99_ms": 1e3 * quantile(first, 0.99),
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * quantile(gaps, 0.99),
    }


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=arguments.timeout, limits=limits) as client:
        servers = []
        for target in arguments.servers:
            name, _, url = target.partition("=")
            models = (await client.get(f"{url}/v1/models")).raise_for_status().json()
            servers.append(Server(name, url, models["data"][0]["id"]))
        words = {server.name: await words_for(client, server, arguments.prompt) for server in servers}
        runs: list[dict[str, object]] = []
        for round_number in range(-1, arguments.rounds):  # round -1 warms up
            for concurrency in arguments.concurrency:
                for server in servers:
                    await asyncio.sleep(arguments.settle)  # threads of the server before may spin on for a while
                    requests = concurrency * arguments.waves if round_number >= 0 else concurrency
                    figures = await load(client, server, words[server.name], arguments.new, concurrency, requests)
                    if round_number >= 0:
                        run = {"server": server.name, "round": round_number, "concurrency": concurrency, **figures}
                        print(json.dumps(run), file=sys.stderr, flush=True)
                        runs.append(run)
    return {
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "runs": runs,
    }


def cpu_name() -> str:
    """Model and vector extensions, as far as the kernel tells."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags", "").split()
    return f"{fields.get('model name', platform.machine())} ({', '.join(f for f in ('avx2', 'avx512f') if f in flags)})"


def table(results: dict[str, object]) -> str:
    """Markdown: medians over the rounds (lowest to highest), and each server's ratio to the first."""
    runs = results["runs"]
    assert isinstance(runs, list)
    names = list(dict.fromkeys(run["server"] for run in runs))
    lines = [
        "| streams | server | tokens/s | ratio | TTFT p50 / p99 ms | between tokens p50 / p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for concurrency in dict.fromkeys(run["concurrency"] for run in runs):
        base = None
        for name in names:
            mine = [run for run in runs if run["server"] == name and run["concurrency"] == concurrency]
            middle = {key: statistics.median(run[key] for run in mine) for key in mine[0] if key != "server"}
            rates = [run["tokens_s"] for run in mine]
            base = base or middle["tokens_s"]
            lines.append(
                f"| {concurrency} | {name} | {middle['tokens_s']:.1f} ({min(rates):.1f} to {max(rates):.1f}) "
                f"| {middle['tokens_s'] / base:.2f} | {middle['ttft_p50_ms']:.0f} / {middle['ttft_p99_ms']:.0f} "
                f"| {middle['itl_p50_ms']:.1f} / {middle['itl_p99_ms']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests per stream and round")
    parser.add_argument("--settle", type=float, default=3, help="seconds of quiet before each measurement")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one request")
    parser.add_argument(
        "--weights",
        type=float,
        metavar="BYTES",
        help="bytes that one step reads: measure the memory's"
        " speed first (needs torch) and tell each server's share of it at one stream",
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    ceiling = None
    if arguments.weights:
        ceiling = json.loads(subprocess.run([sys.executable, "-c", CEILING], check=True, capture_output=True).stdout)
    results = asyncio.run(measure(arguments)) | {"ceiling": ceiling}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if ceiling:
        limit = ceiling["read_gb_s"] * 1e9 / arguments.weights
        print(
            f"\nMemory reads {ceiling['read_gb_s']:.1f} GB/s: at one stream at most {limit:.1f} tokens/s are possible. "
            f"Packed fp32 GEMM: {ceiling['gemm_gflop_s']:.0f} GFLOP/s."
        )


if __name__ == "__main__":
    main()
