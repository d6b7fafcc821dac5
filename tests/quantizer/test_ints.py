"""Integers, and the words that files hold them in, read back number by number as the formats' authors describe them."""

import pytest
import torch

from tgi.quantizer.ints import Grid, Ints, awq_tensors, gptq_tensors

OUTS, INNER, GROUP = 16, 64, 32


def ints(bits: int) -> Ints:
    torch.manual_seed(0)
    stored = torch.randint(0, 1 << bits, (OUTS, INNER), dtype=torch.uint8)
    zero = torch.randint(1, 1 << bits, (OUTS, INNER // GROUP), dtype=torch.uint8)
    return Ints(bits, stored, torch.rand(OUTS, INNER // GROUP).half(), zero)


def bits_of(word: torch.Tensor, first: int, bits: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> first & (1 << bits) - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_s_words_run_along_the_inputs_and_zeros_are_less_one(bits: int) -> None:
    made, each = ints(bits), 32 // bits
    tensors = gptq_tensors(made)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (INNER // each, OUTS),
        "qzeros": (INNER // GROUP, OUTS // each),
        "scales": (INNER // GROUP, OUTS),
        "g_idx": (INNER,),
    }
    for out in range(OUTS):
        for i in range(INNER):
            group = int(tensors["g_idx"][i])
            stored = bits_of(tensors["qweight"][i // each, out], i % each * bits, bits)
            zero = bits_of(tensors["qzeros"][group, out // each], out % each * bits, bits) + 1
            value = (stored - zero) * float(tensors["scales"][group, out])
            assert value == pytest.approx(float(made.values[out, i]), abs=1e-6)


def test_awq_s_words_run_along_the_outputs_even_ones_first() -> None:
    made = ints(4)
    tensors = awq_tensors(made)
    assert tensors["qweight"].shape == (INNER, OUTS // 8) and tensors["qzeros"].shape == (INNER // GROUP, OUTS // 8)
    for out in range(OUTS):
        place = (0, 2, 4, 6, 1, 3, 5, 7).index(out % 8) * 4
        for i in range(INNER):
            stored = bits_of(tensors["qweight"][i, out // 8], place, 4)
            zero = bits_of(tensors["qzeros"][i // GROUP, out // 8], place, 4)
            value = (stored - zero) * float(tensors["scales"][i // GROUP, out])
            assert value == pytest.approx(float(made.values[out, i]), abs=1e-6)


@pytest.mark.parametrize("sym", [True, False])
def test_a_grid_leaves_extremes_away_where_that_costs_less(sym: bool) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(200, 4, GROUP) + (0 if sym else 0.5)

    def error(grid: Grid) -> torch.Tensor:
        return (grid.values(grid.round(blocks)) - blocks).square().sum(-1)

    whole = Grid.between(blocks.amin(-1), blocks.amax(-1), 4, sym=sym)
    best = Grid.fit(blocks, 4, sym=sym)
    assert (error(best) <= error(whole) + 1e-5).all() and error(best).sum() < 0.95 * error(whole).sum()
    assert torch.equal(best.scale, best.scale.half().float())


def test_groups_of_zeros_and_of_one_sign() -> None:
    for block in (torch.zeros(1, 1, GROUP), torch.linspace(1, 2, GROUP).view(1, 1, -1)):
        for sym in (True, False):
            grid = Grid.fit(block, 8, sym=sym)
            assert (grid.values(grid.round(block)) - block).abs().max() < 0.02
