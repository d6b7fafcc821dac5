"""Products with coded matrices by Triton's kernels: on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

test_triton_linear.py runs these in a process of their own. The interpreter multiplies bfloat16 wrongly: it is float16
that tiles are tested with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.coded_forms import FORMS
from tests.parity.conftest import load, logits, tokens
from tests.quantization import test_gptq as gptq
from tests.quantization.packed_models import write
from tests.quantization.test_checkpoint import Stored
from tgi.core.config import ModelFiles
from tgi.core.model_config import read_config
from tgi.kernels.triton import linear as kernels
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.models.config import DecoderConfig
from tgi.models.dense import DenseDecoder
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.parallel import Group
from tgi.quantization.base import LinearMethod, PlainLinear, activate
from tgi.quantization.device import CodedLinear
from tgi.quantization.quantized import Packed
from tgi.quantization.rounding import ROUNDING

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(16, 192, 96), (17, 100, 100), (70, 144, 16), (9, 384, 128), (16, 40, 8)]
"""Outs, inner, and columns that share a scale."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def coded(matrix: Packed, bias: torch.Tensor | None = None) -> CodedLinear:
    """In two parts, as a checkpoint is read."""
    half = matrix.shape[0] // 2
    parts = [matrix.rows(lambda part: part[:half]), matrix.rows(lambda part: part[half:])]
    return CodedLinear.of(parts, matrix.shape[0], DEVICE, bias)


