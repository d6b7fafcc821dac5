"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways to stretch it.

The angle of a token depends on its position alone: cached keys are already rotated and are shared between requests of
any length. Types whose frequencies depend on the sequence's length (dynamic, longrope) therefore choose them once, by
the longest request that the server admits.
"""

import math
from collections.abc import Sequence

import torch

from tgi.core.model_config import Rope
from tgi.kernels.attention import angles as native_angles
from tgi.kernels.library import Library

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each float32 [tokens, half the dimensions that turn]."""


class Rotary:
    """Turns position into angles once per step, and rotates queries and keys by them in every layer.

    ``reach`` is the longest sequence served; see ``inverse_frequencies``.
    """

    __slots__ = ("_library", "_scale", "frequencies", "size")

    def __init__(
        self, rope: Rope, head_dim: int, reach: int, device: torch.device, library: Library | None = None
    ) -> None:
        self.size = int(head_dim * rope.partial)
        """Leading dimensions of a head that turn."""
        frequencies, self._scale = inverse_frequencies(rope, self.size, reach)
        self.frequencies = frequencies.to(device)
        self._library = library

    def angles(self, positions: torch.Tensor) -> Angles:
        """int64 [tokens] → (cos, sin), each float32 [tokens, size / 2]."""
        if self._library is not None:
            return native_angles(self._library, positions, self.frequencies, self._scale)
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._scale == 1.0 else (cos * self._scale, sin * self._scale)


class Rotaries:
    """An embedding for each layer that has one; layers with the same one share its angles."""

    __slots__ = ("_ropes", "_rotaries")

    def __init__(
        self,
        ropes: Sequence[Rope | None],
        head_dim: int,
        reach: int,
        device: torch.device,
        library: Library | None = None,
    ) -> None:
        """``ropes``: of each layer."""
        self._ropes = ropes
        self._rotaries = {
            rope: Rotary(rope, head_dim, reach, device, library) for rope in dict.fromkeys(ropes) if rope is not None
        }

    def angles(self, positions: torch.Tensor) -> list[Angles | None]:
        """int64 [tokens] → each layer's."""
        angles = {rope: rotary.angles(positions) for rope, rotary in self._rotaries.items()}
        return [None if rope is None else angles[rope] for rope in self._ropes]


def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """[tokens, heads, head dim] → the same, rotated, contiguous. Dimension i turns against i + size / 2."""
    cos, sin = (values[:, None].to(x.dtype) for values in angles)
    half = cos.shape[-1]
    first, second, still = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, still), dim=-1)


def inverse_frequencies(rope: Rope, size: int, reach: int) -> tuple[torch.Tensor, float]:
    """float32 [size / 2] radians per position, and the factor on cos and sin.

    ``reach`` is the longest sequence served. Dynamic scaling stretches the base to reach it (bloc97's NTK-aware
    formula); up to the trained length it is the plain embedding. Longrope (Ding et al., arXiv 2402.13753) takes the
    long factors if it exceeds the trained length, else the short ones. transformers decides by each forward's length:
    the two agree for every request of a server that stays within the trained length, and for prompts of length
    ``reach`` (dynamic) or longer than the trained length (longrope).
    """
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    plain = 1.0 / rope.theta**steps
    match rope.type:
        case "linear":
            return plain / rope.factor, 1.0
        case "dynamic":
            length = max(reach, rope.original)
            growth = rope.factor * length / rope.original - (rope.factor - 1)
            return 1.0 / (rope.theta * growth ** (size / (size - 2))) ** steps, 1.0
        case "yarn":
            return _yarn(rope, size, plain)
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "longrope":
            return _longrope(rope, steps, reach)
    return plain, 1.0


def _yarn(rope: Rope, size: int, plain: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): fast dimensions keep their speed, slow ones are slowed by ``factor``, with
    a ramp between the dimensions that turn ``beta_fast`` and ``beta_slow`` times over the trained length."""

    def dimension(turns: float) -> float:
        return size * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)
    frequencies = plain / rope.factor * slowed + plain * (1 - slowed)
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return frequencies, _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's rule: long waves are slowed by ``factor``, short ones kept, those between interpolated."""
    turns = rope.original * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp_(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _longrope(rope: Rope, steps: torch.Tensor, reach: int) -> tuple[torch.Tensor, float]:
    long = reach > rope.original
    factors = rope.long_factor if long else rope.short_factor
    scale = rope.long_mscale if long else rope.short_mscale
    if scale is None:
        scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original))
    return 1.0 / (torch.tensor(factors) * rope.theta**steps), scale
