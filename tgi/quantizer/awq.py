"""AWQ (Lin et al., arXiv 2306.00978): weights of inputs that are large are scaled up before they are rounded, and what
makes the inputs is scaled down; then groups are clipped."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tgi.quantizer.ints import Grid, Ints

_RATIOS = tuple(step / 20 for step in range(20))
"""Exponents of the inputs' mean size that are tried as scales; 0 changes nothing."""
_CLIPS = tuple(1 - step / 20 for step in range(11))
"""Parts of a group's range that are tried."""
_BITS = 4


@dataclass(frozen=True, slots=True)
class Activity:
    """What is known of the inputs of a product."""

    size: torch.Tensor
    """Mean of absolute values [inner]."""
    gram: torch.Tensor
    """Mean products of the inputs of a group [groups, group, group]."""

    @classmethod
    def of(cls, x: torch.Tensor, group: int) -> "Activity":
        """Of x [tokens, inner]."""
        blocks = x.view(len(x), -1, group).transpose(0, 1)
        return cls(x.abs().mean(0), blocks.transpose(1, 2) @ blocks / len(x))

    def errors(self, changes: torch.Tensor) -> torch.Tensor:
        """Mean squared changes of the product by changes of weights [outs, groups, group], group by group: [outs,
        groups]. How errors of two groups work together is left out; rounding makes them independent."""
        blocks = changes.transpose(0, 1)
        return (blocks @ self.gram).mul_(blocks).sum(-1).T


def search(activity: Activity, weights: Iterable[torch.Tensor], source: torch.Tensor | None = None) -> torch.Tensor:
    """The scales [inner] with the least error of the products with all ``weights`` [outs, inner].

    ``source``: for each input the number of what makes it; inputs of the same one have the same scale.
    """
    size = activity.size
    if source is not None:
        means = torch.zeros(int(source.max()) + 1, device=size.device)
        size = means.scatter_reduce(0, source, size, "mean", include_self=False)[source]
    candidates = []
    for ratio in _RATIOS:
        scale = size.clamp(min=1e-4).pow(ratio)
        candidates.append(scale / (scale.max() * scale.min()).sqrt())
    errors = torch.zeros(len(candidates), device=size.device)
    for weight in weights:
        blocks = weight.view(len(weight), len(activity.gram), -1)
        for number, candidate in enumerate(candidates):
            scales = candidate.view(blocks.shape[1:])
            scaled = blocks * scales
            grid = _grid(scaled, 1.0)
            errors[number] += activity.errors(grid.values(grid.round(scaled)) / scales - blocks).sum()
    return candidates[int(errors.argmin())]


def quantize(weight: torch.Tensor, activity: Activity | None, *, group: int) -> Ints:
    """Round ``weight`` [outs, inner] to 4 bits: to that part of each group's range with the least error of the
    product with inputs of this ``activity``; if it isn't known, to all of it."""
    blocks = weight.view(len(weight), -1, group)
    best = _grid(blocks, 1.0)
    if activity is not None:
        least = torch.full_like(best.scale, float("inf"))
        for part in _CLIPS:
            grid = _grid(blocks, part)
            errors = activity.errors(grid.values(grid.round(blocks)) - blocks)
            best, least = grid.where(errors < least, best), torch.minimum(errors, least)
    return best.ints(best.round(blocks))


def _grid(blocks: torch.Tensor, part: float) -> Grid:
    return Grid.between(blocks.amin(-1) * part, blocks.amax(-1) * part, _BITS, sym=False, least=0)