def close(found: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    expected = expected.to(found.device)
    assert (found.double() - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outs, inner, group", SIZES)
def test_products_are_those_of_what_is_dequantized(form: str, outs: int, inner: int, group: int) -> None:
    matrix = FORMS[form](outs, inner, group)
    exact, bias = matrix.dequantize().double(), torch.randn(outs).half()
    method = coded(matrix, bias.to(DEVICE))
    x = torch.randn(1, inner)
    close(method(x.to(DEVICE)), x.double() @ exact.T + bias, 1e-6)
    for rows in (5, 65):  # the matrix is narrow, too
        x = torch.randn(rows, inner).half()
        close(method(x.to(DEVICE)), x.double() @ exact.half().double().T + bias, 6e-4)


@pytest.mark.parametrize("rows", [1, 5, 65])
def test_products_are_added(rows: int) -> None:
    matrix, bias = FORMS["8 bits"](17, 96, 32), torch.randn(17).half()
    x, stream = torch.randn(rows, 96).half(), torch.randn(rows, 17).half()
    into = stream.to(DEVICE, copy=True)
    coded(matrix, bias.to(DEVICE)).add(into, x.to(DEVICE), 0.5)
    close(into, stream + 0.5 * (x.double() @ matrix.dequantize().double().T + bias), 6e-4)


@pytest.mark.parametrize("form", ["4 bits", "8 bits, minima"])
def test_columns_split_among_programs(form: str) -> None:
    matrix = FORMS[form](5, 2304, 128)
    bias = torch.randn(5).half()
    for rows in (16, 20, 64):
        x = torch.randn(rows, 2304).half()
        expected = x.double() @ matrix.dequantize().half().double().T + bias
        close(coded(matrix, bias.to(DEVICE))(x.to(DEVICE)), expected, 6e-4)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_dequantized_is_what_the_form_means(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, and in however many parts."""
    matrix = FORMS[form](20, 96, 32)
    x = torch.eye(96, device=DEVICE)
    assert torch.equal(coded(matrix)(x).T.cpu(), matrix.dequantize())
    monkeypatch.setattr(kernels, "_SLAB", 16 * 96)
    assert torch.equal(coded(matrix)(x).T.cpu(), matrix.dequantize())


def test_rows_do_not_know_each_other() -> None:
    method = coded(FORMS["8 bits"](9, 1024, 128))  # split over programs
    x = torch.randn(12, 1024, device=DEVICE).half()
    alone = method(x)
    assert torch.equal(method(torch.cat((x[3:7], x.flip(0)[:5]))), torch.cat((alone[3:7], alone.flip(0)[:5])))


def test_what_is_no_number_spoils_its_group_alone() -> None:
    matrix: Any = FORMS["e4m3"](8, 64, 32)
    matrix.values[2, 40] = torch.nan
    values = kernels.floating(coded(matrix).weight, 0, 8, torch.float32)
    assert values.isnan().nonzero().cpu().tolist() == [[2, column] for column in range(32, 64)]


def method(matrices: Mapping[str, Packed], *pieces: Piece, quantize: str = "stored") -> LinearMethod:
    tensors = Stored({f"{name}.weight": matrix for name, matrix in matrices.items()})
    checkpoint = Checkpoint(tensors, torch.float32, DEVICE, Group(), None, quantize)  # type: ignore[arg-type]  # all of it that is needed
    return checkpoint.linear(pieces, bias=False, gated=True)


@pytest.mark.parametrize("form", ["4 bits, minima", "e4m3", "e2m1", "nf4"])
def test_joined_pieces(form: str) -> None:
    """Of groups of different size, gated."""
    gate, up = FORMS[form](30, 128, 64), FORMS[form](13, 128, 32)
    every = slice(0, 128)
    made = method(
        {"gate": gate, "up": up},
        Piece("gate", (30, 128), [slice(0, 20, 2), slice(27, 30)], every),
        Piece("up", (13, 128), [slice(0, 13)], every),
    )
    assert isinstance(made, CodedLinear)
    x = torch.randn(1, 128)
    first = x @ gate.dequantize()[[*range(0, 20, 2), *range(27, 30)]].T
    close(made.gate(x.to(DEVICE), "silu"), (activate(first, "silu") * (x @ up.dequantize().T)).double(), 1e-5)
    into = torch.ones(1, 26, device=DEVICE)
    made.add(into, x.to(DEVICE), 0.5)
    close(into, 1 + 0.5 * torch.cat((first, x @ up.dequantize().T), 1).double(), 1e-5)


@pytest.mark.parametrize("form", ["4 bits", "4 bits, act-order", "e5m2", "nf4"])
def test_columns_of_a_rank(form: str) -> None:
    """Where they cut groups, into smaller ones; plain where no kernel has such, or columns are in another order."""
    matrix = FORMS[form](10, 128, 32)
    for columns, kept in ((slice(16, 128), True), (slice(32, 64), True), (slice(2, 128), False)):
        made = method({"o": matrix}, Piece("o", (10, 128), [slice(0, 10)], columns))
        assert isinstance(made, CodedLinear if kept and "order" not in form else PlainLinear)
        x = torch.randn(1, columns.stop - columns.start)
        close(made(x.to(DEVICE)), (x @ matrix.dequantize()[:, columns].T).double(), 1e-5)


@pytest.mark.parametrize("name", [name for name in ROUNDING if name is not None])
def test_rounding_at_load(name: str) -> None:
    weight = torch.randn(12, 64)

    class Plain:
        def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
            return weight

    checkpoint = Checkpoint(Plain(), torch.float32, DEVICE, Group(), None, name)  # type: ignore[arg-type]  # all of it that is needed
    made = checkpoint.linear([Piece("o", (12, 64), [slice(0, 12)], slice(0, 64))], bias=False)
    assert isinstance(made, CodedLinear)
    rounded = ROUNDING[name](weight)
    assert rounded is not None
    assert torch.equal(made(torch.eye(64, device=DEVICE)).T.cpu(), rounded.dequantize())


def same_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a quantized checkpoint, and of what it means. Returns how many of its products are of coded matrices."""
    config = check(read_config(folder))
    assert isinstance(config, DecoderConfig)
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    made: list[CodedLinear] = []
    of = CodedLinear.of
    monkeypatch.setattr(CodedLinear, "of", lambda *args, **how: made.append(of(*args, **how)) or made[-1])
    with open_weights(files, config, lambda done, total: None) as weights, torch.inference_mode():
        ours = DenseDecoder(config, Checkpoint(weights, torch.float32, DEVICE, Group(), None, "stored"), 64)
        weights.finish()
    plain = load(folder, DEVICE.type)
    for ids in (tokens(9).to(DEVICE), tokens(1).to(DEVICE)):
        expected = logits(plain, ids)
        assert expected.std() > 0.3, "logits this flat would hide a mistake"
        assert (logits(ours, ids) - expected).abs().max() < 1e-4
    return len(made)


def test_a_model_computes_what_it_does_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    folder = write(tmp_path, gptq.packer(4, 32, shuffled=True), gptq.config(4, 32), **sizes)
    assert same_logits(folder, monkeypatch) == 4
