"""What tests write and what is rounded at load, beside the libraries whose formats these are, where they are here."""

from typing import Any

import pytest
import torch

from tests.quantization.writers import FORMATS
from tgi.quantization.rounding import ROUNDING


def names(method: str) -> list[str]:
    return [name for name, form in FORMATS.items() if form.config["quant_method"] == method]


@pytest.mark.parametrize("name", [name for name in names("compressed-tensors") if "order" not in name])
def test_compressed_tensors(name: str) -> None:
    """It computes in the dtype of the scales. Orders of their own it doesn't know any more."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = dict(FORMATS[name].config)
    tensors, values = FORMATS[name].writer(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry(config["format"]).decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, values.to(theirs.dtype))


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "fp4"])
def test_codes_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, values = FORMATS[name].writer(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    state: dict[str, Any] = {key.removeprefix("weight."): tensors[key] for key in tensors if key != "weight"}
    theirs = functional.dequantize_4bit(tensors["weight"], functional.QuantState.from_dict(state, torch.device("cpu")))
    assert torch.equal(theirs, values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rounding_to_codes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    ours = ROUNDING[f"bitsandbytes-{kind}"](weight)
    assert ours is not None
    assert torch.equal(
        ours.dequantize(), functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type=kind))
    )


def test_int8_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    tensors, values = FORMATS["int8"].writer(weight)
    theirs = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    assert (theirs - values).abs().max() < 1e-6
    ours = ROUNDING["bitsandbytes"](weight)
    assert ours is not None
    stored, scale, _ = functional.int8_vectorwise_quant(weight)
    assert (ours.dequantize() - stored * (scale / 127)[:, None]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["fp8 tensor", "fp8 blocks", "fp8 exponents", "fbgemm_fp8"])
def test_float8_of_transformers(name: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, values = FORMATS[name].writer(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    weight, scale = tensors.values()
    theirs = Fp8Dequantize(None)._dequantize_one(
        weight, scale.reshape(1, 1) if scale.dim() == 0 else scale, torch.float32
    )
    assert torch.equal(theirs, values)
