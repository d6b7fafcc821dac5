"""Products with coded matrices, which are read as they are.

One row: each program makes a few outputs, and adds up their columns from end to end. A few rows: the tensor cores
multiply tiles, whose numbers are made in registers; columns are split among programs until the device is full, and what
these make is added in a fixed order. More: the matrix is made floating point, a part of it at a time, and torch
multiplies it. Where rows must not know of each other, all are multiplied in tiles of one size.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.coded import Coded
from tgi.kernels.triton.split import AT_ONCE, add, split, store
from tgi.kernels.triton.tiles import tile

_FEW = 16
_MANY = 64
"""Rows of the smallest tile and of the largest: powers of two between them, to which rows are filled up."""
_FIXED = 64
"""Rows of a tile where the number of all rows must not matter."""
_SLAB = 1 << 24
"""Numbers that are made floating point at once: 32 MB, which are in the cache when they are multiplied."""


def linear(
    x: torch.Tensor,
    weight: Coded,
    bias: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    factor: float = 1.0,
    *,
    fixed: bool = False,
) -> torch.Tensor:
    """[tokens, inner] → [tokens, outs] in x's own numbers; sums are in float32. ``bias``: [outs]. ``factor`` times the
    result is added to ``into``, contiguous, if that is given.

    A row's result doesn't depend on what the other rows are, but on whether there are more than none, 16, 32, 64; if
    ``fixed``, not on that either.
    """
    x = (x if weight.order is None else x[:, weight.order]).contiguous()
    out = x.new_empty(len(x), weight.outs) if into is None else into
    added = None if into is None else factor
    if fixed:
        for rows in range(0, len(x), AT_ONCE):
            own = slice(rows, rows + AT_ONCE)
            _linear_tiles(x[own], weight, bias, out[own], added, _FIXED)
    elif len(x) == 1:
        # Fewer words than threads, so that each thread loads what of x and of scales goes with its words.
        constants = constants_of(weight, tile("coded, one row", x.device))
        grid = (triton.cdiv(weight.outs, constants["OUTS"]),)
        _row[grid](x, matrix_of(weight), bias, out, added, **constants)
    elif len(x) > _MANY or x.dtype == torch.float32:  # which tensor cores don't multiply
        _linear_floating(x, weight, bias, out, added)
    else:
        _linear_tiles(x, weight, bias, out, added, max(triton.next_power_of_2(len(x)), _FEW))
    return out


def _linear_tiles(
    x: torch.Tensor, weight: Coded, bias: torch.Tensor | None, out: torch.Tensor, factor: float | None, rows: int
) -> None:
    constants = constants_of(weight, tile(f"coded, {rows} rows", x.device))
    across, along = triton.cdiv(weight.outs, constants["OUTS"]), triton.cdiv(weight.width, constants["WORDS"])
    ways, each = split(across, along, x.device)
    parts = out if ways == 1 else x.new_empty(ways, *out.shape, dtype=torch.float32)
    _tile[across, ways, triton.cdiv(len(x), rows)](
        x,
        matrix_of(weight),
        bias if ways == 1 else None,
        parts,
        factor if ways == 1 else None,
        len(x),
        each * constants["WORDS"],
        ROWS=rows,
        **constants,
    )
    if ways > 1:
        add(parts, bias, out, factor)


def _linear_floating(
    x: torch.Tensor, weight: Coded, bias: torch.Tensor | None, out: torch.Tensor, factor: float | None
) -> None:
    beta, alpha = (0, 1.0) if factor is None else (1, factor)
    slab = max(_SLAB // weight.inner // _FEW, 1) * _FEW
    for first in range(0, weight.outs, slab):
        part = floating(weight, first, slab, x.dtype)
        out[:, first : first + slab].addmm_(x, part.T, beta=beta, alpha=alpha)
    if bias is not None:
        out.add_(bias, alpha=alpha)


def floating(weight: Coded, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` rows of the matrix from ``first`` on, or what there is of them: [rows, inner], in its own order of
    columns."""
    count = min(count, weight.outs - first)
    out = torch.empty(count, weight.inner, dtype=dtype, device=weight.words.device)
    constants = constants_of(weight, tile("coded, floating", out.device))
    grid = triton.cdiv(count, constants["OUTS"]), triton.cdiv(weight.width, constants["WORDS"])
    _float[grid](matrix_of(weight), out, first, first + count, **constants)
    return out


