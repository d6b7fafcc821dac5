"""ExLlamaV2's checkpoints, written by its own layout: groups of inputs, the most important first, each with bits of its
own."""

import json
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import load, logits, tokens
from tests.quantization.packed_models import Pack, edit, quantize, same, stream, write
from tests.tiny import write_model
from tgi.core.errors import StartupError

CONFIG = {"quant_method": "exl2", "version": "0.1.1", "bits": 4.0, "head_bits": 6, "calibration": {"rows": 100}}


def packer(*bits: int, apart: bool = False) -> Pack:
    """A group of 64 inputs with the first of ``bits``, others of 32 with the next, by turns. ``apart``: the order of
    inputs is another for each module."""

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % 32))
        outs, inner = filled.shape
        order = torch.randperm(inner, generator=torch.Generator().manual_seed(inner + apart * len(module)))
        sizes = [64] + [32] * ((inner - 64) // 32)
        words: list[torch.Tensor] = []
        scales, most, table = [], [], []
        values = torch.zeros(outs, inner)
        at = 0
        for number, size in enumerate(sizes):
            own, wide = order[at : at + size], bits[number % len(bits)]
            part = filled[:, own]
            wanted = part.abs().amax(1) / ((1 << wide - 1) - 0.5)
            top = wanted.max().half()
            steps = (wanted / top.float() * 256).sqrt().ceil().clamp(1, 16)
            scale = steps**2 / 256 * top.float()
            half = 1 << wide - 1
            stored = (part / scale[:, None]).round().clamp(-half, half - 1) + half
            values[:, own] = (stored - half) * scale[:, None]
            table += [wide, sum(map(len, words))]
            words.append(stream(stored.T, wide))
            scales.append(steps - 1)
            most.append(top)
            at += size
        return {
            "q_weight": torch.cat(words),
            "q_scale": stream(torch.stack(scales, 1), 4).T,
            "q_scale_max": torch.stack(most),
            "q_groups": torch.tensor(table, dtype=torch.int16),
            "q_invperm": order.argsort().short(),
        }, values[: len(weight)]

    return pack


@pytest.mark.parametrize("bits", [(4,), (8, 6, 5), (5, 4, 3, 2), (4, 3, 2)])
def test_what_the_tensors_mean(tmp_path: Path, bits: tuple[int, ...]) -> None:
    folder = write(tmp_path, packer(*bits), CONFIG)
    same(folder)


def test_a_head_of_more_rows_than_the_vocabulary(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", hidden_size=128, intermediate_size=192, vocab_size=431)
    same(quantize(folder, packer(6, 5), CONFIG, ("_proj.weight", "lm_head.weight")))


def test_orders_of_their_own(tmp_path: Path) -> None:
    folder = write(tmp_path, packer(5, 4, apart=True), CONFIG)
    exact, kept = (logits(load(folder, quantize=how), tokens(20)) for how in (None, "stored"))
    assert (exact - kept).std() < 0.04 * exact.std()


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("q_invperm", "q_invperm is no order of 128 inputs"),
        ("q_groups", "q_groups has groups of"),
        ("q_scale_max", "q_scale_max has shape"),
        ("q_scale", "q_scale has shape"),
    ],
)
def test_refused_by_name(tmp_path: Path, part: str, words: str) -> None:
    folder = write(tmp_path, packer(5, 4), CONFIG)
    name = f"{NAME}.{part}"
    broken = {
        "q_invperm": lambda tensor: tensor.fill_(1),
        "q_groups": lambda tensor: tensor.fill_(7),
        "q_scale_max": lambda tensor: tensor[1:],
        "q_scale": lambda tensor: tensor[1:],
    }[part]
    edit(folder, lambda t: t.update({name: broken(t[name])}))
    with pytest.raises(StartupError, match=words):
        load(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == CONFIG
