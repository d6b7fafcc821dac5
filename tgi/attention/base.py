"""What a model asks of attention, and how a backend is chosen. Knows no model and no scheduler."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tgi.core.errors import StartupError

if TYPE_CHECKING:
    from tgi.attention.placed import Placed


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """One layer's attention, fixed at load."""

    heads: int
    """Query heads on this rank."""
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q·k before the softmax."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)``."""
    slopes: tuple[float, ...] | None = None
    """Of each query head: what a score loses with each position between key and query (ALiBi; Press et al., arXiv
    2108.12409)."""
    latent: int = 0
    """If not 0, so many dimensions at the end of a key are its value (DeepSeek-AI, arXiv 2405.04434)."""
    sinks: bool = False
    """The softmax has a score more than there are keys: ``Turn.sinks`` (Xiao et al., arXiv 2309.17453)."""

    @property
    def value_dim(self) -> int:
        return self.latent or self.head_dim


class Norm(Protocol):
    """RMSNorm of the heads of q and k."""

    @property
    def weight(self) -> torch.Tensor:
        """[heads + kv heads, head_dim]."""

    @property
    def eps(self) -> float: ...


class Turn(Protocol):
    """How q, k and v are made of a layer's packed projection: in torch by a call, in a kernel by the fields."""

    @property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin of the step's tokens, float32 [tokens, half the dimensions that turn]; None: nothing turns."""

    @property
    def norm(self) -> Norm | None: ...

    @property
    def scales(self) -> tuple[float, float]:
        """What a cache in float8_e4m3fn divides keys and values by."""

    @property
    def sinks(self) -> torch.Tensor | None:
        """[heads]: scores that take their part of the softmax and have no value, if the spec says so."""

    def __call__(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in Attend → q [tokens, heads, head_dim]; k likewise, and v [tokens, kv_heads, value_dim]."""


class Attend(Protocol):
    """The one thing a model's forward knows of attention and cache."""

    def __call__(self, layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Store k, v of the step's tokens and attend.

        qkv: the projection [tokens, (heads + 2 kv_heads) · head_dim], without values where keys are latent. Returns
        [tokens, heads · value_dim].
        """


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one request's tokens inside the step's flat token axis."""

    start: int
    """Position of its first token in the request; as many tokens are in the cache before it."""
    length: int
    blocks: Sequence[int]
    """Pages of the request in order; they cover ``start + length`` tokens."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are held and added up, fixed at load."""

    compute: torch.dtype
    """Of what goes in and comes out."""
    stored: torch.dtype
    """Of keys and values in the cache."""
    fixed: bool = False
    """A token's result doesn't depend on what else a step computes (`--deterministic`); the CPU's never does."""


class AttentionBackend(Protocol):
    """A kernel family, serving all layers of one spec. Pages are passed in: a backend holds no state of requests."""

    name: str
    static: bool
    """Whether a prepared step is read from ``placed`` alone if all segments are of one token, so that the same launches
    serve as many others."""

    @staticmethod
    def declines(spec: AttnSpec, precision: Precision, device: torch.device) -> str | None:
        """Why this backend can't serve the spec; None if it can."""

    def __init__(self, spec: AttnSpec, precision: Precision, device: torch.device) -> None: ...

    def allocate(self, blocks: int) -> torch.Tensor:
        """One layer's zeroed pages, laid out as this backend reads them."""

    def prepare(self, segments: Sequence[Segment], placed: "Placed | None" = None) -> "PreparedAttention":
        """What a step's layers share: masks, indices, launch plans. The token axis holds the segments in order.
        ``placed``: the same in device memory, if it is there already."""


class PreparedAttention(Protocol):
    """One step, ready to run layer by layer."""

    def run(self, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Write k, v into the layer's ``pages`` and attend; shapes as in Attend."""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory on CPU is taken only when it is first written: torch.zeros writes all of it at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)


def choose(
    spec: AttnSpec, precision: Precision, device: torch.device, backends: Sequence[type[AttentionBackend]]
) -> type[AttentionBackend]:
    """The first backend that serves ``spec``; if none does, an error with each one's reason."""
    reasons = []
    for backend in backends:
        if (reason := backend.declines(spec, precision, device)) is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise StartupError(f"no attention backend serves {spec} with {precision} on {device}: " + "; ".join(reasons))
