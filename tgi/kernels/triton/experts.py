"""Mixtures of experts: a step's pairs of a token and one of its experts are put in the order of experts, and each
expert's rows multiplied by its matrix, all in one launch (Gale et al., arXiv 2211.15841).

Nothing waits for the host: grids follow from the numbers of pairs and experts, and which rows a program has is read in
device memory. A row's sums are made in one order of columns whatever the other rows are.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.coded import Coded
from tgi.kernels.triton.linear import columns_of, constants_of, matrix_of, numbers_of, words_of
from tgi.kernels.triton.rows import active
from tgi.kernels.triton.tiles import tile


@dataclass(frozen=True, slots=True)
class Matrices:
    """Of a layer's experts, one behind the other."""

    weight: torch.Tensor | Coded
    """[experts · outs, inner]; plain: contiguous, in the numbers of activations."""
    experts: int
    order: torch.Tensor | None = None
    """int32 [experts, inner]: the input that each column is of, where they are not in the order of inputs."""

    @property
    def outs(self) -> int:
        """Of an expert."""
        weight = self.weight
        return (weight.outs if isinstance(weight, Coded) else len(weight)) // self.experts


@dataclass(frozen=True, slots=True)
class Pairs:
    """A step's pairs of a token and one of its experts, in the order of experts."""

    first: torch.Tensor
    """int32 [experts + 1]: where each expert's begin."""
    pair: torch.Tensor
    """int32 [pairs]: which one each is, as tokens have them one behind the other."""
    per_token: int