class _Matrix(NamedTuple):
    """What kernels are told of a matrix as they are called; see Coded."""

    words: torch.Tensor
    scale: torch.Tensor
    min: torch.Tensor | None
    factor: torch.Tensor | None
    table: torch.Tensor | None
    outs: int
    inner: int
    width: int


def matrix_of(weight: Coded) -> _Matrix:
    parts = weight.words, weight.scale, weight.min, weight.factor, weight.table
    return _Matrix(*parts, weight.outs, weight.inner, weight.width)


def constants_of(weight: Coded, taken: Mapping[str, int]) -> dict[str, int]:
    """What they are compiled for. ``taken``: OUTS rows and WORDS of each at once, and Triton's own."""
    return {
        **taken,
        "BITS": weight.bits,
        "ZERO": weight.zero,
        "EXPONENT": weight.exponent,
        "GROUP": weight.group if weight.group < weight.inner else 0,
        "SPAN": min(weight.span, taken["WORDS"]),
    }


@triton.jit
def _row(
    x,
    matrix,
    bias,
    out,
    factor,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    OUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    rows = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    total = tl.zeros((OUTS, WORDS // SPAN, SPAN // 4), tl.float32)
    for start in range(0, matrix.width, WORDS):
        words = words_of(matrix, rows, start, WORDS)
        for part in tl.static_range(32 // BITS):
            columns, known = columns_of(matrix, start, part, WORDS)
            inputs = tl.load(x + columns, mask=known, other=0).to(tl.float32)
            # Four at a time, which are one thread's, so that one product with a scale does for them.
            numbers = _numbers(matrix, words, part, BITS, ZERO, EXPONENT) * inputs[None, :]
            numbers = tl.sum(numbers.reshape(OUTS, WORDS // SPAN, SPAN // 4, 4), 3)
            total += numbers * _scales(matrix, rows, start, part, GROUP, SPAN, WORDS)[:, :, None]
            if matrix.min is not None:
                least = _of_spans(matrix.min, matrix, rows, start, part, GROUP, SPAN, WORDS)
                total += tl.sum(inputs.reshape(1, WORDS // SPAN, SPAN // 4, 4), 3) * least[:, :, None]
    result = tl.sum(tl.sum(total, 2), 1)
    if bias is not None:
        result += tl.load(bias + rows, mask=rows < matrix.outs, other=0).to(tl.float32)
    store(out + rows, result, factor, rows < matrix.outs)


@triton.jit(do_not_specialize=["tokens"])
def _tile(
    x,
    matrix,
    bias,
    out,
    factor,
    tokens,
    share,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    OUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    # Transposed: tensor cores take many outputs at once from registers, where they are made, and any few rows of x.
    rows = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, matrix.width), WORDS):
        words = words_of(matrix, rows, start, WORDS)
        for part in tl.static_range(32 // BITS):
            columns, known = columns_of(matrix, start, part, WORDS)
            at = token[None, :] * matrix.inner + columns[:, None]
            inputs = tl.load(x + at, mask=known[:, None] & (token < tokens)[None, :], other=0)
            weight = numbers_of(matrix, words, rows, start, part, BITS, ZERO, EXPONENT, GROUP, SPAN)
            total = tl.dot(weight.to(inputs.dtype), inputs, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < matrix.outs, other=0).to(tl.float32)[:, None]
    at = (tl.program_id(1) * tokens + token)[None, :] * matrix.outs + rows[:, None]
    store(out + at, total, factor, (rows < matrix.outs)[:, None] & (token < tokens)[None, :])


@triton.jit
def _float(
    matrix,
    out,
    begin,
    end,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    OUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    rows = begin + tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    start = tl.program_id(1) * WORDS
    words = words_of(matrix, rows, start, WORDS)
    for part in tl.static_range(32 // BITS):
        columns, known = columns_of(matrix, start, part, WORDS)
        weight = numbers_of(matrix, words, rows, start, part, BITS, ZERO, EXPONENT, GROUP, SPAN)
        at = (rows - begin)[:, None] * matrix.inner + columns[None, :]
        tl.store(out + at, weight, mask=(rows < end)[:, None] & known[None, :])


@triton.jit
def words_of(matrix, rows, start, WORDS: tl.constexpr):
    """Of rows, from ``start`` on."""
    place = start + tl.arange(0, WORDS)
    at = rows.to(tl.int64)[:, None] * matrix.width + place[None, :]
    return tl.load(matrix.words + at, mask=(rows < matrix.outs)[:, None] & (place < matrix.width)[None, :], other=0)


@triton.jit
def columns_of(matrix, start, part, WORDS: tl.constexpr):
    """Those that the words from ``start`` on have of a part, and which of them there are."""
    place = start + tl.arange(0, WORDS)
    columns = part * matrix.width + place
    return columns, (place < matrix.width) & (columns < matrix.inner)


@triton.jit
def _numbers(matrix, words, part: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, EXPONENT: tl.constexpr):
    """What the codes of a part mean, without scale: float32."""
    if matrix.table is not None:
        code = ((words >> (BITS * part)) & (2**BITS - 1)).reshape(words.shape[0] * words.shape[1])
        return tl.gather(tl.load(matrix.table + tl.arange(0, 16)), code, 0).reshape(words.shape[0], words.shape[1])
    if EXPONENT > 0:
        # To the upper end, and from there as far as float16's exponent is longer. That leaves copies of the sign.
        moved = (words << (32 - BITS - BITS * part)) >> (5 - EXPONENT)
        moved &= ((2 ** (BITS - 1) - 1) << (32 - BITS - (5 - EXPONENT))) - 2**31
        return (moved >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # A code stays where it is, as bits of a mantissa: of the power of two to which it adds just itself there. That is
    # cheaper than to move and convert it.
    lowest: tl.constexpr = BITS * part % 16
    if BITS * part >= 16:
        words = words >> 16
    power: tl.constexpr = 23 - lowest
    number = (words & ((2**BITS - 1) << lowest)) | ((127 + power) << 23)
    return number.to(tl.float32, bitcast=True) - (2**power + ZERO)


@triton.jit
def _of_spans(
    values, matrix, rows, start, part: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr
):
    """What ``values`` [groups, outs] have for each span of a part: float32 [rows, spans]."""
    first = part * matrix.width + start + SPAN * tl.arange(0, WORDS // SPAN)
    group = first // GROUP if GROUP > 0 else first * 0
    known = (rows < matrix.outs)[:, None] & (first < matrix.inner)[None, :]
    return tl.load(values + group[None, :] * matrix.outs + rows[:, None], mask=known, other=0).to(tl.float32)


@triton.jit
def _scales(matrix, rows, start, part: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr):
    """Of the spans of a part: float32 [rows, spans]."""
    scales = _of_spans(matrix.scale, matrix, rows, start, part, GROUP, SPAN, WORDS)
    if matrix.factor is not None:
        scales *= tl.load(matrix.factor + rows, mask=rows < matrix.outs, other=0)[:, None]
    return scales


@triton.jit
def numbers_of(
    matrix,
    words,
    rows,
    start,
    part: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The numbers of a part, whose words from ``start`` on are given: float32."""
    OUTS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    numbers = _numbers(matrix, words, part, BITS, ZERO, EXPONENT).reshape(OUTS, WORDS // SPAN, SPAN)
    numbers *= _scales(matrix, rows, start, part, GROUP, SPAN, WORDS)[:, :, None]
    if matrix.min is not None:
        numbers += _of_spans(matrix.min, matrix, rows, start, part, GROUP, SPAN, WORDS)[:, :, None]
    return numbers.reshape(OUTS, WORDS)
