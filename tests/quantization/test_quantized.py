"""Rounded matrices, and ggml's blocks read as they are."""

import random
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tgi.quantization.gguf import Kept, Stored
from tgi.quantization.quantized import Quantized, common, quantize, stack


def blocks(kind: str, outs: int, inner: int, seed: int) -> Any:
    """Random bytes as a tensor of this type would have; its halves are ordinary numbers."""
    chance = np.random.default_rng(seed)
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = chance.integers(0, 256, (outs * inner // numbers, size), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        raw[:, at : at + 2] = chance.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(-1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("order", [None, ["pairs", 4], ["groups", [4, 2]]])
def test_blocks_are_read_exactly(kind: str, order: Any) -> None:
    stored = Stored(blocks(kind, 16, 512, 0), kind, (16, 512), order)
    for rows in (slice(None), slice(3, 9), slice(1, 16, 2)):
        read = Kept(stored)[rows]
        assert isinstance(read, Quantized)
        assert torch.equal(read.dequantize(), stored[:][rows])
        assert torch.equal(stored[rows], stored[:][rows])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q2_K"])
def test_other_types_are_dequantized(kind: str) -> None:
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    stored = Stored(np.zeros(16 * 512 // numbers * size, np.uint8), kind, (16, 512), None)
    assert isinstance(Kept(stored)[:], torch.Tensor)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_stacked_stays_exact(seed: int) -> None:
    chance = random.Random(seed)
    kinds = [chance.choice(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]) for _ in range(3)]
    parts = [Stored(blocks(kind, 8, 256, seed), kind, (8, 256)) for kind in kinds]
    kept = [read for part in parts if isinstance(read := Kept(part)[:], Quantized)]
    whole = stack(kept, common(kept))
    expected = torch.cat([part[:] for part in parts])
    assert torch.equal(whole.dequantize(), expected)
    assert whole.stored.dtype == torch.uint8 and int(whole.stored.max()) < 1 << whole.bits


@pytest.mark.parametrize(("bits", "most"), [(8, 0.012), (4, 0.14)])
def test_rounding(bits: int, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 192)
    weight[3] = 0
    rounded = quantize(weight, bits)
    assert rounded is not None and rounded.bits == bits
    error = rounded.dequantize() - weight
    assert torch.equal(rounded.dequantize()[3], weight[3])
    assert error.norm() / weight.norm() < most / 1.4
    assert error.abs().max() < 3 * most


def test_four_bits_beat_the_plain_rule() -> None:
    """ggml's Q4_0 takes the extreme to -8; choosing among a few scales must not lose to it."""
    torch.manual_seed(1)
    weight = torch.randn(128, 256)
    rounded = quantize(weight, 4)
    assert rounded is not None
    plain = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(plain, gguf.GGMLQuantizationType.Q4_0))
    assert (rounded.dequantize() - weight).norm() < 0.97 * (theirs - weight).norm()


def test_columns_that_divide_into_no_groups() -> None:
    assert quantize(torch.randn(8, 20), 8) is None
    rounded = quantize(torch.randn(8, 64), 4)
    assert rounded is not None
    for columns, group in ((slice(32, 64), 32), (slice(0, 16), 16), (slice(16, 64), 16)):
        part = rounded.columns(columns)
        assert part.group == group
        assert torch.equal(part.dequantize(), rounded.dequantize()[:, columns])
