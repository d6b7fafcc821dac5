"""Tokens drawn from rows of logits, as ``runtime/torch_sampler.py`` defines them, without a vocabulary sort.

One pass over the logits leaves the largest number and the mass of each bucket of 256 tokens; one program for each row
then draws a bucket, and a token of it. Rows that ask for top-k, top-p, typical-p or min-p have their limits found in
between: on what is likely enough to matter, by bisection, and their buckets are weighed again within these.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.choices import CHOICE, ENTRIES, GREEDY, LIMITED, Changes
from tgi.kernels.triton.tiles import tile

_BUCKET = tl.constexpr(256)
_AT_ONCE = 64
"""Rows whose limits are sought at once: each needs memory for as many numbers as the vocabulary has."""
_DEEPEST = tl.constexpr(104.0)
"""e to the minus this is 0 in float32."""
_INFINITE = tl.constexpr(0x7F800000)
"""The bits of infinity. Those of numbers that are not negative are ordered as the numbers are."""
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_GREATEST = tl.constexpr(torch.finfo(torch.float32).max)

_GREEDY, _LIMITED = tl.constexpr(GREEDY), tl.constexpr(LIMITED)
_WORDS = tl.constexpr(CHOICE.itemsize // 4)
(
    _SEED,
    _SEED_ABOVE,
    _POSITION,
    _WAY,
    _COPY,
    _GREEN,
    _MASK,
    _DELTA,
    _REPETITION,
    _FREQUENCY,
    _PRESENCE,
    _TEMPERATURE,
    _TOP_K,
    _TOP_P,
    _TYPICAL_P,
    _MIN_P,
) = map(tl.constexpr, range(CHOICE.itemsize // 4))


class Draws(NamedTuple):
    """What came of it."""

    ids: torch.Tensor
    """int64 [rows], always of the vocabulary."""
    said: torch.Tensor
    """int32 [2, rows]: ids, -1 for logits that are not numbers; the bits of the logits' own log-probabilities."""
    norms: torch.Tensor
    """float32 [rows]: the logits' logsumexp."""


class _Step(NamedTuple):
    """What kernels are told."""

    logits: torch.Tensor
    stride: int
    copies: torch.Tensor
    choices: torch.Tensor
    stats: torch.Tensor
    """float32 [rows, 4, buckets]: the largest number and the mass relative to it of the logits, at temperature 1; then
    both of what is drawn from, at the row's temperature."""
    limits: torch.Tensor
    """float32 [rows, 4]: the depth of the deepest token that may come, a depth and how far from it tokens may be, and
    the largest number, from which depths are counted."""
    size: int
    buckets: int


