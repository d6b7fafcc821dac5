"""What each precision loses: next-token distributions and perplexity against float32, on the texts beside this file.

    python benchmarks/quality.py --model FOLDER [--out FOLDER]
    python benchmarks/quality.py --model FOLDER --also Q4_0=FILE.gguf --transformers
    python benchmarks/quality.py --model FOLDER --formats --out benchmarks/results    # for docs/quantization.md
    python benchmarks/quality.py --document > docs/quantization.md

The texts are cut into windows. Each runs through the engine token by token, all windows in one batch: the logits are
those of real decoding steps. The prefill's own perplexity, from prompts' log-probabilities, is told beside it.
``--transformers`` compares our float32 with transformers'. ``--formats`` makes a checkpoint in each format, and serves
it. With ``--out`` the figures go to ``compare.py``'s journal or, of formats, to ``formats.jsonl``.
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import kl_div, log_softmax

from client import quantile
from engine import load
from formats import document
from records import Data, Journal, Record
from report import quality_table
from servers import TGI
from tgi.core.config import BLOCK_SIZE, Settings
from tgi.core.messages import Sampling, Submit
from tgi.core.plan import Work
from tgi.runtime.runner import Runner

TEXT = Path(__file__).with_name("text.txt")
_TEXTS = TEXT, Path(__file__).with_name("opticks.txt")
"""A story of our own, and Isaac Newton's Queries (Opticks, 4th edition, 1730)."""

FORMATS: dict[str, tuple[str, str]] = {
    "bfloat16": ("", "--dtype bfloat16"),
    "int8, groups of 32": ("", "--quantize int8"),
    "int8, a scale for each output, at load": ("", "--quantize bitsandbytes"),
    "int8, a scale for each output": ("--method int8", ""),
    "GPTQ, 8 bits, groups of 64": ("--bits 8 --groupsize 64", ""),
    "float8, a scale for each output, at load": ("", "--quantize fp8"),
    "float8, a scale for each output": ("--method fp8", ""),
    "int4, groups of 32": ("", "--quantize int4"),
    "GPTQ, groups of 64": ("--groupsize 64", ""),
    "GPTQ, groups of 32": ("--groupsize 32", ""),
    "GPTQ, groups of 32, columns in order": ("--groupsize 32 --no-act-order", ""),
    "GPTQ, groups of 32, asymmetric": ("--groupsize 32 --no-sym", ""),
    "AWQ, groups of 64": ("--method awq --groupsize 64", ""),
    "AWQ, groups of 32": ("--method awq --groupsize 32", ""),
    "NF4, blocks of 64": ("", "--quantize bitsandbytes-nf4"),
    "FP4, blocks of 64": ("", "--quantize bitsandbytes-fp4"),
    "keys and values in int8": ("", "--dtype float32 --kv-cache-dtype int8"),
    "keys and values in float8, e4m3": ("", "--dtype float32 --kv-cache-dtype fp8_e4m3fn"),
    "keys and values in float8, e5m2": ("", "--dtype float32 --kv-cache-dtype fp8_e5m2"),
}
"""How `text-generation-server quantize` makes a checkpoint in each, if it does, and the options to serve it."""

_QUANTIZE = [sys.executable, "-c", "import sys; from tgi.cli import server; sys.exit(server())", "quantize"]


def windows(tokenizer: Path, length: int) -> list[list[int]]:
    """The texts' ids in pieces of equal length; shorter rests are left out."""
    encoder = Tokenizer.from_file(str(tokenizer))
    texts = [encoder.encode(path.read_text("utf-8"), add_special_tokens=False).ids for path in _TEXTS]
    return [ids[at : at + length] for ids in texts for at in range(0, len(ids) - length + 1, length)]


