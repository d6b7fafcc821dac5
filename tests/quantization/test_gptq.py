"""GPTQ's checkpoints, written by the published layout: words of 32 bits along the inputs, zeros less one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import load, logits, reference, reference_logits, tokens
from tests.tiny import write_model
from tgi.core.errors import StartupError
from tgi.models.registry import check


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns] → int32 [rows · bits / 32, columns], the first row in the lowest bits."""
    each = 32 // bits
    shifts = torch.arange(0, 32, bits)[:, None]
    words = (values.view(-1, each, values.shape[1]).long() << shifts).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantized(weight: torch.Tensor, bits: int, group: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that stand for ``weight`` [outs, inner], and what they mean."""
    outs, inner = weight.shape
    blocks = weight.view(outs, -1, inner if group == -1 else group)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    zero = (-low / scale).round().clamp(1, (1 << bits) - 1)
    stored = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, (1 << bits) - 1)
    values = ((stored - zero[..., None]) * scale[..., None]).view(outs, inner)
    tensors = {
        "qweight": pack(stored.view(outs, inner).T.contiguous().to(torch.uint8), bits),
        "qzeros": pack((zero - 1).to(torch.uint8), bits).T.contiguous(),
        "scales": scale.T.contiguous().half(),
        "g_idx": torch.arange(inner, dtype=torch.int32) // (inner if group == -1 else group),
    }
    return tensors, values


def write(folder: Path, bits: int, group: int) -> None:
    """Two folders of a tiny Llama: ``folder`` quantized, and ``folder/plain`` with the same values."""
    write_model(folder, "llama", intermediate_size=96)
    (path,) = folder.glob("*.safetensors")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for name, tensor in load_file(path).items():
        plain[name] = stored[name] = tensor.float()
        if name.endswith("_proj.weight"):
            del stored[name]
            parts, plain[name] = quantized(tensor.float(), bits, group)
            stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    save_file(plain, folder / "plain" / "model.safetensors", {"format": "pt"})
    save_file(stored, path)
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": group}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (8, 16)])
def test_what_the_tensors_mean(tmp_path: Path, bits: int, group: int) -> None:
    write(tmp_path, bits, group)
    ids = tokens(20)
    theirs = reference_logits(reference(tmp_path / "plain"), ids)
    assert (logits(load(tmp_path), ids) - theirs).abs().max() < 1e-4
    ours = logits(load(tmp_path, quantize="stored"), ids)
    # By our kernels activations are rounded to 8 bits.
    assert (ours - theirs).std() < 0.04 * theirs.std()


def test_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 4, 32)
    raw = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(StartupError, match="bits: 5"):
        check(raw | {"quantization_config": raw["quantization_config"] | {"bits": 5}})
    with pytest.raises(StartupError, match="'quip'"):
        check(raw | {"quantization_config": {"quant_method": "quip"}})