def draw(
    logits: torch.Tensor,
    choices: torch.Tensor,
    changes: Changes | None = None,
    limited: torch.Tensor | None = None,
) -> Draws:
    """One token for each row. logits: float32 [rows, vocabulary]; choices: int32, a CHOICE for each row; limited:
    int32, the rows that are LIMITED, if any.

    A row's token doesn't depend on other rows.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    rows, size = logits.shape
    device, buckets = logits.device, triton.cdiv(size, _BUCKET.value)
    step = _Step(
        logits,
        logits.stride(0),
        logits if changes is None else logits.new_empty(len(changes.rows), size),
        choices,
        logits.new_empty(rows, 4, buckets),
        logits.new_empty(rows, 4),
        size,
        buckets,
    )
    # Four warps with 16 numbers a thread, which are loaded four at once, wherever a row is passed over: then even one
    # row occupies half of the multiprocessors.
    if changes is not None:
        block = tile("sampling.copy", device)
        _copy[len(changes.rows), triton.cdiv(size, block["BLOCK"])](step, changes, **block)
        if len(changes.owners):
            _penalize[(len(changes.owners),)](step, changes, ENTRIES=ENTRIES, num_warps=ENTRIES // 32)
    survey = tile("sampling.survey", device)
    chunks = triton.cdiv(buckets, survey["BUCKETS"])
    _survey[rows, chunks](step, **survey)
    if limited is not None:
        for part in limited.split(_AT_ONCE):
            _seek(step, part)
        _weigh[len(limited), chunks](step, limited, **survey)
    draws = Draws(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(2, rows, dtype=torch.int32, device=device),
        logits.new_empty(rows),
    )
    _draw[(rows,)](step, draws, BUCKETS=triton.next_power_of_2(buckets), **tile("sampling.draw", device))
    return draws


def _seek(step: _Step, rows: torch.Tensor) -> None:
    """Find the limits of some rows."""
    device = rows.device
    # A row is listed by a few programs, and one looks through all that they list. It waits more than it computes: so it
    # has eight warps, and reads some of each part at once.
    listing, limits = tile("sampling.list", device), tile("sampling.limit", device)
    parts, block = limits["PARTS"], listing["BLOCK"]
    span = triton.cdiv(step.size, parts * block) * block
    depths = step.logits.new_empty(len(rows), parts, span)
    counts = rows.new_empty(len(rows), parts)
    buckets = triton.next_power_of_2(step.buckets)
    _list[len(rows), triton.cdiv(step.size, span)](
        step, rows, depths, counts, span, PARTS=parts, BUCKETS=buckets, **listing
    )
    _limit[(len(rows),)](step, rows, depths, counts, span, BUCKETS=buckets, **limits)


@triton.jit
def _copy(step, changes, BLOCK: tl.constexpr):
    """A row with its green list's bonus, and without what its mask forbids."""
    copy = tl.program_id(0)
    row = tl.load(changes.rows + copy)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = at < step.size
    x = tl.load(step.logits + row.to(tl.int64) * step.stride + at, mask=known)
    green, mask = _int(step, row, _GREEN), _int(step, row, _MASK)
    if green >= 0:
        x += _bits(changes, green, at, known) * _float(step, row, _DELTA)
    if mask >= 0:
        x = tl.where(_bits(changes, mask, at, known) != 0, x, float("-inf"))
    tl.store(step.copies + copy.to(tl.int64) * step.size + at, x, mask=known)


@triton.jit
def _penalize(step, changes, ENTRIES: tl.constexpr):
    """Repetition, frequency and presence penalties, then the bias, on some tokens of a row."""
    row = tl.load(changes.owners + tl.program_id(0))
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    id, count = tl.load(changes.ids + at), tl.load(changes.counts + at)
    known = (id >= 0) & (id < step.size)
    place = step.copies + _int(step, row, _COPY).to(tl.int64) * step.size + id
    x = tl.load(place, mask=known)
    repetition = _float(step, row, _REPETITION)
    if repetition != 1:
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        # Infinities would make a row's numbers no numbers.
        repeated = tl.minimum(tl.maximum(repeated, -_GREATEST), _GREATEST)
        x = tl.where(count >= 0, repeated, x)
    x -= _float(step, row, _FREQUENCY) * tl.maximum(count, 0)
    x -= tl.where(count > 0, _float(step, row, _PRESENCE), 0)
    x += tl.load(changes.bias + at)
    mask = _int(step, row, _MASK)
    if mask >= 0:  # once more: what is forbidden may have become a number
        x = tl.where(_bits(changes, mask, id, known) != 0, x, float("-inf"))
    tl.store(place, x, mask=known)


@triton.jit
def _survey(step, BUCKETS: tl.constexpr):
    """What some buckets of a row come to."""
    row = tl.program_id(0)
    bucket, at = _places(tl.program_id(1) * BUCKETS, BUCKETS)
    stats = step.stats + row.to(tl.int64) * 4 * step.buckets + bucket
    there = bucket < step.buckets
    raw = tl.load(step.logits + row.to(tl.int64) * step.stride + at, mask=at < step.size, other=float("-inf"))
    most, mass = _sum_up(raw, 1.0)
    tl.store(stats, most, mask=there)
    tl.store(stats + step.buckets, mass, mask=there)
    most, mass = _sum_up(_numbers(step, row, at), _float(step, row, _TEMPERATURE))
    tl.store(stats + 2 * step.buckets, most, mask=there)
    tl.store(stats + 3 * step.buckets, mass, mask=there)


