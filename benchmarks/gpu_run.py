"""What the parts of gpu.py share: sizes, where results go, what becomes of errors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from records import Journal

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
"""The config of Llama-3.1-8B, but for its special tokens."""

_SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rope_scaling": None,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is."""

    model: dict[str, Any]
    checked: dict[str, Any]
    """The model that is compared with transformers, where no real one is at hand."""
    copies: tuple[int, ...]
    """Bytes."""
    gemm: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    working_set: int
    """Bytes, more than any cache holds."""
    matrices: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    """Of linear layers, …"""
    drawn: tuple[int, ...]
    """… and of what is sampled."""
    decoding: tuple[int, ...]
    """Requests that decode side by side, …"""
    context: int
    """… and the length of each."""
    new: int
    checks: tuple[int, int]
    """Windows of the benchmarks' texts, and tokens of each."""
    rest: float
    """Seconds after a server's first requests."""
    load: tuple[int, int, int]
    """Streams, and tokens in and out of each, at saturation; …"""
    compared: tuple[int, int, int]
    """… and where one way is to be seen beside another."""


FULL = Sizes(
    model=LLAMA,
    checked={key: value for key, value in (LLAMA | _SMOL).items() if value is not None},
    copies=(1 << 24, 1 << 26, 1 << 28, 1 << 30),
    gemm=8192,
    batches=(1, 8, 32, 64),
    contexts=(1 << 10, 1 << 13, 1 << 15),
    prompts=(1 << 10, 1 << 12, 1 << 13),
    working_set=240_000_000,
    matrices=((6144, 4096), (28672, 4096), (4096, 14336)),
    rows=(1, 8, 16, 32, 64, 256),
    drawn=(1, 64, 256),
    decoding=(1, 8, 32, 64, 128, 256),
    context=1000,
    new=48,
    checks=(8, 64),
    rest=4.0,
    load=(256, 1000, 1000),
    compared=(64, 1000, 150),
)
SMALL = Sizes(
    model={key: value for key, value in (LLAMA | _TINY).items() if value is not None},
    checked={key: value for key, value in (LLAMA | _TINY).items() if value is not None},
    copies=(1 << 10,),
    gemm=32,
    batches=(1, 3),
    contexts=(33,),
    prompts=(20,),
    working_set=10_000,
    matrices=((64, 128),),
    rows=(1, 3),
    drawn=(1, 3),
    decoding=(1, 3),
    context=33,
    new=12,
    checks=(2, 16),
    rest=0.0,
    load=(4, 20, 8),
    compared=(2, 20, 4),
)
"""So that every line runs within seconds, on a CPU."""


@dataclass(frozen=True, slots=True)
class Run:
    """One part, under way."""

    part: str
    out: Path
    journal: Journal
    """In ``out``."""
    device: torch.device
    sizes: Sizes
    scratch: Path
    """A folder that parts share and that is gone afterwards; in memory, if the machine has room."""
    deadline: float
    """By ``time.monotonic()``; the part is ended then."""

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Something whose failure isn't that of what follows: it is written down."""
        try:
            yield
        except Exception as error:  # whatever it is, there is more to measure
            first: BaseException = error
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            words = " ".join(str(first).split())
            self.journal.write("error", part=self.part, what=what, error=f"{type(first).__name__}: {words[:1500]}")
