"""Tiny checkpoints whose matrices a format holds, beside the same with the values that it means."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import load, logits, reference, reference_logits, tokens
from tests.tiny import write_model

Tensors = dict[str, torch.Tensor]
Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A module's name, its weight [outs, inner] → the tensors that stand for it, by their names there, and what they
mean."""


def quantize(folder: Path, pack: Pack, settings: dict[str, Any], suffix: str = "_proj.weight") -> Path:
    """The matrices of ``folder`` that are called so, packed; ``folder/plain`` has the values."""
    (path,) = folder.glob("*.safetensors")
    stored: Tensors = {}
    plain: Tensors = {}
    torch.manual_seed(0)
    for name, tensor in load_file(path).items():
        plain[name] = stored[name] = tensor.float()
        if name.endswith(suffix):
            del stored[name]
            module = name.removesuffix("weight")
            parts, plain[name] = pack(module[:-1], tensor.float())
            stored |= {module + part: value.clone().contiguous() for part, value in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in plain.items()}, folder / "plain" / "model.safetensors")
    save_file(stored, path)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def write(folder: Path, pack: Pack, settings: dict[str, Any], family: str = "llama", **config: Any) -> Path:
    """A tiny model with all matrices of its layers packed."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2} | config
    return quantize(write_model(folder, family, **sizes), pack, settings)


def same(folder: Path) -> None:
    """Dequantized, the model is the plain one; by our kernels, which round activations to 8 bits, nearly."""
    ids = tokens(20)
    theirs = reference_logits(reference(folder / "plain"), ids)
    assert theirs.std() > 0.3, "logits this flat would hide a mistake"
    assert (logits(load(folder), ids) - theirs).abs().max() < 2e-4
    ours = logits(load(folder, quantize="stored"), ids)
    # In most rows, for where two experts are about as good another one may be chosen.
    assert ((ours - theirs).std(1) / theirs.std(1)).median() < 0.04
    assert not torch.equal(ours, logits(load(folder), ids)), "nothing is multiplied as it is stored"


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the packed weights after ``change`` has had its way with them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [n, columns] → int32 [n · bits / 32, columns]: a stream of bits, each number's lowest first."""
    ones = values.long()[:, None, :] >> torch.arange(bits)[:, None] & 1
    words = (ones.reshape(-1, 32, values.shape[1]) << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def rounded(
    weight: torch.Tensor, bits: int, groups: torch.Tensor, *, symmetric: bool = False, least_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[outs, inner] in ``groups`` (of each input) → integers [outs, inner], zeros and half scales [outs, groups], and
    what they mean."""
    outs, count = len(weight), int(groups.max()) + 1
    most = (1 << bits) - 1
    low, high = torch.zeros(outs, count), torch.zeros(outs, count)
    index = groups.long().expand(outs, -1)
    low.scatter_reduce_(1, index, weight, "amin")
    high.scatter_reduce_(1, index, weight, "amax")
    if symmetric:
        scale = (torch.maximum(-low, high) * 2 / most).half()
        scale[scale == 0] = 1
        zero = torch.full_like(low, 1 << bits - 1)
    else:
        scale = ((high - low) / most).half()
        scale[scale == 0] = 1
        zero = (-low / scale.float()).round().clamp(least_zero, most)
    each, middle = scale.float().gather(1, index), zero.gather(1, index)
    stored = (weight / each + middle).round().clamp(0, most)
    return stored, zero, scale, (stored - middle) * each