@triton.jit
def _list(step, rows, depths, counts, span, PARTS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """The depths, in a part of a row, on which its limits may depend."""
    row, part = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    temperature = _float(step, row, _TEMPERATURE)
    most, mass = _stats(step, row, 2, BUCKETS)
    top, weights = _settled(most, mass, temperature)
    top_k, top_p, min_p = _int(step, row, _TOP_K), _float(step, row, _TOP_P), _float(step, row, _MIN_P)
    deepest = _DEEPEST * 1.0
    if top_k > 0:
        # So many buckets have a token of that depth: the k-th of all can't be deeper.
        peaks = step.stats + (row.to(tl.int64) * 4 + 2) * step.buckets
        count = tl.full((1,), 0, tl.int32) + step.buckets
        deepest = _reach(peaks, 0, count, float("inf"), top, top_k.to(tl.float32), True, BUCKETS)
        deepest = tl.div_rn(deepest, temperature)
    elif top_p < 1:
        # Together, deeper tokens have at most half of what top-p leaves away.
        deepest = tl.minimum(deepest, -tl.log(0.5 * (1 - top_p) * tl.sum(weights) / step.size))
    elif _float(step, row, _TYPICAL_P) == 1:
        deepest = tl.minimum(deepest, -tl.log(min_p))
    deepest = tl.minimum(deepest, _GREATEST)
    place = tl.program_id(0) * PARTS + part
    listed = depths + place.to(tl.int64) * span
    count = 0
    for start in range(part * span, tl.minimum((part + 1) * span, step.size), BLOCK):
        depth = _depth(_numbers(step, row, start + tl.arange(0, BLOCK)), top, temperature)
        matters = (depth <= deepest).to(tl.int32)
        tl.store(listed + count + tl.cumsum(matters, 0) - 1, depth, mask=matters != 0)
        count += tl.sum(matters)
    tl.store(counts + place, count)


@triton.jit
def _limit(step, rows, depths, counts, span, BUCKETS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens of a row may come: top-k, top-p, typical-p and min-p, one after the other."""
    row = tl.load(rows + tl.program_id(0))
    most, mass = _stats(step, row, 2, BUCKETS)
    top, weights = _settled(most, mass, _float(step, row, _TEMPERATURE))
    total = tl.sum(weights)
    part = tl.arange(0, PARTS)
    x = depths + tl.program_id(0).to(tl.int64) * PARTS * span
    count = tl.load(counts + tl.program_id(0) * PARTS + part, mask=part * span < step.size, other=0)
    deepest, center, far = float("inf"), 0.0, float("inf")
    top_k, top_p = _int(step, row, _TOP_K), _float(step, row, _TOP_P)
    typical_p, min_p = _float(step, row, _TYPICAL_P), _float(step, row, _MIN_P)
    if top_k > 0:
        deepest = _reach(x, span, count, deepest, center, top_k.to(tl.float32), True, BLOCK)
    if top_p < 1:
        if top_k > 0:
            total, _, _ = _sums(x, span, count, deepest, center, far, BLOCK)
        deepest = tl.minimum(deepest, _reach(x, span, count, deepest, center, top_p * total, False, BLOCK))
    if typical_p < 1:
        # A token's information less the entropy is its depth less the mean depth.
        total, moment, _ = _sums(x, span, count, deepest, center, far, BLOCK)
        center = moment / total
        far = _reach(x, span, count, deepest, center, typical_p * total, False, BLOCK)
    if min_p > 0:
        _, _, least = _sums(x, span, count, deepest, center, far, BLOCK)
        deepest = tl.minimum(deepest, least - tl.log(min_p))
    limits = step.limits + row * 4
    tl.store(limits, deepest)
    tl.store(limits + 1, center)
    tl.store(limits + 2, far)
    tl.store(limits + 3, top)


@triton.jit
def _weigh(step, rows, BUCKETS: tl.constexpr):
    """The masses of some buckets of a row within its limits, relative to the row's largest number."""
    row = tl.load(rows + tl.program_id(0))
    bucket, at = _places(tl.program_id(1) * BUCKETS, BUCKETS)
    top = tl.load(step.limits + row * 4 + 3)
    depth = _within(step, row, _depth(_numbers(step, row, at), top, _float(step, row, _TEMPERATURE)))
    stats = step.stats + row.to(tl.int64) * 4 * step.buckets + bucket
    tl.store(stats + 3 * step.buckets, tl.sum(tl.exp(-depth), 1), mask=bucket < step.buckets)


@triton.jit
def _draw(step, draws, BUCKETS: tl.constexpr):
    """A bucket of a row, a token of it, and the token's log-probability."""
    row = tl.program_id(0)
    way, temperature, key = _int(step, row, _WAY), _float(step, row, _TEMPERATURE), _key(step, row)
    most, mass = _stats(step, row, 2, BUCKETS)
    top, weights = _settled(most, mass, temperature)
    bucket = tl.arange(0, BUCKETS)
    speed = _speed(tl.where(way == _LIMITED, mass, weights), key, -1 - bucket)
    chosen = tl.argmax(tl.where(way == _GREEDY, most.to(tl.float64), speed), 0)
    at = chosen * _BUCKET + tl.arange(0, _BUCKET)
    x = _numbers(step, row, at)
    depth = _depth(x, top, temperature)
    if way == _LIMITED:
        depth = _within(step, row, depth)
    speed = _speed(tl.exp(-depth), key, at)
    id = chosen * _BUCKET + tl.argmax(tl.where(way == _GREEDY, x.to(tl.float64), speed), 0)
    most, mass = _stats(step, row, 0, BUCKETS)
    top, weights = _settled(most, mass, 1.0)
    total = tl.sum(weights)
    is_number = (total > 0) & (total < float("inf"))
    id = tl.where(is_number, tl.minimum(id, step.size - 1), 0)
    rest = tl.log(total)
    logprob = tl.load(step.logits + row.to(tl.int64) * step.stride + id) - top - rest
    tl.store(draws.ids + row, id.to(tl.int64))
    tl.store(draws.said + row, tl.where(is_number, id, -1))
    tl.store(draws.said + tl.num_programs(0) + row, logprob.to(tl.int32, bitcast=True))
    tl.store(draws.norms + row, top + rest)


@triton.jit
def _reach(x, span, count, largest, center, target, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """The least distance from ``center`` within which the listed numbers up to ``largest`` are so many as ``target``,
    or else have that mass as depths; infinite if there is none. Bisection, from one listed number to another."""
    least, most = tl.full((), 0, tl.int32), tl.full((), _INFINITE, tl.int32)
    while least < most:
        middle = least + (most - least) // 2
        mass = tl.zeros((count.shape[0], BLOCK), tl.float32)
        below = tl.zeros((count.shape[0], BLOCK), tl.int32)
        above = below + _INFINITE
        for start in range(0, tl.max(count), BLOCK):
            number = _listed(x, span, count, start, BLOCK)
            distance = tl.abs(number - center).to(tl.int32, bitcast=True)
            distance = tl.where((number < float("inf")) & (number <= largest), distance, _INFINITE)
            inside = distance <= middle
            mass += tl.where(inside, 1.0 if COUNTED else tl.exp(-number), 0)
            below = tl.maximum(below, tl.where(inside, distance, 0))
            above = tl.minimum(above, tl.where(inside, _INFINITE, distance))
        if tl.sum(mass) >= target:
            most = tl.max(below)
        else:
            least = tl.min(above)
    return most.to(tl.float32, bitcast=True)


@triton.jit
def _sums(x, span, count, deepest, center, far, BLOCK: tl.constexpr):
    """Of listed depths that may come: mass, mass times depth, and the least."""
    mass = tl.zeros((count.shape[0], BLOCK), tl.float32)
    moment = tl.zeros((count.shape[0], BLOCK), tl.float32)
    least = mass + float("inf")
    for start in range(0, tl.max(count), BLOCK):
        depth = _listed(x, span, count, start, BLOCK)
        depth = tl.where((depth <= deepest) & (tl.abs(depth - center) <= far), depth, float("inf"))
        weight = tl.exp(-depth)
        mass += weight
        moment += weight * tl.minimum(depth, _DEEPEST)
        least = tl.minimum(least, depth)
    return tl.sum(mass), tl.sum(moment), tl.min(least)


@triton.jit
def _listed(x, span, count, start, BLOCK: tl.constexpr):
    """What each part lists from a place on; infinite behind its end: [parts, BLOCK]."""
    at = start + tl.arange(0, BLOCK)[None, :]
    part = tl.arange(0, count.shape[0])[:, None]
    return tl.load(x + part * span + at, mask=at < count[:, None], other=float("inf"))


@triton.jit
def _within(step, row, depth):
    """Depths of the tokens that may come; infinite for others."""
    limits = step.limits + row * 4
    deepest, center, far = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    return tl.where((depth <= deepest) & (tl.abs(depth - center) <= far), depth, float("inf"))


@triton.jit
def _depth(x, top, temperature):
    """How far numbers are below the largest, at a temperature."""
    return tl.div_rn(top - x, temperature)


@triton.jit
def _sum_up(x, temperature):
    """The largest number of each bucket, and the mass relative to it."""
    most = tl.max(x, 1)
    top = tl.where(most > float("-inf"), most, 0)
    return most, tl.sum(tl.exp((x - top[:, None]) * (1 / temperature)), 1)


@triton.jit
def _stats(step, row, first: tl.constexpr, BUCKETS: tl.constexpr):
    """Largest numbers and masses of a row's buckets: of the logits (0) or of what is drawn from (2)."""
    bucket = tl.arange(0, BUCKETS)
    stats = step.stats + (row.to(tl.int64) * 4 + first) * step.buckets + bucket
    there = bucket < step.buckets
    return tl.load(stats, mask=there, other=float("-inf")), tl.load(stats + step.buckets, mask=there, other=0)


@triton.jit
def _settled(most, mass, temperature):
    """A row's largest number, and what its buckets' masses are relative to that."""
    top = tl.max(most, 0)
    top = tl.where(top > float("-inf"), top, 0)
    return top, mass * tl.exp((most - top) * (1 / temperature))


@triton.jit
def _places(first, BUCKETS: tl.constexpr):
    """Buckets, and their tokens."""
    bucket = first + tl.arange(0, BUCKETS)
    return bucket, bucket[:, None] * _BUCKET + tl.arange(0, _BUCKET)[None, :]


@triton.jit
def _numbers(step, row, at):
    """What a row is drawn from: the logits, or what its request made of them; -inf behind the vocabulary."""
    copy = _int(step, row, _COPY)
    if copy >= 0:
        x = tl.load(step.copies + copy.to(tl.int64) * step.size + at, mask=at < step.size, other=float("-inf"))
    else:
        x = tl.load(step.logits + row.to(tl.int64) * step.stride + at, mask=at < step.size, other=float("-inf"))
    return x


@triton.jit
def _bits(changes, first, token, known):
    """1 for tokens that a list which begins at the byte ``first`` has, 0 for others."""
    return tl.load(changes.bits + first + token // 8, mask=known, other=0).to(tl.int32) >> token % 8 & 1


@triton.jit
def _key(step, row):
    """The 64 bits from which all that decides a row's token follows."""
    low, high = _int(step, row, _SEED), _int(step, row, _SEED_ABOVE)
    seed = low.to(tl.uint32, bitcast=True).to(tl.uint64) | high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    return _mixed(_mixed(seed + _GOLDEN) + (_int(step, row, _POSITION) + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def _speed(weight, key, counter):
    """weight / E, where E is drawn from the unit exponential distribution, as a pure function of (key, counter), by
    SplitMix64 (Steele, Lea & Flood 2014)."""
    x = _mixed(key + counter.to(tl.int64).to(tl.uint64, bitcast=True) * _GOLDEN)
    return weight.to(tl.float64) / -tl.log(((x >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16)


@triton.jit
def _mixed(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


@triton.jit
def _int(step, row, FIELD: tl.constexpr):
    """Of a row's CHOICE."""
    return tl.load(step.choices + row * _WORDS + FIELD)


@triton.jit
def _float(step, row, FIELD: tl.constexpr):
    return _int(step, row, FIELD).to(tl.float32, bitcast=True)
