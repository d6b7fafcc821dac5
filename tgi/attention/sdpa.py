"""Paged attention from plain torch operations: gathers pages, then scaled_dot_product_attention. Runs on any device.

Decoding requests of similar length are one padded batch; every longer chunk runs by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from tgi.attention.base import AttnSpec, Precision, PreparedAttention, Segment, Turn, zeros
from tgi.attention.placed import Placed
from tgi.core.config import BLOCK_SIZE, GATHERED_TOKENS


class SdpaAttention:
    """Pages lie as [block, slot, k or v, kv head, dim]: one token's keys and values are one run of memory. Latent keys
    hold the values, and there is nothing else."""

    name = "sdpa"
    static = False

    @staticmethod
    def declines(spec: AttnSpec, precision: Precision, device: torch.device) -> str | None:
        if not precision.stored.is_floating_point:
            return f"no cache in {precision.stored}"
        return None

    def __init__(self, spec: AttnSpec, precision: Precision, device: torch.device) -> None:
        self.spec = spec
        self._precision = precision
        self._device = device
        # torch moves no float8 numbers, but bytes.
        self._moved = torch.uint8 if precision.stored.itemsize == 1 else precision.stored
        self._workspace = torch.empty(0, dtype=self._moved, device=device)
        self._slopes = None if spec.slopes is None else torch.tensor(spec.slopes, device=device).view(-1, 1, 1)

    def allocate(self, blocks: int) -> torch.Tensor:
        spec = self.spec
        kinds = 1 if spec.latent else 2
        return zeros((blocks, BLOCK_SIZE, kinds, spec.kv_heads, spec.head_dim), self._moved, self._device)

    def prepare(self, segments: Sequence[Segment], placed: Placed | None = None) -> PreparedAttention:
        slots: list[int] = []
        parts: list[_Part] = []
        at = 0
        for group in _group(segments):
            tokens = sum(segment.length for segment in group)
            parts.append(self._part(at, tokens, group))
            at += tokens
        begun: list[int] = []
        for segment in segments:
            blocks = segment.blocks
            end = segment.start + segment.length
            for position in range(segment.start, end):
                slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            if 0 < end % BLOCK_SIZE <= segment.length:
                begun.append(blocks[end // BLOCK_SIZE])
        begun_blocks = torch.tensor(begun, device=self._device) if begun else None
        return _Prepared(self, parts, torch.tensor(slots, device=self._device), begun_blocks)

    def gather(self, pages: torch.Tensor, part: "_Part") -> torch.Tensor:
        """The part's keys and values, [batch, context, 2 or 1, kv heads, dim].

        Into one buffer that all layers reuse: fresh memory for each would cost more in page faults than the copy.
        """
        shape = (part.blocks.numel(), *pages.shape[1:])
        size = part.blocks.numel() * pages[0].numel()
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=self._moved, device=self._device)
        out = self._workspace[:size].view(shape)
        torch.index_select(pages, 0, part.blocks, out=out)
        kept = out.view(self._precision.stored).view(part.batch, -1, *pages.shape[2:])
        return kept[:, : part.context].to(self._precision.compute)

    def kept(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Keys or values as pages hold them. In float8 what is too large becomes the largest; what is no number stays
        none."""
        stored = self._precision.stored
        if stored.itemsize > 1:
            return x.to(stored)
        x, most = x.float() / scale, torch.finfo(stored).max
        return (x.clamp(-most, most) + (x - x)).to(stored).view(self._moved)

    def scales(self, turn: Turn) -> tuple[float, float]:
        """Of keys and values."""
        key, value = turn.scales if self._precision.stored == torch.float8_e4m3fn else (1.0, 1.0)
        return key, key if self.spec.latent else value

    def _part(self, at: int, tokens: int, group: Sequence[Segment]) -> "_Part":
        """Blocks and mask of one group. Only the blocks that the window reaches are gathered."""
        firsts = [self._first_block(segment) for segment in group]
        contexts = [s.start + s.length - first * BLOCK_SIZE for s, first in zip(group, firsts, strict=True)]
        context = max(contexts)
        width = -(-context // BLOCK_SIZE)
        blocks: list[int] = []
        for segment, first, own in zip(group, firsts, contexts, strict=True):
            used = segment.blocks[first : first + -(-own // BLOCK_SIZE)]
            blocks += used
            blocks += [used[0]] * (width - len(used))
        length = group[0].length
        # Without a window a first chunk is causal by itself, and single tokens of equal context see all of it.
        alike = self.spec.window is None and self.spec.slopes is None
        causal = alike and not _written_out(self.spec) and length > 1 and group[0].start == 0
        free = alike and length == 1 and min(contexts) == context
        return _Part(
            at,
            tokens,
            len(group),
            context,
            torch.tensor(blocks, device=self._device),
            causal,
            None if causal or free else self._mask(contexts, length),
        )

    def _first_block(self, segment: Segment) -> int:
        if self.spec.window is None:
            return 0
        return max(segment.start - self.spec.window + 1, 0) // BLOCK_SIZE

    def _mask(self, contexts: list[int], length: int) -> torch.Tensor:
        """Additive mask [batch, 1 or heads, length, context]; query i of a row sees keys up to its own place. Heads of
        single tokens are [kv heads, heads of each]."""
        ends = torch.tensor(contexts, device=self._device).view(-1, 1, 1, 1)
        query = ends - length + torch.arange(length, device=self._device).view(1, 1, -1, 1)
        key = torch.arange(max(contexts), device=self._device)
        hidden = key > query
        if self.spec.window is not None:
            hidden |= key <= query - self.spec.window
        bias = torch.zeros(hidden.shape, device=self._device)
        if self._slopes is not None:
            bias = (key - query).float() * self._slopes
            if length == 1:
                bias = bias.view(len(contexts), self.spec.kv_heads, -1, bias.shape[-1])
        return bias.masked_fill(hidden, float("-inf")).to(self._precision.compute)


@dataclass(frozen=True, slots=True)
class _Part:
    """Segments of equal length that run as one batch: tokens ``at … at + tokens`` of the step."""

    at: int
    tokens: int
    batch: int
    context: int
    blocks: torch.Tensor
    causal: bool
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    backend: SdpaAttention
    parts: list[_Part]
    slots: torch.Tensor
    begun: torch.Tensor | None
    """Blocks whose first slots, and not the last, are written in this step."""

    def run(self, pages: torch.Tensor, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        q, k, v = turn(qkv)
        if self.begun is not None:
            # A masked score of 0 times what an earlier request left behind could be NaN.
            pages.index_fill_(0, self.begun, 0)
        flat = pages.view(-1, *pages.shape[2:])
        key, value = self.backend.scales(turn)
        flat[:, 0].index_copy_(0, self.slots, self.backend.kept(k, key))
        if not self.backend.spec.latent:
            flat[:, 1].index_copy_(0, self.slots, self.backend.kept(v, value))
        if key != 1:
            q = q * key
        outs = [self._attend(pages, part, q[part.at : part.at + part.tokens], turn.sinks) for part in self.parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if value == 1 else out.mul_(value)

    def _attend(self, pages: torch.Tensor, part: _Part, q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        spec = self.backend.spec
        kv = self.backend.gather(pages, part)
        # torch's fast kernels want values as wide as keys: latent ones are whole keys until the sums are there.
        k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, -1].transpose(1, 2)
        length = part.tokens // part.batch
        if length == 1:
            # Query heads that share a kv head become its query rows: keys and values are read once.
            q = q.view(part.batch, spec.kv_heads, -1, spec.head_dim)
            out = _attention(q, k, v, part, spec, sinks)
        else:
            q = q.view(part.batch, length, spec.heads, spec.head_dim).transpose(1, 2)
            shared = spec.heads // spec.kv_heads
            if shared > 1 and (q.device.type != "cpu" or _written_out(spec)):
                # No CUDA kernel takes shared heads with a mask, or in float32: torch would write out all the scores.
                k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
            out = _attention(q, k, v, part, spec, sinks, shared=shared > 1).transpose(1, 2)
        return out[..., -spec.value_dim :].reshape(part.tokens, spec.heads * spec.value_dim)


def _written_out(spec: AttnSpec) -> bool:
    """Whether torch's function can't do it."""
    return spec.softcap is not None or spec.sinks


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    part: _Part,
    spec: AttnSpec,
    sinks: torch.Tensor | None,
    *,
    shared: bool = False,
) -> torch.Tensor:
    """[batch, heads, queries, dim], [batch, heads or, ``shared``, fewer, keys, dim] → as q."""
    if not _written_out(spec):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=part.mask, is_causal=part.causal, scale=spec.scale, enable_gqa=shared
        )
    scores = (q @ k.transpose(-1, -2)).mul_(spec.scale)
    if spec.softcap is not None:
        scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if part.mask is not None:
        scores += part.mask
    if sinks is None:
        return scores.softmax(-1) @ v
    sink = sinks.to(scores).view(q.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v


def _group(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours of one token each share a batch while padding at most doubles the shorter one's work, and the batch
    stays within GATHERED_TOKENS."""
    groups: list[list[Segment]] = []
    shortest = longest = 0
    for segment in segments:
        low, high = min(shortest, segment.start), max(longest, segment.start)
        joins = groups and segment.length == groups[-1][0].length == 1
        if joins and high <= 2 * low + 4 * BLOCK_SIZE and (high + 1) * (len(groups[-1]) + 1) <= GATHERED_TOKENS:
            groups[-1].append(segment)
            shortest, longest = low, high
        else:
            groups.append([segment])
            shortest = longest = segment.start
    return groups
