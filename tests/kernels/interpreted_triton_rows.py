"""Norms, activations and plain products by Triton's kernels: on a GPU or, with TRITON_INTERPRET=1, in its interpreter.

test_triton_rows.py runs these in a process of their own. The interpreter multiplies bfloat16 wrongly: products are
tested with float16.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm, linear, rms_norm

from tests.kernels.coded_forms import FORMS
from tests.parity.conftest import logits, reference, reference_logits, tokens, write_reference
from tests.parity.ranks import rank_logits
from tests.parity.test_more import VARIANTS
from tests.quantization.test_checkpoint import Stored
from tests.serve.conftest import free_port
from tests.tiny import write_model
from tgi.core.config import ModelFiles
from tgi.core.model_config import Activation, read_config
from tgi.kernels.triton import rows as kernels
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.layers.norm import LayerNorm, RMSNorm
from tgi.layers.residual import Stream
from tgi.models.config import DenseConfig
from tgi.models.dense import DenseDecoder
from tgi.models.gpt import GptDecoder
from tgi.models.registry import Model, check
from tgi.models.weights import open_weights
from tgi.parallel import Group
from tgi.quantization.base import ACTS, LinearMethod, activate, dense
from tgi.quantization.device import CodedLinear, FixedLinear, Float8Linear, TorchLinear
from tgi.quantization.forms import Float8
from tgi.quantization.fp8 import quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 64), (3, 100), (5, 1), (2, 4097)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """``expected`` in float64, but for one rounding to ``dtype``."""
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=max(2 * torch.finfo(dtype).eps, 2e-6), atol=1e-6, equal_nan=True
    )


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("count, size", SIZES)
@pytest.mark.parametrize("center", [False, True])
def test_norms(count: int, size: int, center: bool, dtype: torch.dtype) -> None:
    """Of rows apart, out of place and in it."""
    wide = torch.randn(count, size + 3, device=DEVICE).mul_(3).to(dtype)
    weight, bias = torch.rand(2, size, device=DEVICE).to(dtype)
    x, exact = wide[:, 2:-1], wide[:, 2:-1].double()
    if center:
        expected = layer_norm(exact, (size,), weight.double(), bias.double(), 1e-5)
        own: RMSNorm | LayerNorm = LayerNorm(weight, bias, 1e-5)
    else:
        expected = rms_norm(exact, (size,), weight.double(), 1e-5)
        own = RMSNorm(weight, 1e-5)
    close(own(x), expected, dtype)
    before = wide.clone()
    own.replace(x)
    close(x, expected, dtype)
    x.copy_(before[:, 2:-1])
    assert torch.equal(wide, before), "it writes elsewhere"


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
def test_norms_of_parts(biased: bool, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3 * 20, device=DEVICE).to(dtype)
    weight, bias = torch.rand(2, 3, 20, device=DEVICE).to(dtype)
    expected = layer_norm(x.view(4, 3, 20).double(), (20,), eps=1e-5) * weight.double()
    expected = (expected + bias.double() * biased).flatten(1)
    close(LayerNorm(weight, bias if biased else None, 1e-5)(x), expected, dtype)


@DTYPES
@pytest.mark.parametrize("count, size", SIZES)
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_added_waits_for_the_norm(count: int, size: int, behind: bool, dtype: torch.dtype) -> None:
    x, product = torch.randn(2, count, size, device=DEVICE).to(dtype)
    weight, other = torch.rand(2, size, device=DEVICE).to(dtype)
    exact = product.double()
    added = rms_norm(exact, (size,), other.double(), 1e-3) if behind else 0.5 * exact
    how = (1.0, RMSNorm(other, 1e-3)) if behind else (0.5, None)

    stream = Stream(x.clone(), triton=True)
    stream.add(product, *how)
    assert torch.equal(stream.x, x)
    seen = stream.seen(RMSNorm(weight, 1e-5))
    close(stream.x, x.double() + added, dtype)
    close(seen, rms_norm(stream.x.double(), (size,), weight.double(), 1e-5), dtype)


def test_two_things_are_added() -> None:
    x, first, second = torch.randn(3, 4, 20, device=DEVICE)
    norm = RMSNorm(torch.rand(20, device=DEVICE), 1e-5)
    stream = Stream(x.clone(), triton=True)
    stream.add(first, 0.5)
    stream.add(second, 1.0, norm)
    close(stream.seen(None), x.double() + 0.5 * first.double() + norm(second).double(), torch.float32)


@pytest.mark.filterwarnings("ignore:overflow")
@DTYPES
@pytest.mark.parametrize("activation", ACTS)
def test_activations(activation: Activation, dtype: torch.dtype) -> None:
    product = torch.randn(3, 2 * 1100, device=DEVICE).mul_(4).to(dtype)
    product[1, :4] = torch.tensor([math.inf, -30.0, 30.0, math.nan])
    first, second = product.double().chunk(2, 1)
    close(kernels.gated(product, activation), activate(first, activation) * second, dtype)
    expected = activate(product.double(), activation)
    close(kernels.activated(product, activation), expected, dtype)


def test_a_product_adds_to_the_stream() -> None:
    weight, bias = torch.randn(20, 48, device=DEVICE), torch.randn(20, device=DEVICE)
    x, stream = torch.randn(5, 48, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    expected = stream + 0.5 * linear(x, weight, bias)
    for fixed in (False, True):
        into = stream.clone()
        made = dense(weight, bias, fixed=fixed)
        assert isinstance(made, FixedLinear if fixed else TorchLinear)
        made.add(into, x, 0.5)
        torch.testing.assert_close(into, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "what, outs, inner",
    [
        (torch.float32, 40, 300),
        (torch.float16, 140, 600),
        ("4 bits, minima", 20, 576),
        ("e4m3", 20, 1152),
        ("float8", 80, 1152),
        ("float8, blocks", 80, 1152),
        ("4 bits, act-order", 16, 64),
    ],
)
def test_rows_do_not_know_each_other(
    monkeypatch: pytest.MonkeyPatch, what: torch.dtype | str, outs: int, inner: int
) -> None:
    """Alone and among others, where columns are split among programs, and rows are some at a time."""
    for module in ("linear", "matmul"):
        monkeypatch.setattr(f"tgi.kernels.triton.{module}.AT_ONCE", 64)
    bias = torch.randn(outs, device=DEVICE).half()
    made: LinearMethod
    if isinstance(what, str) and "float8" in what:
        float8 = quantize(torch.randn(outs, inner))
        if "blocks" in what:
            float8 = replace(float8, scale=float8.scale * torch.rand(outs, inner // 128))
        dtype, weight = torch.float16, float8.dequantize().to(DEVICE)
        made = Float8Linear.of([float8], (outs, inner), DEVICE, bias, fixed=True)
    elif isinstance(what, str):
        matrix = FORMS[what](outs, inner, inner // 4)
        dtype, weight = torch.float16, matrix.dequantize().to(DEVICE)
        made = CodedLinear.of([matrix], outs, DEVICE, bias, fixed=True)
    else:
        dtype, weight, bias = what, torch.randn(outs, inner, device=DEVICE).to(what), bias.to(what)
        made = dense(weight, bias, fixed=True)
    x, stream = torch.randn(70, inner, device=DEVICE).to(dtype), torch.randn(70, outs, device=DEVICE).to(dtype)
    every, into = made(x), stream.clone()
    exact = linear(x.double(), weight.double(), bias.double())
    assert (every.double() - exact).norm() < (6e-4 if dtype == torch.float16 else 1e-6) * exact.norm()
    made.add(into, x, 0.25)
    # In the interpreter a product depends on where in its tile a row is.
    moved = [slice(69, 70), slice(3, 6), slice(20, 36)] if DEVICE.type == "cuda" else []
    for own in (slice(1), slice(3), slice(16), slice(64, 70), *moved):
        assert torch.equal(made(x[own]), every[own])
        part = stream[own].clone()
        made.add(part, x[own], 0.25)
        assert torch.equal(part, into[own])


@DTYPES
def test_rows_in_float8(dtype: torch.dtype) -> None:
    x = torch.randn(5, 100, device=DEVICE).mul_(torch.tensor([1e-3, 1, 0, 30, 1e3], device=DEVICE)[:, None]).to(dtype)
    values, scale = kernels.float8(x)
    expected = quantize(x)
    torch.testing.assert_close(scale, expected.scale, rtol=1e-6, atol=0)
    found, wanted = values.float(), expected.values.float()
    if DEVICE.type == "cpu":  # in the interpreter what is rounded up to a power of two becomes half of it
        found, wanted = (part[wanted.abs().frexp().mantissa != 0.5] for part in (found, wanted))
    # Two that are equally near may be told apart.
    torch.testing.assert_close(found, wanted, rtol=2**-3, atol=2**-9)
    assert (found == wanted).float().mean() > 0.99


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_products_with_float8(biased: bool, groups: int) -> None:
    """Of few rows exact, but for what activations are held in; of many by activations in float8."""
    inner = 160 if groups == 1 else 3 * 128
    matrix = Float8(torch.randn(48, inner).to(torch.float8_e4m3fn), torch.rand(48, groups) + 0.5)
    assert Float8Linear.takes(matrix, 48, DEVICE) and not Float8Linear.takes(matrix, 50, DEVICE)
    parts, weight = [matrix.rows(lambda rows: rows[:16]), matrix.rows(lambda rows: rows[16:])], matrix.dequantize()
    for count, dtype in ((1, torch.float16), (20, torch.float16), (65, torch.bfloat16)):
        bias = torch.randn(48, device=DEVICE).to(dtype) if biased else None
        made = Float8Linear.of(parts, matrix.shape, DEVICE, bias)
        x, into = torch.randn(count, inner, device=DEVICE).to(dtype), torch.ones(count, 48, device=DEVICE).to(dtype)
        x[0, :128] *= 100
        taken = x.double()
        if count == 65:
            values, scale = kernels.float8(x, groups)
            taken = (values.double().view(count, groups, -1) * scale[..., None]).flatten(1)
            assert ((taken - x.double()).norm(dim=1) < 0.1 * x.double().norm(dim=1)).all()
        expected = linear(taken, weight.to(DEVICE).double(), None if bias is None else bias.double())
        error = 2e-3 if dtype == torch.float16 else 1e-2
        assert (made(x).double() - expected).norm() < error * expected.norm()
        made.add(into, x, 0.5)
        assert (into.double() - 1 - 0.5 * expected).norm() < error * expected.norm()


@pytest.mark.parametrize(
    "dtype, quantization, rounds, kind",
    [
        (torch.bfloat16, "fp8", False, Float8Linear),
        (torch.bfloat16, "stored", True, Float8Linear),
        (torch.bfloat16, "stored", False, CodedLinear),
        (torch.float16, "fp8", True, CodedLinear),
    ],
)
def test_which_products_are_in_float8(
    dtype: torch.dtype, quantization: str, rounds: bool, kind: type[LinearMethod]
) -> None:
    weight = torch.randn(32, 64)

    class One:
        def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
            return weight

    tensors: Any = Stored({"o.weight": quantize(weight)}) if quantization == "stored" else One()
    checkpoint = Checkpoint(tensors, dtype, DEVICE, Group(), None, quantization, rounds=rounds)
    assert type(checkpoint.linear([Piece("o", (32, 64), [slice(0, 32)], slice(0, 64))], bias=False)) is kind


def decoder(folder: Path, dtype: torch.dtype = torch.float32, *, fixed: bool = False) -> Model:
    """The folder's model on Triton's kernels."""
    config = check(read_config(folder))
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    with open_weights(files, config, lambda done, total: None) as weights, torch.inference_mode():
        checkpoint = Checkpoint(weights, dtype, DEVICE, Group(), fixed=fixed)
        model = (
            DenseDecoder(config, checkpoint, 64)
            if isinstance(config, DenseConfig)
            else GptDecoder(config, checkpoint, 64)
        )
        weights.finish()
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("fixed", [False, True])
def test_dense_models(tmp_path: Path, family: str, fixed: bool) -> None:
    folder = write_model(tmp_path / family, family)
    same_as_theirs(folder, fixed=fixed)


def test_gpt_models(tmp_path: Path) -> None:
    family, config = VARIANTS["gpt2"]
    same_as_theirs(write_reference(tmp_path / family, family, **config))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="ranks are on a CPU here")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """What they add up waits for the next norm."""
    monkeypatch.setattr("tgi.kernels.library.library", lambda: None)
    folder, ids = write_model(tmp_path / family, family), tokens(9)
    alone = logits(decoder(folder), ids)
    assert (rank_logits(folder, 2, ids, port=free_port()) - alone).abs().max() < 1e-4


def same_as_theirs(folder: Path, *, fixed: bool = False) -> None:
    ids = tokens(9)
    expected, ours = reference_logits(reference(folder), ids), decoder(folder, fixed=fixed)
    assert expected.std() > 0.3, "logits this flat would hide a mistake"
    assert (logits(ours, ids.to(DEVICE)).cpu() - expected).abs().max() < 1e-4
