"""The linear kernel against float64 products of what its panels say they hold, for every instruction set."""

import random

import pytest
import torch

from tests.kernels.conftest import native
from tgi.core.model_config import Activation
from tgi.kernels.library import Library
from tgi.kernels.linear import linear
from tgi.kernels.ops import Act, Finish, Form
from tgi.kernels.panels import Panels, pack, pack_codes, pack_float8, pack_quantized
from tgi.kernels.rows import embed, layer_norm, quantize, rms_norm
from tgi.quantization.base import activate
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.quantized import Quantized

pytestmark = native

ACTS: dict[Act, Activation] = {
    Act.SILU: "silu",
    Act.GELU_TANH: "gelu_tanh",
    Act.GELU: "gelu",
    Act.RELU: "relu",
    Act.RELU2: "relu2",
}
KINDS = (
    *("fp32", "bf16", "int8", "int8 with minima", "int4", "int4 with minima", "int4 in float32 scales"),
    *("e4m3", "e4m3 in groups", "e5m2 in groups", "codes", "codes in float16 scales with factors"),
)
TABLE = torch.linspace(-0.8, 1, 16) ** 3
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def random_quantized(outs: int, inner: int, kind: str, chance: random.Random) -> Quantized:
    bits = 8 if "int8" in kind else 4
    group = chance.choice([g for g in (16, 32, 64, inner) if inner % g == 0 and g % 16 == 0])
    dtype = torch.float32 if "float32" in kind else torch.float16
    stored = torch.randint(0, 1 << bits, (outs, inner), dtype=torch.uint8)
    scale = torch.randn(outs, inner // group).to(dtype) / (1 << bits)
    least = torch.randn(outs, inner // group).to(dtype) if "minima" in kind else None
    return Quantized(bits, chance.choice([0, 1 << bits - 1]), stored, scale, least)


def panels_of(kind: str, outs: int, inner: int, chance: random.Random) -> tuple[Panels, torch.Tensor]:
    """Random panels, and the matrix that they should hold."""
    if kind in ("fp32", "bf16"):
        matrix = torch.randn(outs, inner).to(torch.float32 if kind == "fp32" else torch.bfloat16)
        return pack(matrix), matrix.float()
    if kind[:4] in FLOAT8:
        groups = inner // chance.choice([g for g in (4, 16, 32) if inner % g == 0]) if "groups" in kind else 1
        values = (torch.randn(outs, inner) * torch.logspace(-4, 0, inner)).to(FLOAT8[kind[:4]])  # denormal ones, too
        float8 = Float8(values, torch.randn(outs, groups))
        return pack_float8(float8.values, float8.scale), float8.dequantize()
    if "codes" in kind:
        group = chance.choice([g for g in (8, 16, 32, inner) if inner % g == 0])
        scale = torch.randn(outs, inner // group).to(torch.float16 if "float16" in kind else torch.float32)
        factor = torch.rand(outs, 1) + 0.5 if "factors" in kind else None
        codes = Codes(torch.randint(0, 16, (outs, inner), dtype=torch.uint8), TABLE, scale, factor)
        return pack_codes(codes.codes, codes.table, scale, factor), codes.dequantize()
    q = random_quantized(outs, inner, kind, chance)
    return pack_quantized(q.stored, q.scale, q.min, bits=q.bits, zero=q.zero), q.dequantize()


def sizes(kind: str, chance: random.Random) -> tuple[int, int]:
    """(outs, inner), odd ones too, where the form allows it."""
    inner = chance.choice([1, 2, 7, 33, 64, 576]) if kind in ("fp32", "bf16") else chance.choice([16, 32, 64, 96, 576])
    return chance.choice([1, 15, 16, 17, 32, 33, 100, 960]), inner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_panels_hold_the_matrix(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    panels, matrix = panels_of(kind, *sizes(kind, chance), chance)
    assert torch.equal(panels.unpack(), matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_the_product(kernels: Library, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    outs, inner = sizes(kind, chance)
    panels, matrix = panels_of(kind, outs, inner, chance)
    rows = chance.choice([1, 2, 3, 5, 8, 13, 33, 64, 70])
    wide = torch.randn(rows, inner + chance.choice([0, 3]))
    x = wide[:, :inner]
    bias = torch.nn.functional.pad(torch.randn(outs), (0, panels.rows - outs)) if chance.random() < 0.5 else None
    got = linear(kernels, panels, x, bias=bias)
    # What the kernel multiplies are then integers and scales, and these it multiplies exactly.
    if panels.form in (Form.INT8, Form.INT4):
        q, scale, total = quantize(kernels, x, panels.group)
        assert torch.equal(total, q.view(rows, -1, panels.group).sum(-1, dtype=torch.int32))
        x = q.float() * scale.repeat_interleave(panels.group, 1)
    expected = x.double() @ matrix.double().T + (0 if bias is None else bias[:outs].double())
    size = (x.double().abs() @ matrix.double().abs().T).clamp(min=1)
    assert ((got - expected).abs() / size).max() < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_quantized_rows_are_the_nearest_integers(kernels: Library, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 128) * torch.logspace(-20, 10, 5)[:, None]
    x[2, :32] = 0
    q, scale, _ = quantize(kernels, x, 32)
    blocks = x.view(5, 4, 32)
    torch.testing.assert_close(scale, blocks.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert q.abs().max() == 127
    assert ((q.view(5, 4, 32) * scale[..., None] - blocks).abs() <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("size", [32, 176, 960])
def test_columns_in_another_order(kernels: Library, size: int) -> None:
    """One for all rows, or one for the rows of each matrix, of which some have none."""
    torch.manual_seed(size)
    x = torch.randn(9, size + 3)[:, :size]
    order = torch.rand(4, size).argsort(1).int()
    one = quantize(kernels, x, 16, order[:1])
    assert all(map(torch.equal, one, quantize(kernels, x[:, order[0].long()], 16)))
    first = torch.tensor([0, 0, 5, 5, 9], dtype=torch.int32)
    each = quantize(kernels, x, 16, order, first)
    expected = torch.cat((x[:5, order[1].long()], x[5:, order[3].long()]))
    assert all(map(torch.equal, each, quantize(kernels, expected, 16)))
    alone = [quantize(kernels, row[None], 16, order[:1]) for row in x]
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*alone, strict=True), one, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kernels: Library, kind: str) -> None:
    chance = random.Random(1)
    torch.manual_seed(1)
    panels, _ = panels_of(kind, 321, 576, chance)
    x = torch.randn(70, 576)
    alone = torch.cat([linear(kernels, panels, row[None]) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 6, 7, 12, 13, 33, 70):
                assert torch.equal(linear(kernels, panels, x[:rows]), alone[:rows])
            assert torch.equal(linear(kernels, panels, x[20:55]), alone[20:55])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_product(kernels: Library, kind: str) -> None:
    chance = random.Random(2)
    torch.manual_seed(2)
    panels, _ = panels_of(kind, 96, 64, chance)
    x, into = torch.randn(13, 64), torch.randn(13, 96)
    plain = linear(kernels, panels, x)
    bias = torch.randn(96)
    out = into.clone()
    linear(kernels, panels, x, bias=bias, out=out, finish=Finish.ADD, alpha=0.25)
    torch.testing.assert_close(out, into + 0.25 * (plain + bias))
    for act, activation in ACTS.items():
        gated = linear(kernels, panels, x, finish=Finish.GATE, act=act)  # its panels of 16 are gate and up by turns
        blocks = plain.view(13, 3, 2, 16)
        gate, up = blocks[:, :, 0].flatten(1), blocks[:, :, 1].flatten(1)
        torch.testing.assert_close(gated, activate(gate, activation) * up, rtol=1e-5, atol=1e-5)
        out = linear(kernels, panels, x, bias=bias, act=act)
        torch.testing.assert_close(out, activate(plain + bias, activation), rtol=1e-5, atol=1e-5)
    capped = linear(kernels, panels, x, alpha=0.5, cap=3.0)
    torch.testing.assert_close(capped, 3 * (plain / 6).tanh(), rtol=1e-5, atol=1e-5)
    clipped = linear(kernels, panels, x, bias=bias, act=Act.CLIP, cap=0.5)
    torch.testing.assert_close(clipped, (plain + bias).clamp(-0.5, 0.5))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu"])
def test_activations_from_end_to_end(kernels: Library, act: Activation) -> None:
    """As exact far from 0 as near to it, where the product of the tails counts."""
    x = torch.cat((torch.linspace(-12, 12, 4000), torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])))[:, None]
    panels = pack(torch.ones(1, 1))
    got = linear(kernels, panels, x.contiguous(), act=next(key for key, name in ACTS.items() if name == act))
    torch.testing.assert_close(got, activate(x.double(), act).float(), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_matrix(kernels: Library, kind: str) -> None:
    chance = random.Random(3)
    torch.manual_seed(3)
    panels, matrix = panels_of(kind, 100, 96, chance)
    ids = torch.tensor([0, 99, 17, 17, 50])
    assert torch.equal(embed(kernels, panels, ids), matrix[ids])
    torch.testing.assert_close(embed(kernels, panels, ids, 12.0), matrix[ids] * 12)


@pytest.mark.parametrize("dtype", FLOAT8.values(), ids=FLOAT8)
def test_every_number_of_eight_bits(kernels: Library, dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    for column in range(4):
        values = torch.zeros(256, 4, dtype=torch.uint8)
        values[:, column] = numbers
        panels = pack_float8(values.view(dtype), torch.ones(256, 1))
        got = linear(kernels, panels, torch.eye(4)[column : column + 1])[0]
        torch.testing.assert_close(got, numbers.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_a_group_with_what_is_no_number_has_none(kernels: Library) -> None:
    """e4m3fn has no infinity."""
    values = torch.randn(40, 16).to(torch.float8_e4m3fn)
    values[5, 9] = torch.nan
    panels = pack_float8(values, torch.ones(40, 2))
    got = linear(kernels, panels, torch.ones(1, 16))
    assert got[0, 5].isnan() and got.isnan().sum() == 1
    assert torch.equal(embed(kernels, panels, torch.tensor([5])).isnan(), torch.arange(16)[None] >= 8)


@pytest.mark.parametrize("size", [1, 15, 16, 64, 577])
def test_norms(kernels: Library, size: int) -> None:
    torch.manual_seed(size)
    x, weight, bias = torch.randn(9, size + 5)[:, :size], torch.randn(size), torch.randn(size)
    functional = torch.nn.functional
    for got, expected in (
        (rms_norm(kernels, x, weight, 1e-5), functional.rms_norm(x, (size,), weight, 1e-5)),
        (layer_norm(kernels, x + 3, weight, bias, 1e-5), functional.layer_norm(x + 3, (size,), weight, bias, 1e-5)),
        (layer_norm(kernels, x, weight, None, 1e-5), functional.layer_norm(x, (size,), weight, None, 1e-5)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(rms_norm(kernels, x, weight, 1e-5)[3:4], rms_norm(kernels, x[3:4], weight, 1e-5))
    into = torch.randn(9, size)
    grown = layer_norm(kernels, x, weight, bias, 1e-5, out=into.clone(), add=True)
    torch.testing.assert_close(grown, into + layer_norm(kernels, x, weight, bias, 1e-5))
    grown = rms_norm(kernels, x, weight, 1e-5, out=into.clone(), add=True)
    torch.testing.assert_close(grown, into + rms_norm(kernels, x, weight, 1e-5))


@pytest.mark.parametrize("size", [8, 20, 64])
def test_norms_of_parts_in_their_place(kernels: Library, size: int) -> None:
    torch.manual_seed(size)
    x, weight, bias = torch.randn(9, 3 * size + 7), torch.randn(3, size), torch.randn(3, size)
    expected = x.clone()
    parts = expected[:, 2 : 3 * size + 2].view(9, 3, size)
    parts.copy_(torch.nn.functional.layer_norm(parts, (size,)) * weight + bias)
    middle = x[:, 2 : 3 * size + 2]
    layer_norm(kernels, middle, weight, bias, 1e-5, out=middle)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)
    parts.copy_(torch.nn.functional.rms_norm(parts, (size,), eps=1e-5) * weight)
    rms_norm(kernels, middle, weight, 1e-5, out=middle)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=4e-6)


def test_infinities_and_what_is_no_number_stay_in_their_row(kernels: Library) -> None:
    panels = pack(torch.randn(64, 64))
    x = torch.randn(3, 64)
    fine = linear(kernels, panels, x)
    x[1, 7] = float("nan")
    broken = linear(kernels, panels, x)
    assert broken[1].isnan().all()
    assert torch.equal(broken[::2], fine[::2])
