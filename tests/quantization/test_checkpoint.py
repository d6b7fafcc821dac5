"""Matrices of a quantized checkpoint as our kernels hold them: in their own numbers, cut, joined and gated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.conftest import LIBRARY, native
from tgi.kernels.ops import Form
from tgi.layers.checkpoint import Checkpoint, Piece
from tgi.parallel import Group
from tgi.quantization.base import NativeLinear, activate
from tgi.quantization.forms import Codes, Float8
from tgi.quantization.quantized import Packed

pytestmark = native


def float8(outs: int, inner: int, group: int) -> Float8:
    return Float8(torch.randn(outs, inner).to(torch.float8_e4m3fn), torch.rand(outs, inner // group))


def codes(outs: int, inner: int, group: int) -> Codes:
    numbers = torch.randint(16, (outs, inner), dtype=torch.uint8)
    return Codes(numbers, torch.linspace(-1, 1.5, 16), torch.rand(outs, inner // group), torch.rand(outs, 1) + 0.5)


FORMS: Mapping[Form, Callable[[int, int, int], Packed]] = {Form.E4M3: float8, Form.CODES: codes}


@dataclass
class Stored:
    """A checkpoint of these matrices."""

    matrices: Mapping[str, Packed]

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> "_Rows":
        assert stored and self.matrices[name].shape == shape
        return _Rows(self.matrices[name])


@dataclass
class _Rows:
    matrix: Packed

    def __getitem__(self, rows: slice) -> Packed:
        return self.matrix.rows(lambda part: part[rows])


def method(matrices: Mapping[str, Packed], *pieces: Piece, gated: bool = False) -> NativeLinear:
    tensors = Stored({f"{name}.weight": matrix for name, matrix in matrices.items()})
    checkpoint = Checkpoint(tensors, torch.bfloat16, torch.device("cpu"), Group(), LIBRARY, "stored")  # type: ignore[arg-type]  # all of it that is needed
    made = checkpoint.linear(pieces, bias=False, gated=gated)
    assert isinstance(made, NativeLinear)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_different_groups_are_one_matrix(form: Form) -> None:
    torch.manual_seed(0)
    q, k = FORMS[form](96, 128, 64), FORMS[form](40, 128, 32)
    every = slice(0, 128)
    made = method(
        {"q": q, "k": k},
        Piece("q", (96, 128), [slice(0, 32, 2), slice(1, 32, 2), slice(64, 96)], every),
        Piece("k", (40, 128), [slice(8, 40)], every),
    )
    assert made.panels.form is form and made.panels.group == 32
    q_rows = q.dequantize()[[*range(0, 32, 2), *range(1, 32, 2), *range(64, 96)]]
    assert torch.equal(made.panels.unpack(), torch.cat((q_rows, k.dequantize()[8:])))


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_and_what_it_gates(form: Form) -> None:
    torch.manual_seed(1)
    gate, up = FORMS[form](100, 64, 64), FORMS[form](100, 64, 32)
    pieces = [Piece(name, (100, 64), [slice(0, 100)], slice(0, 64)) for name in ("gate", "up")]
    made = method({"gate": gate, "up": up}, *pieces, gated=True)
    assert made.panels.form is form
    x = torch.randn(5, 64)
    expected = activate(x @ gate.dequantize().T, "silu") * (x @ up.dequantize().T)
    torch.testing.assert_close(made.gate(x, "silu"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_cut_groups(form: Form) -> None:
    """Into smaller ones, and into such as no kernel multiplies, which are plain."""
    torch.manual_seed(2)
    matrix = FORMS[form](32, 128, 32)
    for columns, expected in ((slice(16, 128), form), (slice(32, 64), form), (slice(2, 128), Form.BF16)):
        made = method({"o": matrix}, Piece("o", (32, 128), [slice(0, 32)], columns))
        assert made.panels.form is expected
        exact = matrix.dequantize()[:, columns]
        assert torch.equal(made.panels.unpack(), exact if expected is form else exact.bfloat16().float())
