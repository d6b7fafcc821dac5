"""The text that a model reads while it is quantized, and attention over it."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tgi.attention.base import AttentionBackend, AttnSpec, Precision, PreparedAttention, Segment, Turn
from tgi.attention.sdpa import SdpaAttention
from tgi.core.config import BLOCK_SIZE
from tgi.core.errors import StartupError

_MOST = 128
"""Sequences, if the operator names no number."""


def read(dataset: str | None) -> str:
    """The text of a file, or the one that is shipped: Lewis Carroll, Alice's Adventures in Wonderland (1865)."""
    if dataset is None:
        return resources.files("tgi.quantizer").joinpath("calibration.txt").read_text("utf-8")
    try:
        return Path(dataset).read_text("utf-8")
    except OSError as error:
        raise StartupError(f"`--dataset`: {dataset}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise StartupError(f"`--dataset`: {dataset} is not UTF-8: {error}") from None


def sequences(text: str, tokenizer: Path, samples: int | None, length: int, vocab: int) -> torch.Tensor:
    """The text's tokens in pieces of equal length, int64 [samples, length]; None: up to 128 of them.

    StartupError if the text has fewer, or tokens that the model doesn't know.
    """
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing more specific
        raise StartupError(f"{tokenizer} can't be read: {error}") from error
    encoder.no_truncation()
    ids = torch.tensor(encoder.encode(text, add_special_tokens=False).ids)
    count = min(len(ids) // length, samples or _MOST)
    if count < (samples or 1):
        raise StartupError(
            f"the calibration text has {len(ids)} tokens, too few for {samples or 1} sequences of {length} "
            "(`--dataset`, `--samples`, `--sequence-length`)"
        )
    found = ids[: count * length].view(count, length)
    if found.max() >= vocab:
        raise StartupError(f"{tokenizer}: token {found.max()} is beyond the model's vocabulary of {vocab}")
    return found


class Whole:
    """Attention over sequences of equal length, each from its beginning, one behind the other."""

    def __init__(self, specs: Sequence[AttnSpec], samples: int, length: int, device: torch.device) -> None:
        self._specs = specs
        each = -(-length // BLOCK_SIZE)
        segments = [Segment(0, length, range(row * each, (row + 1) * each)) for row in range(samples)]
        precision = Precision(torch.float32, torch.float32)
        self._kinds: dict[AttnSpec, tuple[PreparedAttention, torch.Tensor]] = {}
        for spec in dict.fromkeys(specs):
            backend: AttentionBackend = SdpaAttention(spec, precision, device)
            self._kinds[spec] = backend.prepare(segments), backend.allocate(samples * each)

    def __call__(self, layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        """As in attention.base. What a layer has written isn't asked for again."""
        prepared, pages = self._kinds[self._specs[layer]]
        return prepared.run(pages, qkv, turn)
