"""Kernels that work on one row of activations at a time: norms, the residual add before a norm, activations.

What is in a kernel is computed in float32 and rounded once, when it is stored. No row knows of another.
"""

import torch
import triton
import triton.language as tl

from tgi.kernels.triton.tiles import tile


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    center: bool = False,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """[rows, width] → x / rms(x) · weight + bias, or with ``center`` (x - mean) / deviation · weight + bias; written to
    ``out``, which may be ``x``, or added to it.

    Rows may lie apart. ``weight``, ``bias``: [width], or [parts, size]: rows are as many parts, each normed by itself.
    """
    assert x.stride(1) == 1 and x.shape[1] == weight.numel() and weight.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    size = weight.shape[-1]
    _norm[len(x), weight.numel() // size](
        *(x, weight, bias, out, x.stride(0), out.stride(0), size, eps), CENTER=center, ADD=add, **_whole(size, x.device)
    )
    return out


def add_norm(
    into: torch.Tensor,
    x: torch.Tensor,
    factor: float,
    weight: torch.Tensor,
    eps: float,
    behind: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Add ``factor · x`` to ``into``, both contiguous [rows, size], and return into / rms(into) · weight.

    ``behind``: weight and eps of an RMSNorm of x, which is added in its stead.
    """
    assert into.is_contiguous() and x.is_contiguous() and into.shape == x.shape
    out = torch.empty_like(into)
    size = into.shape[1]
    behind_weight, behind_eps = behind or (None, 0.0)
    _add_norm[(len(x),)](
        *(into, x, factor, weight, eps, behind_weight, behind_eps, out, size), **_whole(size, x.device)
    )
    return out


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation`` of a contiguous x, in its place."""
    return _activated(x, x, activation, gated=False)


def gated(product: torch.Tensor, activation: str) -> torch.Tensor:
    """Contiguous [rows, 2 · size] → [rows, size]: ``activation`` of the first half times the second."""
    out = product.new_empty(len(product), product.shape[1] // 2)
    return _activated(product, out, activation, gated=True)


def _activated(x: torch.Tensor, out: torch.Tensor, activation: str, *, gated: bool) -> torch.Tensor:
    assert x.is_contiguous()
    rows, size = out.shape
    constants = tile("activation", x.device)
    grid = rows, triton.cdiv(size, constants["BLOCK"])
    _activation[grid](x, out, size, ACTIVATION=activation, GATED=gated, **constants)
    return out


def float8(x: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous [rows, size] → float8_e4m3fn [rows, size] and float32 [rows, groups], whose product it nearly is: the
    largest number of each of a row's equal parts becomes the format's largest."""
    assert x.is_contiguous() and x.shape[1] % groups == 0
    out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), groups, dtype=torch.float32)
    size = x.shape[1] // groups
    _float8[len(x), groups](x, out, scale, size, groups, **_whole(size, x.device))
    return out, scale


def _whole(size: int, device: torch.device) -> dict[str, int]:
    """Constants of a kernel whose programs hold a row of ``size``."""
    block = triton.next_power_of_2(size)
    warps = block // (32 * tile("norm", device)["NUMBERS"])
    return {"BLOCK": block, "num_warps": min(max(warps, 1), 32)}


@triton.jit
def _norm(
    x,
    weight,
    bias,
    out,
    x_stride,
    out_stride,
    size,
    eps,
    CENTER: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * size + tl.arange(0, BLOCK)
    known = tl.arange(0, BLOCK) < size
    values = tl.load(x + row * x_stride + column, mask=known, other=0).to(tl.float32)
    values = _normed(values, weight, bias, column, known, size, eps, CENTER)
    out += row * out_stride + column
    if ADD:
        values += tl.load(out, mask=known, other=0).to(tl.float32)
    tl.store(out, values, mask=known)


@triton.jit
def _add_norm(into, x, factor, weight, eps, behind_weight, behind_eps, out, size, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    known = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    values = tl.load(x + at, mask=known, other=0).to(tl.float32)
    if behind_weight is not None:
        values = _normed(values, behind_weight, None, column, known, size, behind_eps, False)
    total = tl.load(into + at, mask=known, other=0).to(tl.float32) + values * factor
    # What is normed is what the next block finds in the stream.
    total = total.to(into.dtype.element_ty)
    tl.store(into + at, total, mask=known)
    values = _normed(total.to(tl.float32), weight, None, column, known, size, eps, False)
    tl.store(out + at, values, mask=known)


@triton.jit
def _normed(values, weight, bias, column, known, size, eps, CENTER: tl.constexpr):
    """Of a row, which is 0 where it isn't ``known``."""
    if CENTER:
        values = tl.where(known, values - tl.sum(values, 0) / size, 0)
    values *= tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    values *= tl.load(weight + column, mask=known, other=0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + column, mask=known, other=0).to(tl.float32)
    return values


@triton.jit
def _float8(x, out, scale, size, groups, BLOCK: tl.constexpr):
    part = tl.program_id(0).to(tl.int64) * groups + tl.program_id(1)
    known = tl.arange(0, BLOCK) < size
    at = part * size + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=known, other=0).to(tl.float32)
    most = tl.max(tl.abs(values), 0)
    own = tl.where(most > 0, most / 448, 1)
    tl.store(scale + part, own)
    tl.store(out + at, values / own, mask=known)


@triton.jit
def _activation(x, out, size, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < size
    x += row * (2 * size if GATED else size) + column
    values = active(tl.load(x, mask=known, other=0).to(tl.float32), ACTIVATION)
    if GATED:
        values *= tl.load(x + size, mask=known, other=0).to(tl.float32)
    tl.store(out + row * size + column, values, mask=known)


@triton.jit
def active(x, ACTIVATION: tl.constexpr):
    """``activation`` of float32 numbers."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        return x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    positive = tl.where(x < 0, 0.0, x)
    return positive * positive if ACTIVATION == "relu2" else positive
