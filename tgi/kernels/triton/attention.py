"""Paged attention: what a step's tokens add to the cache, and what they read of it.

A program has some queries of one segment, with all heads that share a kv head as rows of one tile: so even one query
fills tensor cores, and keys are read once for all of them. The softmax goes on from tile to tile of keys (Dao et al.,
arXiv 2205.14135). Where segments are few, their tiles are dealt out to splits, which are merged in a fixed order
(Flash-Decoding; Dao et al., 2023).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.tiles import multiprocessors, tile

PAGE = 16
"""Tokens."""
WIDEST = 512
"""Dimensions of the widest value."""

_WIDTHS = (128, 256, WIDEST)
"""What tiles are chosen by."""
_LEAST = 16
"""Rows, columns and depth of the smallest product of tensor cores."""
_PROGRAMS = 4
"""For each multiprocessor, at least: segments of one token are split until there are so many …"""
_SPLITS = 32
"""… or so many splits. Powers of two alone, as each number of them is another compiled kernel."""
_FIXED = 8
"""Splits whose borders, and thereby sums, don't depend on what else there is."""
_HEADS = 8
_PAGE = tl.constexpr(PAGE)
_LOG2E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e38)
"""Below any score, and unlike an infinity to be subtracted from itself."""


class Layout(NamedTuple):
    """Of a layer, and of its pages [blocks, kv heads, keys and values, PAGE, dim]: what a program reads of a page is
    one run of memory. Latent keys hold their values, and there is nothing else."""

    heads: int
    kv_heads: int
    dim: int
    latent: int
    window: int | None
    fixed: bool
    """A row's result doesn't depend on other rows, nor on how a request is cut."""

    @property
    def kinds(self) -> int:
        return 1 if self.latent else 2

    @property
    def value(self) -> int:
        return self.latent or self.dim


class Score(NamedTuple):
    """From q·k to what the softmax is of."""

    scale: float
    cap: float | None
    slopes: torch.Tensor | None
    """float32 [heads]: see AttnSpec."""
    sinks: torch.Tensor | None
    """[heads]: a score that takes its part and has no value."""


class Step(NamedTuple):
    """A step's segments in device memory, as in attention.placed.Placed."""

    starts: torch.Tensor
    contexts: torch.Tensor
    firsts: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor


