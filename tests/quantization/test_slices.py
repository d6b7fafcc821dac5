"""A rank's rows and columns of each packed form are those of the matrix that it means."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantization import test_affine as affine
from tests.quantization import test_awq as awq
from tests.quantization import test_bitnet as bitnet
from tests.quantization import test_eetq as eetq
from tests.quantization import test_exl2 as exl2
from tests.quantization import test_gptq as gptq
from tests.quantization import test_hqq as hqq
from tests.quantization import test_marlin as marlin
from tests.quantization import test_marlin_24 as marlin_24
from tests.quantization.packed_models import Pack, Tensors, write
from tests.quantization.writers import FORMATS as WRITTEN
from tests.quantization.writers import Writer, integers
from tgi.core.config import ModelFiles
from tgi.core.model_config import read_config
from tgi.kernels.library import library
from tgi.kernels.ops import Form
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.models.config import DecoderConfig
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.parallel import Group
from tgi.quantization.base import NativeLinear

pytestmark = pytest.mark.skipif(library() is None, reason="only native kernels multiply packed forms")


def written(name: str) -> Pack:
    return lambda module, weight: WRITTEN[name].writer(weight)


def one_order(writer: Writer) -> Pack:
    """All matrices of one input in the same."""

    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        torch.manual_seed(weight.shape[1])
        return writer(weight)

    return pack


FORMATS: dict[str, tuple[Pack, dict[str, Any], tuple[Form, Form]]] = {
    "gptq, 3 bits": (gptq.packer(3, 64), gptq.config(3, 64), (Form.INT4, Form.INT4)),
    "gptq, symmetric": (gptq.packer(4, 128, symmetric=True), gptq.config(4, 128), (Form.INT4, Form.INT4)),
    "gptq, one group": (gptq.packer(8, -1), gptq.config(8, -1), (Form.INT8, Form.INT8)),
    # Its groups' inputs are on all ranks.
    "gptq, act-order": (gptq.packer(4, 64, shuffled=True), gptq.config(4, 64), (Form.INT4, Form.FP32)),
    "awq, gemm": (awq.gemm(64), awq.config(), (Form.INT4, Form.INT4)),
    "awq, gemv": (awq.gemv, awq.config(version="gemv"), (Form.INT4, Form.INT4)),
    "marlin": (marlin.packer(128), marlin.config(128, quant_method="marlin"), (Form.INT4, Form.INT4)),
    "marlin, one group": (marlin.packer(-1), marlin.config(-1, quant_method="marlin"), (Form.INT4, Form.INT4)),
    "marlin_24": (marlin_24.packer(4, 128), marlin_24.config(4, 128), (Form.INT4, Form.INT4)),
    "marlin_24, 8 bits": (marlin_24.packer(8, -1), marlin_24.config(8, -1), (Form.INT8, Form.INT8)),
    "bitnet": (bitnet.packer(), bitnet.CONFIG, (Form.INT4, Form.INT4)),
    "metal": (affine.packer(8, 64), affine.config(8, 64), (Form.INT8, Form.INT8)),
    "eetq": (eetq.pack, eetq.CONFIG, (Form.INT8, Form.INT8)),
    "w8a8": (written("w8a8"), dict(WRITTEN["w8a8"].config), (Form.INT8, Form.INT8)),
    "w4a16, act-order": (
        one_order(integers(4, 32, ordered=True, symmetric=False)),
        dict(WRITTEN["w4a16 asymmetric, ordered"].config),
        (Form.INT4, Form.FP32),
    ),
    "int8": (written("int8"), dict(WRITTEN["int8"].config), (Form.INT8, Form.INT8)),
    "nvfp4": (written("compressed nvfp4"), dict(WRITTEN["compressed nvfp4"].config), (Form.CODES, Form.CODES)),
    "exl2": (exl2.packer(6, 4), exl2.CONFIG, (Form.INT8, Form.FP32)),
    "hqq": (hqq.packer(4, 64), hqq.config(4, 64), (Form.INT4, Form.INT4)),
}


class Ranks(Group):
    """One of two or three."""

    def __init__(self, rank: int, size: int) -> None:
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "size", size)

    def shard(self, size: int) -> slice:
        own, rest = divmod(size, self.size)
        assert rest == 0
        return slice(self.rank * own, (self.rank + 1) * own)


@dataclass(frozen=True, slots=True)
class Rank:
    """What it has of a layer."""

    up: NativeLinear
    """The gate's rows above those of up, as they are."""
    down: NativeLinear


def rank(folder: Path, group: Ranks) -> Rank:
    config = check(read_config(folder))
    assert isinstance(config, DecoderConfig)
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(files, config, lambda done, total: None))
        checkpoint = Checkpoint(weights, torch.float32, torch.device("cpu"), group, library(), "stored")
        mlp, hidden, inner = "model.layers.1.mlp", config.shape.hidden, config.shape.intermediate
        parts = {f"{mlp}.gate_proj": (inner,), f"{mlp}.up_proj": (inner,)}
        up = ColumnLinear.load(checkpoint, parts, hidden, bias=False).method
        down = RowLinear.load(checkpoint, f"{mlp}.down_proj", hidden, inner, bias=False).method
    assert isinstance(up, NativeLinear) and isinstance(down, NativeLinear)
    return Rank(up, down)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_a_rank_has(tmp_path: Path, name: str, size: int) -> None:
    pack, settings, forms = FORMATS[name]
    folder = write(tmp_path, pack, settings, hidden_size=256, intermediate_size=384, num_key_value_heads=4)
    plain = load_file(folder / "plain" / "model.safetensors")
    gate, up, down = (plain[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    for number in range(size):
        group = Ranks(number, size)
        own = group.shard(len(up))
        found = rank(folder, group)
        assert (found.up.panels.unpack() - torch.cat((gate[own], up[own]))).abs().max() < 1e-6
        assert (found.down.panels.unpack() - down[:, own]).abs().max() < 1e-6
        assert (found.up.panels.form, found.down.panels.form) == (forms[0], forms[size > 1])


def test_columns_that_cut_groups_make_smaller_ones(tmp_path: Path) -> None:
    folder = write(tmp_path, gptq.packer(4, 128), gptq.config(4, 128), intermediate_size=384)
    assert [rank(folder, Ranks(1, size)).down.panels.group for size in (2, 3, 4)] == [64, 128, 32]


@pytest.mark.parametrize("name", ["gptq, one group", "marlin, one group", "eetq", "w8a8", "int8"])
def test_activations_are_rounded_in_groups_of_128_where_weights_have_one(tmp_path: Path, name: str) -> None:
    pack, settings, _ = FORMATS[name]
    folder = write(tmp_path, pack, settings, hidden_size=256, intermediate_size=384, num_key_value_heads=4)
    whole = rank(folder, Ranks(0, 1))
    assert whole.up.panels.group == whole.down.panels.group == 128
