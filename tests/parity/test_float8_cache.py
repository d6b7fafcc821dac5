"""A cache in float8: what attention over keys and values rounded by torch gives, with the checkpoint's scales."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import Engine, FullAttention, load, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tgi.attention.base import Turn
from tgi.core.errors import StartupError
from tgi.core.messages import Sampling, Submit
from tgi.layers import attention

NAMES = [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("kv_scale", "kv_scale")]


def scaled(folder: Path, *scales: tuple[float, float]) -> Path:
    """With these in the checkpoint, layer by layer, as each of its makers calls them."""
    tensors = load_file(folder / "model.safetensors")
    for layer, (names, pair) in enumerate(zip(NAMES, scales, strict=True)):
        for name, scale in zip(names, pair, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@dataclass
class Rounded:
    """The definition of attention over rounded keys and values."""

    exact: FullAttention
    stored: torch.dtype

    def __call__(self, layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        assert isinstance(turn, attention.Turn)
        q, k, v = turn(qkv)
        scales = turn.scales if self.stored == torch.float8_e4m3fn else (1.0, 1.0)
        k, v = ((x / scale).to(self.stored).float() * scale for x, scale in zip((k, v), scales, strict=True))
        packed = torch.cat((q, k) if turn.latent else (q, k, v), 1).flatten(1)
        return self.exact(layer, packed, replace(turn, angles=None, norm=None))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek-v2"])
def test_logits_are_those_of_rounded_keys_and_values(
    tmp_path: Path, kernels: None, family: str, stored: torch.dtype
) -> None:
    if family in VARIANTS:
        kind, config = VARIANTS[family]
        folder = write_reference(tmp_path, kind, **config)
    else:
        folder = scaled(write_model(tmp_path, family), (0.07, 0.03), (3.0, 0.1), (0.06, 0.06))
    submit = Submit(0, tokens(90).tolist(), 90, 1, [], Sampling(), 0.0, prompt_logprobs=True)
    engine = Engine(folder, step_tokens=40, stored=stored)
    engine.run(submit)
    got = torch.tensor([token.logprob for delta in engine.deltas[0] for token in delta.prompt])
    ids = tokens(90)
    model = load(folder)
    expected = []
    for turned in (True, False):
        exact = FullAttention(model.specs, [90])
        hidden = model.forward(ids, torch.arange(90), Rounded(exact, stored) if turned else exact)
        logprobs = model.logits(hidden).log_softmax(-1)[:-1]
        expected.append(logprobs.gather(1, ids[1:, None]).squeeze(1))
    # A number in the middle of two may be rounded to the other.
    rounded, exact_ones = expected
    assert (got - rounded).abs().median() < 0.1 * (got - exact_ones).abs().median()


def test_scales_that_are_none(tmp_path: Path) -> None:
    folder = scaled(write_model(tmp_path, "llama"), (1.0, 1.0), (1.0, -2.0), (1.0, 1.0))
    with pytest.raises(StartupError, match=r"layers\.1\.self_attn\.v_proj\.v_scale: expected one positive number, got"):
        load(folder)