def store(
    layout: Layout,
    step: Step,
    pages: torch.Tensor,
    qkv: torch.Tensor,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Norm and rotate q and k of the packed projection, write k and v to their pages; → q [tokens, heads, dim].

    qkv: [tokens, (heads + 2 kv heads) · dim], without values where keys are latent. angles: see Turn. norm: [heads + kv
    heads, dim]. scales: what keys and values are divided by.
    """
    heads, kv_heads, dim = layout[:3]
    q = qkv.new_empty(len(qkv), heads, dim)
    half = 0 if angles is None else angles[0].shape[1]
    grid = len(qkv), triton.cdiv(heads + layout.kinds * kv_heads, _HEADS)
    _store[grid](
        qkv,
        q,
        pages,
        step,
        *((None, None) if angles is None else angles),
        norm,
        eps,
        *scales,
        qkv.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        KINDS=layout.kinds,
        DIM=dim,
        HALF=half,
        TURNS=max(triton.next_power_of_2(half), 1),
        STAYS=max(triton.next_power_of_2(dim - 2 * half), 1),
        MOST=torch.finfo(pages.dtype).max if pages.dtype.itemsize == 1 else 0,
        ROWS=_HEADS,
        num_warps=4,
    )
    return q


def attend(
    layout: Layout,
    step: Step,
    pages: torch.Tensor,
    q: torch.Tensor,
    score: Score,
    *,
    singles: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """→ [tokens, heads · value], times ``scale``. ``singles``: so many of the first segments are one token each. What
    is launched depends on this number and on those of segments and tokens alone."""
    tokens, segments = len(q), len(step.contexts)
    out = q.new_empty(tokens, layout.heads * layout.value)
    if singles:
        _attend_singles(layout, step, pages, q, score, singles, scale, out)
    if tokens > singles:
        constants = _constants(layout, q.dtype, "many", q.device)
        queries = constants["ROWS"] // constants["TOGETHER"]
        # Each segment's last queries may be less than a tile.
        blocks = (tokens - singles) // queries + segments - singles
        grid = (blocks * _groups(layout, constants["TOGETHER"]),)
        counts = singles, segments, _FIXED if layout.fixed else 1
        _attend[grid](q, pages, step, _powers(score), out, None, scale, *counts, SINGLE=False, **constants)
    return out


def _attend_singles(
    layout: Layout,
    step: Step,
    pages: torch.Tensor,
    q: torch.Tensor,
    score: Score,
    singles: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    constants = _constants(layout, q.dtype, "single", q.device)
    programs = singles * _groups(layout, constants["TOGETHER"])
    wanted = triton.cdiv(_PROGRAMS * multiprocessors(q.device), programs)
    splits = _FIXED if layout.fixed else min(triton.next_power_of_2(wanted), _SPLITS)
    parts, marks = out, None
    if splits > 1:
        parts = q.new_empty(splits, singles, layout.heads, layout.value, dtype=torch.float32)
        marks = q.new_empty(splits, singles, layout.heads, 2, dtype=torch.float32)
    counts = singles, singles, splits
    _attend[programs, splits](q, pages, step, _powers(score), parts, marks, scale, *counts, SINGLE=True, **constants)
    if marks is not None:
        _merge_splits[singles * layout.heads,](
            parts,
            marks,
            score.sinks,
            out,
            scale,
            singles * layout.heads,
            HEADS=layout.heads,
            VALUE=layout.value,
            WIDTH=triton.next_power_of_2(layout.value),
            SPLITS=splits,
            num_warps=max(layout.value // 128, 1),
        )


def _powers(score: Score) -> Score:
    """As the kernel takes it, for powers of two; with a cap, what is scaled is tanh's argument, for e^2x."""
    if score.cap is None:
        return score._replace(scale=score.scale * _LOG2E.value)
    return score._replace(scale=score.scale / score.cap * 2 * _LOG2E.value, cap=score.cap * _LOG2E.value)


def _groups(layout: Layout, together: int) -> int:
    """Of query heads that share a program."""
    return layout.kv_heads * -(-layout.heads // layout.kv_heads // together)


def _constants(layout: Layout, dtype: torch.dtype, what: str, device: torch.device) -> dict[str, int]:
    """What the kernel is compiled for. ``what``: of segments, "single" or "many" tokens."""
    width = max(triton.next_power_of_2(layout.value), _LEAST)
    shared = layout.heads // layout.kv_heads
    # Single: two tiles under way are 64 KB, and three programs share a multiprocessor, which hides a memory's latency.
    # Many: as many rows as registers hold sums of. Fixed: one tile is for all.
    sort = "fixed" if layout.fixed else what
    name = "float32" if dtype == torch.float32 else f"{sort} {min(each for each in _WIDTHS if each >= width)}"
    constants = dict(tile(f"attend {name}", device))
    if sort == "single" and not layout.latent:
        # Latent keys and their values are one tile, and only of 64 rows on do tensor cores read it in both ways.
        constants["ROWS"] = min(constants["ROWS"], max(triton.next_power_of_2(shared), _LEAST))
    return constants | {
        "HEADS": layout.heads,
        "KV_HEADS": layout.kv_heads,
        "DIM": layout.dim,
        "LATENT": layout.latent,
        "WINDOW": layout.window or 0,
        "WIDTH": width,
        "REST": max(triton.next_power_of_2(layout.dim - layout.value), _LEAST) if layout.dim > layout.value else 0,
        "TOGETHER": min(shared, constants["ROWS"]),
        "FIXED": layout.fixed,
    }


@triton.jit
def _store(
    qkv,
    q,
    cache,
    step,
    cos,
    sin,
    norm,
    eps,
    key_scale,
    value_scale,
    stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KINDS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TURNS: tl.constexpr,
    STAYS: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Heads are those of q, of k, and then of v, which stay as they are.
    there = head < HEADS + KINDS * KV_HEADS
    turned = head < HEADS + KV_HEADS
    segment = tl.load(step.rows + token)
    context = tl.load(step.contexts + segment)
    position = context + (token - tl.load(step.starts + segment)).to(tl.int32)
    kept = there & (head >= HEADS) & (context >= 0)
    page = tl.load(step.pages + tl.load(step.firsts + segment) + position // _PAGE, mask=context >= 0, other=0)
    kind = (head - HEADS) // KV_HEADS
    place = ((page.to(tl.int64) * KV_HEADS + (head - HEADS) % KV_HEADS) * KINDS + kind) * _PAGE + position % _PAGE
    scale = tl.where(kind == 0, key_scale, value_scale)
    packed = qkv + token * stride + head * DIM
    to = q + (token * HEADS + head) * DIM
    turn = tl.arange(0, TURNS)
    stay = 2 * HALF + tl.arange(0, STAYS)
    first = _heads(packed, turn, there, HALF)
    second = _heads(packed + HALF, turn, there, HALF)
    still = _heads(packed, stay, there, DIM)
    if norm is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(still * still, 1)
        factor = tl.where(turned, tl.rsqrt(squares / DIM + eps), 1)[:, None]
        weight = norm + head * DIM
        first *= factor * _heads(weight, turn, turned, HALF, 1)
        second *= factor * _heads(weight + HALF, turn, turned, HALF, 1)
        still *= factor * _heads(weight, stay, turned, DIM, 1)
    if HALF > 0:
        known = turned[:, None] & (turn < HALF)[None, :]
        cosine = tl.load(cos + token * HALF + turn[None, :], mask=known, other=1)
        sine = tl.load(sin + token * HALF + turn[None, :], mask=known, other=0)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        _put(rotated, to, cache + place * DIM, turn, head < HEADS, kept, scale, HALF, MOST)
        _put(second, to + HALF, cache + place * DIM + HALF, turn, head < HEADS, kept, scale, HALF, MOST)
    if 2 * HALF < DIM:
        _put(still, to, cache + place * DIM, stay, head < HEADS, kept, scale, DIM, MOST)


@triton.jit
def _heads(packed, d, there, END: tl.constexpr, other: tl.constexpr = 0):
    """Some dimensions of heads, below END: float32 [heads, dimensions]."""
    return tl.load(packed[:, None] + d[None, :], mask=there[:, None] & (d < END)[None, :], other=other).to(tl.float32)


@triton.jit
def _put(x, q, cache, d, asks, kept, scale, END: tl.constexpr, MOST: tl.constexpr):
    tl.store(q[:, None] + d[None, :], x, mask=asks[:, None] & (d < END)[None, :])
    if MOST > 0:
        x = x / scale[:, None]
        # What is no number stays none, and what is infinite becomes none.
        x = tl.minimum(tl.maximum(x, -MOST), MOST) + (x - x)
    tl.store(cache[:, None] + d[None, :], x.to(cache.dtype.element_ty), mask=kept[:, None] & (d < END)[None, :])


@triton.jit(do_not_specialize=["singles", "segments", "splits"])
def _attend(
    q,
    cache,
    step,
    score,
    out,
    marks,
    value_scale,
    singles,
    segments,
    splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LATENT: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    KEYS: tl.constexpr,
    SINGLE: tl.constexpr,
    FIXED: tl.constexpr,
):
    SHARED: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // TOGETHER
    GROUPS: tl.constexpr = (SHARED + TOGETHER - 1) // TOGETHER
    VALUE: tl.constexpr = LATENT if LATENT > 0 else DIM
    # Groups of heads that read the same keys are neighbours in time.
    group = tl.program_id(0) % GROUPS
    kv_head = tl.program_id(0) // GROUPS % KV_HEADS
    block = tl.program_id(0) // (GROUPS * KV_HEADS)
    if SINGLE:
        segment = block
        first = 0
    else:
        # The last queries of a segment see most keys, so they are begun with.
        block = tl.num_programs(0) // (GROUPS * KV_HEADS) - 1 - block
        segment, first = _segment(step.starts, block, singles, segments, QUERIES)
    start = tl.load(step.starts + segment)
    length = tl.load(step.starts + segment + 1) - start
    context = tl.load(step.contexts + segment)
    if first >= length:
        return
    token = first + tl.arange(0, ROWS) // TOGETHER
    shared = group * TOGETHER + tl.arange(0, ROWS) % TOGETHER
    valid = (tl.arange(0, ROWS) < QUERIES * TOGETHER) & (token < length) & (shared < SHARED)
    position = tl.where(valid & (context >= 0), context + token, -1)
    end = context + tl.minimum(first + QUERIES, length)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context + first - WINDOW + 1, 0)

    head = kv_head * SHARED + shared
    row = (start + token).to(tl.int64) * HEADS + head
    queries = _rows(q, row, valid, DIM - VALUE, VALUE, DIM, WIDTH)
    rest = None
    if REST > 0:
        rest = _rows(q, row, valid, 0, DIM - VALUE, DIM, REST)
    slope = None
    if score.slopes is not None:
        slope = tl.load(score.slopes + head, mask=valid, other=0) * _LOG2E
    pages = step.pages + tl.load(step.firsts + segment)
    cache += kv_head * ((1 if LATENT > 0 else 2) * _PAGE * DIM)

    held = cache, pages, begin, end
    if SINGLE or not FIXED:
        state = _unseen(score.sinks if marks is None else None, head, valid, ROWS, WIDTH)
        split = tl.program_id(1)
        state = _scan(
            state, queries, rest, position, slope, held, score, split, splits, KV_HEADS, DIM, LATENT, WINDOW, KEYS
        )
    else:
        state = _unseen(score.sinks, head, valid, ROWS, WIDTH)
        for split in range(splits):
            own = _unseen(None, head, valid, ROWS, WIDTH)
            own = _scan(
                own, queries, rest, position, slope, held, score, split, splits, KV_HEADS, DIM, LATENT, WINDOW, KEYS
            )
            state = _merge(state, own)
    most, weight, total = state
    if marks is None:
        total = _shares(weight, total, value_scale)
    else:
        row += tl.program_id(1).to(tl.int64) * (singles * HEADS)
        tl.store(marks + 2 * row, most, mask=valid)
        tl.store(marks + 2 * row + 1, weight, mask=valid)
    d = tl.arange(0, WIDTH)
    tl.store(out + row[:, None] * VALUE + d[None, :], total, mask=valid[:, None] & (d < VALUE)[None, :])


@triton.jit
def _segment(starts, block, singles, segments, QUERIES: tl.constexpr):
    """Of a block of queries: its segment and the place of its first query there, which may be behind the last.

    The blocks of segment i begin at the tokens between the singles and it, divided by QUERIES, plus the number of
    segments between. So no two segments share one, and the number of blocks is known without their lengths.
    """
    before = tl.load(starts + singles)
    low = singles
    high = segments
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts + middle) - before) // QUERIES + middle - singles <= block:
            low = middle
        else:
            high = middle
    begins = (tl.load(starts + low) - before) // QUERIES + low - singles
    return low, (block - begins) * QUERIES


@triton.jit
def _rows(q, row, valid, FROM: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT dimensions of q's rows."""
    d = tl.arange(0, WIDTH)
    return tl.load(q + row[:, None] * DIM + FROM + d[None, :], mask=valid[:, None] & (d < COUNT)[None, :], other=0)


@triton.jit
def _unseen(sinks, head, valid, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Before any key: the largest score, the sum of weights, and of weighted values."""
    most = tl.full((ROWS,), _LOWEST, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    if sinks is not None:
        most = tl.load(sinks + head, mask=valid, other=0).to(tl.float32) * _LOG2E
        weight += 1
    return most, weight, tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def _scan(
    state,
    queries,
    rest,
    position,
    slope,
    held,
    score,
    split,
    splits,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LATENT: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The tiles of a split: every ``splits``-th, counted from position 0, of those between ``begin`` and ``end``."""
    most, weight, total = state
    cache, pages, begin, end = held
    VALUE: tl.constexpr = LATENT if LATENT > 0 else DIM
    KINDS: tl.constexpr = 1 if LATENT > 0 else 2
    d = tl.arange(0, queries.shape[1])
    step = KEYS * splits
    tile = begin // KEYS
    start = (tile + (split + splits - tile % splits) % splits) * KEYS
    at = start + tl.arange(0, KEYS)
    page = tl.load(pages + at // _PAGE, mask=at < end, other=0)
    for _ in range(start, end, step):
        known = (at >= begin) & (at < end)
        place = page.to(tl.int64) * (KV_HEADS * KINDS * _PAGE * DIM) + at % _PAGE * DIM
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen &= at[None, :] > position[:, None] - WINDOW
        behind = position[:, None] - at[None, :]
        # Asked for one tile ahead: what is read in this one must not wait for it.
        at += step
        page = tl.load(pages + at // _PAGE, mask=at < end, other=0)
        keys = cache + place + (DIM - VALUE)
        k = tl.load(keys[None, :] + d[:, None], mask=known[None, :] & (d < VALUE)[:, None], other=0.0)
        k = k.to(queries.dtype)
        scores = tl.dot(queries, k, input_precision="ieee")
        if rest is not None:
            r = tl.arange(0, rest.shape[1])
            mask = known[None, :] & (r < DIM - VALUE)[:, None]
            k_rest = tl.load((cache + place)[None, :] + r[:, None], mask=mask, other=0.0)
            scores = tl.dot(rest, k_rest.to(queries.dtype), scores, input_precision="ieee")
        scores *= score.scale
        if score.cap is not None:
            scores = score.cap - 2 * score.cap / (tl.exp2(scores) + 1)  # tanh
        if slope is not None:
            scores -= slope[:, None] * behind
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        scores = tl.exp2(scores - higher[:, None])
        faded = tl.exp2(most - higher)
        weight = weight * faded + tl.sum(scores, 1)
        if LATENT > 0:
            v = tl.trans(k)
        else:
            values = (keys + _PAGE * DIM)[:, None] + d[None, :]
            v = tl.load(values, mask=known[:, None] & (d < VALUE)[None, :], other=0.0)
            v = v.to(queries.dtype)
        total = tl.dot(scores.to(queries.dtype), v, total * faded[:, None], input_precision="ieee")
        most = higher
    return most, weight, total


@triton.jit
def _merge(state, own):
    """What was seen in two splits, or nothing: rounded the same in all kernels."""
    most, weight, total = state
    own_most, own_weight, own_total = own
    higher = tl.maximum(most, own_most)
    faded, factor = tl.exp2(most - higher), tl.exp2(own_most - higher)
    weight = tl.fma(own_weight, factor, weight * faded)
    return higher, weight, tl.fma(own_total, factor[:, None], total * faded[:, None])


@triton.jit
def _shares(weight, total, scale):
    """What is stored: of nothing, zeros."""
    return total / tl.where(weight == 0, 1, weight)[:, None] * scale


@triton.jit(do_not_specialize=["rows"])
def _merge_splits(
    parts,
    marks,
    sinks,
    out,
    value_scale,
    rows,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    d = tl.arange(0, WIDTH)
    there = (row >= 0)[:, None] & (d < VALUE)[None, :]
    state = _unseen(sinks, row % HEADS, row >= 0, 1, WIDTH)
    # Unrolled, so that all is read at once.
    for split in tl.static_range(SPLITS):
        at = (split * rows + row).to(tl.int64)
        total = tl.load(parts + at[:, None] * VALUE + d[None, :], mask=there, other=0)
        state = _merge(state, (tl.load(marks + 2 * at), tl.load(marks + 2 * at + 1), total))
    _, weight, total = state
    tl.store(out + row.to(tl.int64)[:, None] * VALUE + d[None, :], _shares(weight, total, value_scale), mask=there)