class Reader:
    """Reads windows with one runner. Each has pages of its own."""

    def __init__(self, runner: Runner, settings: Settings, texts: Sequence[list[int]]) -> None:
        self._runner = runner
        self._texts = texts
        pages = -(-len(texts[0]) // BLOCK_SIZE)
        self._blocks = [
            [array("i", range(pages * row, pages * (row + 1)))] * len(settings.pools) for row in range(len(texts))
        ]
        self._scratch: list[dict[str, object]] = [{} for _ in texts]

    def step(self, position: int) -> torch.Tensor:
        """Log-probabilities of what follows ``position`` in each window: float64 [windows, vocabulary]."""
        works = [
            Work(
                Submit(row, text, 1, len(text), [], Sampling(top_n_tokens=1), 0.0),  # greedy alone needs no logits
                text[: position + 1],
                position,
                1,
                position + 1,
                True,
                self._blocks[row],
                self._scratch[row],
            )
            for row, text in enumerate(self._texts)
        ]
        launched = self._runner.launch(works)
        assert launched.logits is not None
        rows = torch.empty_like(launched.logits)
        rows[list(launched.drawing)] = launched.logits
        return log_softmax(rows.double(), 1)

    def prefill(self) -> float:
        """Perplexity by whole windows, each a prompt."""
        total, count = 0.0, 0
        for row, text in enumerate(self._texts):
            submit = Submit(row, text, len(text), 0, [], Sampling(), 0.0, prompt_logprobs=True)
            work = Work(submit, text, 0, len(text), 1, False, self._blocks[row], {})
            [result] = self._runner.sample(self._runner.launch([work]))
            total -= sum(token.logprob for token in result.tokens)
            count += len(result.tokens)
        return math.exp(total / count)


@dataclass(slots=True)
class Loss:
    """How one runner's distributions differ from the reference's."""

    divergences: list[float] = field(default_factory=list)
    same: int = 0
    surprise: float = 0.0

    def add(self, mine: torch.Tensor, reference: torch.Tensor, following: torch.Tensor) -> None:
        """Log-probabilities [rows, vocabulary] and the ids that follow."""
        self.divergences += kl_div(mine, reference, reduction="none", log_target=True).sum(1).tolist()
        self.same += int((mine.argmax(1) == reference.argmax(1)).sum())
        self.surprise -= float(mine.gather(1, following[:, None]).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / len(self.divergences))


@torch.inference_mode()
def losses(reference: Reader, readers: Sequence[Reader], texts: Sequence[list[int]]) -> list[Loss]:
    """Of the reference itself first, then of each."""
    ids = torch.tensor(texts)
    found = [Loss() for _ in range(len(readers) + 1)]
    for position in range(ids.shape[1] - 1):
        right = reference.step(position)
        for loss, mine in zip(found, [right, *(reader.step(position) for reader in readers)], strict=True):
            loss.add(mine, right, ids[:, position + 1])
    return found


def figures(loss: Loss, reference: Loss) -> dict[str, float]:
    return {
        "kl_mean": sum(loss.divergences) / len(loss.divergences),
        "kl_p99": quantile(loss.divergences, 0.99),
        "same_choice": loss.same / len(loss.divergences),
        "perplexity": loss.perplexity,
        "perplexity_ratio": loss.perplexity / reference.perplexity,
    }


@torch.inference_mode()
def beside_transformers(reader: Reader, folder: str, texts: Sequence[list[int]]) -> Loss:
    """Our float32 against transformers'."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = torch.stack([model(torch.tensor([text])).logits[0] for text in texts])
    ids, loss = torch.tensor(texts), Loss()
    for position in range(ids.shape[1] - 1):
        loss.add(reader.step(position), log_softmax(theirs[:, position].double(), 1), ids[:, position + 1])
    return loss


def variants(arguments: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """(name, model, the launcher's options): float32 first."""
    precisions = [] if arguments.formats is not None else arguments.precisions
    for precision in dict.fromkeys(["32-bit", *precisions]):
        yield f"{precision}, `{TGI[precision]}`", arguments.model, TGI[precision].split()
    for name in arguments.formats or (() if arguments.formats is None else FORMATS):
        quantize, options = FORMATS[name]
        model = arguments.model
        if quantize:
            model = str(arguments.kept / re.sub(r"\W+", "-", quantize).strip("-"))
            subprocess.run([*_QUANTIZE, arguments.model, model, *quantize.split()], check=True)
        yield f"{name}, `{quantize or options}`", model, options.split()
    for also in arguments.also:
        name, _, line = also.partition("=")
        model, *options = shlex.split(line)
        yield name, model, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--document", action="store_true", help="print docs/quantization.md")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), metavar="NAME", help="these, or all of them")
    parser.add_argument(
        "--kept",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tgi-quality",
        metavar="FOLDER",
        help="where quantized checkpoints are made, and found again",
    )
    parser.add_argument("--precisions", nargs="*", default=["16-bit", "8-bit", "4-bit"], choices=list(TGI))
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=MODEL [OPTION…]", help="further models")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, help="only so many of them")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.document:
        print(document(), end="")
        return
    if arguments.model is None:
        parser.error("--model is missing")
    texts = windows(Path(arguments.model) / "tokenizer.json", arguments.window)[: arguments.windows]
    names, readers = [], []
    for name, model, options in variants(arguments):
        names.append(name)
        readers.append(Reader(*load(model, options, requests=len(texts), context=arguments.window + 1), texts))
    found = losses(readers[0], readers[1:], texts)
    records: list[Record] = [
        {"kind": "quality", "form": name, "prefill_perplexity": reader.prefill(), **figures(loss, found[0])}
        for name, reader, loss in zip(names, readers, found, strict=True)
    ]
    if arguments.transformers:
        loss = beside_transformers(readers[0], arguments.model, texts)
        records.append({"kind": "quality", "form": "32-bit, to transformers", **figures(loss, found[0])})
    if arguments.out:
        journal = Journal(arguments.out / ("data.jsonl" if arguments.formats is None else "formats.jsonl"))
        for record in records:
            journal.write(**record)
    print("\n".join(quality_table(Data(records))))


if __name__ == "__main__":
    main()