def route(
    products: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    per_token: int,
    score: str,
    groups: int = 1,
    groups_per_token: int = 1,
    group_best: int = 1,
    norm: float = 0.0,
    norm_least: float = 0.0,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [tokens, experts], [experts] → weights float32, experts int32: each [tokens, per_token], the best first.

    The options are those of core/model_config.py's Routing, but for the sparse mixer. Of equal scores the first is
    better. Whatever the products are, experts are some that there are.
    """
    assert products.stride(1) == 1 and score in ("softmax", "sigmoid")
    tokens, experts = products.shape
    weights = torch.empty(tokens, per_token, dtype=torch.float32, device=products.device)
    chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=products.device)
    _route[(tokens,)](
        *(products, bias, weights, chosen, products.stride(0), experts, norm_least, factor),
        SIGMOID=score == "sigmoid",
        NORM=norm,
        PER_TOKEN=per_token,
        GROUPS=groups,
        GROUPS_PER_TOKEN=groups_per_token,
        GROUP_BEST=group_best,
        EXPERTS=max(triton.next_power_of_2(experts), 16),
        num_warps=1,  # they need not wait for each other after each comparison
    )
    return weights, chosen


def arrange(chosen: torch.Tensor, experts: int) -> Pairs:
    """Of ``chosen``, int32 or int64 [tokens, per_token]; pairs of no expert (-1) are left out."""
    chosen = chosen.contiguous()
    count = chosen.numel()
    first = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    pair = torch.empty(count, dtype=torch.int32, device=chosen.device)
    _arrange[(experts + 1,)](chosen, first, pair, count, **tile("experts, arrange", chosen.device))
    return Pairs(first, pair, chosen.shape[1])


def gate(x: torch.Tensor, matrices: Matrices, pairs: Pairs, activation: str, *, fixed: bool = False) -> torch.Tensor:
    """``activation`` of the first half of the product times its second: [tokens, inner] → [pairs, outs / 2], in the
    order of ``pairs``. ``fixed``: a row's result is bit-equal however many rows there are."""
    return _multiply(x, matrices, pairs, activation, fixed=fixed)


def linear(x: torch.Tensor, matrices: Matrices, pairs: Pairs, *, fixed: bool = False) -> torch.Tensor:
    """[pairs, inner], in the order of ``pairs`` → [pairs, outs], in the order of tokens. ``fixed``: as for gate."""
    return _multiply(x, matrices, pairs, None, fixed=fixed)


def mix(x: torch.Tensor, weights: torch.Tensor, into: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
    """``factor`` times Σ weights[token, i] · x[token · per_token + i], summed in float32; added to ``into``
    [tokens, size] if that is given. ``weights``: float32 [tokens, per_token]."""
    tokens, per_token = weights.shape
    size = x.shape[1]
    out = x.new_empty(tokens, size) if into is None else into
    constants = tile("experts, mix", x.device)
    _mix[tokens, triton.cdiv(size, constants["BLOCK"])](
        *(x.contiguous(), weights.contiguous(), out, out.stride(0), factor, size),
        PER_TOKEN=per_token,
        ADD=into is not None,
        **constants,
    )
    return out


_FEW = 16
"""Rows of an expert, on average, up to which tiles are for few: the fewest that tensor cores multiply."""


def _multiply(
    x: torch.Tensor, matrices: Matrices, pairs: Pairs, activation: str | None, *, fixed: bool
) -> torch.Tensor:
    # With few rows all time goes into reading matrices: a program has 48 KB of them under way, and a multiprocessor has
    # two programs. Many rows take tiles as square as registers allow, so that what is read serves many products. Coded
    # matrices are taken as in linear.py, but with fewer loads under way where rows are many: more would spill.
    x = x.contiguous()
    weight, outs, experts, count = matrices.weight, matrices.outs, matrices.experts, len(pairs.pair)
    kind = "coded" if isinstance(weight, Coded) else "plain"
    if x.dtype == torch.float32:  # which tensor cores don't multiply
        kind += " of float32"
    elif fixed or count > _FEW * experts:
        kind += " of many rows"
    constants = tile(f"experts, {kind}", x.device)
    rows = constants["ROWS"]
    grid = most_tiles(count, experts, rows), triton.cdiv(outs, constants["OUTS"])
    out = x.new_empty(count, outs if activation is None else outs // 2)
    common = x, pairs.first, pairs.pair, out, experts, outs
    shape = {
        "PER_TOKEN": 0 if activation is None else pairs.per_token,
        "ACTIVATION": activation,
        "EXPERTS": triton.next_power_of_2(experts),
    }
    if isinstance(weight, Coded):
        _coded[grid](*common, matrix_of(weight), matrices.order, **shape, **constants_of(weight, constants))
    else:
        _plain[grid](*common, weight, weight.shape[1], **shape, **constants)
    return out


def most_tiles(count: int, experts: int, rows: int) -> int:
    """Of so many ``rows`` that ``count`` pairs can fill or begin."""
    some = min(experts, count)
    return some + (count - some) // rows  # each expert that has any pairs has a tile, and another for so many more


@triton.jit
def _route(
    products,
    bias,
    weights,
    chosen,
    stride,
    experts,
    norm_least,
    factor,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PER_TOKEN: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    there = each < experts
    product = tl.load(products + token.to(tl.int64) * stride + each, mask=there, other=float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(product)
    else:
        scores = tl.exp(product - tl.max(product, 0))
        scores /= tl.sum(scores, 0)
    liked = scores
    if bias is not None:
        liked += tl.load(bias + each, mask=there, other=0)
    # What is no number would be the best or not, as it comes.
    liked = tl.where(there & (liked == liked), liked, float("-inf"))
    if GROUPS > 1:
        group = each // (experts // GROUPS)
        number = tl.arange(0, triton.next_power_of_2(GROUPS))
        left = tl.where(group[None, :] == number[:, None], liked[None, :], float("-inf"))
        good = tl.where(number < GROUPS, 0.0, float("-inf"))
        for _ in tl.static_range(GROUP_BEST):
            good += tl.max(left, 1)
            left = tl.where(each[None, :] == tl.argmax(left, 1)[:, None], float("-inf"), left)
        taken = each < 0
        for _ in tl.static_range(GROUPS_PER_TOKEN):
            best = tl.argmax(good, 0)
            taken |= group == best
            good = tl.where(number == best, float("-inf"), good)
        liked = tl.where(taken, liked, float("-inf"))
    place = tl.arange(0, triton.next_power_of_2(PER_TOKEN))
    found = place * 0
    weight = found.to(tl.float32)
    for index in tl.static_range(PER_TOKEN):
        best = tl.argmax(liked, 0)
        found = tl.where(place == index, best, found)
        weight = tl.where(place == index, tl.sum(tl.where(each == best, scores, 0), 0), weight)
        liked = tl.where(each == best, float("-inf"), liked)
    if NORM == 1:
        weight /= tl.maximum(tl.sum(weight, 0), norm_least)
    elif NORM > 0:
        some = weight > 0
        total = tl.sum(tl.where(some, tl.exp(tl.log(tl.where(some, weight, 1.0)) * NORM), 0), 0)
        weight /= tl.maximum(tl.exp(tl.log(total) / NORM), norm_least)
    at = token * PER_TOKEN + place
    tl.store(weights + at, weight * factor, mask=place < PER_TOKEN)
    tl.store(chosen + at, found, mask=place < PER_TOKEN)


@triton.jit(do_not_specialize=["count"])
def _arrange(chosen, first, pair, count, BLOCK: tl.constexpr):
    # The one behind the last expert only writes where that ends.
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    others = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        choice = tl.load(chosen + start + at, mask=start + at < count, other=expert)
        others += (choice < expert).to(tl.int32)
    place = tl.sum(others, 0)
    tl.store(first + expert, place)
    for start in range(0, count, BLOCK):
        own = (tl.load(chosen + start + at, mask=start + at < count, other=-1) == expert).to(tl.int32)
        tl.store(pair + place + tl.cumsum(own, 0) - 1, start + at, mask=own > 0)
        place += tl.sum(own, 0)


@triton.jit
def tile_rows(first, pair, experts, ROWS: tl.constexpr, PER_TOKEN: tl.constexpr, EXPERTS: tl.constexpr):
    """A tile's expert, ``experts`` or more if there is no such tile; the rows that it reads and writes, and which of
    them there are."""
    number = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    begins = tl.load(first + each, mask=each < experts, other=0)
    ends = tl.load(first + each + 1, mask=each < experts, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, 0) <= number
    expert = tl.sum(before.to(tl.int32), 0)
    begin = tl.sum(tl.where(each == expert, begins, 0), 0)
    end = tl.sum(tl.where(each == expert, ends, 0), 0)
    place = begin + (number - tl.sum(tl.where(before, tiles, 0), 0)) * ROWS + tl.arange(0, ROWS)
    known = place < end
    own = tl.load(pair + place, mask=known, other=0)
    if PER_TOKEN > 0:
        return expert, (own // PER_TOKEN).to(tl.int64), place.to(tl.int64), known
    return expert, place.to(tl.int64), own.to(tl.int64), known


@triton.jit
def _outs(expert, outs, OUTS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rows of the matrices: a run of an expert's, or half a run of its gates and the same of what they are for."""
    at = tl.arange(0, OUTS)
    if ACTIVATION is None:
        return expert * outs + tl.program_id(1) * OUTS + at
    HALF: tl.constexpr = OUTS // 2
    return expert * outs + at // HALF * (outs // 2) + tl.program_id(1) * HALF + at % HALF


@triton.jit
def _store(out, total, target, known, outs, ACTIVATION: tl.constexpr):
    """``total``: float32 [rows of the matrices, rows]."""
    OUTS: tl.constexpr = total.shape[0]
    ROWS: tl.constexpr = total.shape[1]
    if ACTIVATION is None:
        column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    else:
        HALF: tl.constexpr = OUTS // 2
        first, second = total.reshape(2, HALF, ROWS).permute(1, 2, 0).split()
        total = active(first, ACTIVATION) * second
        column = tl.program_id(1) * HALF + tl.arange(0, HALF)
        outs = outs // 2
    tl.store(out + target[None, :] * outs + column[:, None], total, mask=(column < outs)[:, None] & known[None, :])


@triton.jit
def _plain(
    x,
    first,
    pair,
    out,
    experts,
    outs,
    weight,
    inner,
    PER_TOKEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    expert, source, target, known = tile_rows(first, pair, experts, ROWS, PER_TOKEN, EXPERTS)
    if expert >= experts:
        return
    rows = _outs(expert, outs, OUTS, ACTIVATION)
    there = rows < experts * outs
    x += source[None, :] * inner
    weight += rows.to(tl.int64)[:, None] * inner
    # Transposed: tensor cores take many outputs, and any few rows of x.
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for start in range(0, inner, INNER):
        column = start + tl.arange(0, INNER)
        numbers = tl.load(weight + column[None, :], mask=there[:, None] & (column < inner)[None, :], other=0)
        inputs = tl.load(x + column[:, None], mask=(column < inner)[:, None] & known[None, :], other=0)
        total = tl.dot(numbers, inputs, total, input_precision="ieee")
    _store(out, total, target, known, outs, ACTIVATION)


@triton.jit
def _coded(
    x,
    first,
    pair,
    out,
    experts,
    outs,
    matrix,
    order,
    PER_TOKEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    expert, source, target, known = tile_rows(first, pair, experts, ROWS, PER_TOKEN, EXPERTS)
    if expert >= experts:
        return
    rows = _outs(expert, outs, OUTS, ACTIVATION)
    x += source[None, :] * matrix.inner
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for start in range(0, matrix.width, WORDS):
        words = words_of(matrix, rows, start, WORDS)
        for part in tl.static_range(32 // BITS):
            columns, there = columns_of(matrix, start, part, WORDS)
            if order is not None:
                columns = tl.load(order + expert * matrix.inner + columns, mask=there, other=0)
            inputs = tl.load(x + columns[:, None], mask=there[:, None] & known[None, :], other=0)
            weight = numbers_of(matrix, words, rows, start, part, BITS, ZERO, EXPONENT, GROUP, SPAN)
            total = tl.dot(weight.to(inputs.dtype), inputs, total, input_precision="ieee")
    _store(out, total, target, known, outs, ACTIVATION)


@triton.jit
def _mix(x, weights, out, stride, factor, size, PER_TOKEN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + number
        total += tl.load(weights + pair) * tl.load(x + pair * size + column, mask=known, other=0).to(tl.float32)
    total *= factor
    out += token * stride + column
    if ADD:
        total += tl.load(out, mask=known, other=0).to(tl.float32)
    tl.store(out, total, mask=known)
