"""What is written, read by the libraries whose formats these are, where they are here."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.parity.conftest import load, logits, tokens
from tests.quantizer.test_process import job
from tests.tiny import write_model
from tgi.core.model_config import read_config
from tgi.models.config import TailConfig
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.quantizer.process import quantize


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_transformers_by_compressed_tensors(tmp_path: Path, method: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import disable_quantization
    from transformers import AutoModelForCausalLM

    folder, output = write_model(tmp_path / "model", "llama", intermediate_size=96), tmp_path / "out"
    quantize(job(folder, output, method))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    modules = dict(model.named_modules())
    told = modules["model.layers.0.mlp.down_proj"].quantization_scheme.input_activations
    assert (told.num_bits, told.strategy, told.dynamic) == (8, "token", True)
    assert not hasattr(modules["lm_head"], "quantization_scheme")
    model.apply(disable_quantization)  # of activations, which our own kernels round in another way
    ids = tokens(40)
    with torch.inference_mode():
        assert_close(logits(load(output), ids), model(ids[None]).logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_gptqmodel(tmp_path: Path, method: str, bits: int) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    folder, output = write_model(tmp_path / "model", "llama", intermediate_size=96), tmp_path / "out"
    quantize(job(folder, output, method, bits=bits))
    loaded = gptqmodel.GPTQModel.load(str(output), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16)
    config = check(read_config(str(output)))
    assert not isinstance(config, TailConfig)
    with open_weights(job(output, output).model, config, lambda done, total: None) as weights:
        for name, module in loaded.model.named_modules():
            if hasattr(module, "qweight"):
                theirs = module(torch.eye(module.in_features, dtype=torch.float16)).T.float()
                ours = weights.take(f"{name}.weight", tuple(theirs.shape))
                assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
