"""What serving costs apart from the model: many streams of a model so small that it costs next to nothing.

    python benchmarks/overhead.py --tokenizer FOLDER [--peers vllm --vllm-python FILE] [--rounds 3] [--out FOLDER]

Makes a random Llama of two layers, 64 wide, with the vocabulary of the tokenizer in FOLDER. Prints tokens per second in
all, and microseconds per token: of the engine's step by stage, from /metrics, and of processor time by process. Client
and server share the cores.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import uvloop
from safetensors.numpy import save_file

from client import run, summary
from machine import processes
from records import OURS, Journal, Record
from servers import RECIPES, Places, Server, start
from workloads import Prompts

STAGES = {
    "schedule": "planning",
    "forward": "tgi_batch_forward_duration",
    "sample": "tgi_batch_decode_duration",
    "commit, send": "tgi_batch_filter_duration",
}
"""Stage of the engine's step → where /metrics has it; planning is what the step's own duration has besides."""
_STEP = "tgi_batch_inference_duration"

OPTIONS = {
    OURS: "--max-concurrent-requests 1024 --max-batch-size 256 --max-total-tokens 512",
    "vllm": "--max-num-seqs 256 --enforce-eager",
}


def write_model(folder: Path, tokenizer: Path) -> None:
    """A Llama with random weights and the files of a real tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    hidden, intermediate, layers, vocab = 64, 128, 2, 49152
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    chance = numpy.random.default_rng(0)

    def normal(*shape: int) -> "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]":
        return chance.normal(0, 0.1, shape).astype(numpy.float32)

    ones = numpy.ones(hidden, numpy.float32)
    tensors = {"model.embed_tokens.weight": normal(vocab, hidden), "model.norm.weight": ones}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.input_layernorm.weight": ones, f"{name}.post_attention_layernorm.weight": ones}
        for part, rows, columns in (
            ("self_attn.q_proj", 64, hidden),
            ("self_attn.k_proj", 32, hidden),
            ("self_attn.v_proj", 32, hidden),
            ("self_attn.o_proj", hidden, 64),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            tensors[f"{name}.{part}.weight"] = normal(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def durations(metrics: str) -> dict[str, float]:
    """Seconds in each stage of the steps so far, from Prometheus' text."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+)_sum(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    stages = {stage: found[name] for stage, name in STAGES.items() if name != "planning"}
    return {"schedule": found[_STEP] - sum(stages.values())} | stages


def cpu(server: Server) -> dict[str, float]:
    """Seconds of processor time by process; the client's with them."""
    found = {"client": os.times().user + os.times().system}
    for process in processes(server.pid):
        name = role(process.command)
        found[name] = found.get(name, 0.0) + process.cpu
    return found


def role(command: list[str]) -> str:
    """What a process is for, by its command line: the module that it runs, or its program."""
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    return Path(command[0]).name if command else "ended"


async def measure(server: Server, arguments: argparse.Namespace, name: str, number: int) -> Record:
    prompts = Prompts(Path(arguments.tokenizer) / "tokenizer.json", f"{number}")
    await server.begin(prompts.text(16))
    await run(server.url, [(prompts.text(16), 8) for _ in range(arguments.streams)], arguments.streams)
    requests = [(prompts.text(16), arguments.new) for _ in range(arguments.requests)]
    ours = name == OURS
    stages, times = durations(server.get("/metrics").decode()) if ours else {}, cpu(server)
    figures = summary(await run(server.url, requests, arguments.streams))
    later, after = durations(server.get("/metrics").decode()) if ours else {}, cpu(server)
    per_token = 1e6 / figures["tokens"]
    return {
        "server": name,
        "round": number,
        "figures": figures,
        "stages_us": {stage: (later[stage] - seconds) * per_token for stage, seconds in stages.items()},
        "cpu_us": {process: (after[process] - times.get(process, 0.0)) * per_token for process in after},
    }


def table(records: list[Record]) -> str:
    """Medians over the rounds."""
    lines = ["| server | tokens/s | TTFT p50, ms | between tokens p50 / p99, ms |", "|---|---|---|---|"]
    names = list(dict.fromkeys(record["server"] for record in records))
    for name in names:
        mine = [record["figures"] for record in records if record["server"] == name]
        rate, first, p50, p99 = (
            statistics.median(figures[key] for figures in mine)
            for key in ("tokens_s", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")
        )
        lines.append(f"| {name} | {rate:,.0f} | {first:.0f} | {p50:.1f} / {p99:.1f} |")
    lines += ["", "Microseconds per token:", "", "| server | what | µs |", "|---|---|---|"]
    for name in names:
        for kind, told in (("stages_us", "step"), ("cpu_us", "processor")):
            rows = [record[kind] for record in records if record["server"] == name]
            for part in dict.fromkeys(part for row in rows for part in row):
                value = statistics.median(row.get(part, 0.0) for row in rows)
                if value >= 0.05:
                    lines.append(f"| {name} | {told}: {part} | {value:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="with the tokenizer of 49,152 tokens")
    parser.add_argument("--peers", nargs="*", default=[], choices=["vllm"])
    parser.add_argument("--vllm-python", default="", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, Path(arguments.tokenizer))
        launcher = str(Path(sys.executable).with_name("text-generation-launcher"))
        places = Places(model=name, tgi=launcher, vllm_python=arguments.vllm_python, threads=os.cpu_count() or 1)
        for number in range(arguments.rounds):
            for server_name in [OURS, *arguments.peers]:
                plain = next(r for r in RECIPES if r.server == server_name and r.form == "float32")
                recipe = replace(plain, command=f"{plain.command} {OPTIONS[server_name]}")
                with start(recipe, places, folder / "log") as server:
                    records.append(uvloop.run(measure(server, arguments, server_name, number)))
                if arguments.out:
                    Journal(arguments.out / "overhead.jsonl").write("overhead", **records[-1])
    told = table(records)
    if arguments.out:
        (arguments.out / "overhead.md").write_text(told + "\n")
    print(told)


if __name__ == "__main__":
    main()
