"""Mixtures of experts beside transformers' own blocks, for every way of choosing experts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

from tgi.core.model_config import Experts, ModelShape, Routing
from tgi.kernels.library import Library, library
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.moe import MoE
from tgi.parallel import Group

HIDDEN, INNER, COUNT = 32, 48, 12
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_experts_per_tok": 3}
_OLMOE = _SIZES | {"num_experts": COUNT}
_DEEPSEEK = _SIZES | {"n_routed_experts": COUNT, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
_GROUPS = {"n_group": 4, "topk_group": 2}
_GROUPED = {"groups": 4, "groups_per_token": 2}
_LOCAL = _SIZES | {"num_local_experts": COUNT}

BLOCKS: dict[str, tuple[type, str, dict[str, Any], dict[str, Any]]] = {
    "softmax": (OlmoeSparseMoeBlock, "olmoe", _OLMOE, {}),
    "normalised": (
        OlmoeSparseMoeBlock,
        "olmoe",
        _SIZES | {"num_experts": COUNT, "norm_topk_prob": True},
        {"norm": 1.0},
    ),
    "softmax-of-the-chosen": (GraniteMoeMoE, "granitemoe", _LOCAL, {"norm": 1.0}),
    "p-norm": (
        DbrxFFN,
        "dbrx",
        {
            "d_model": HIDDEN,
            "ffn_config": {
                "ffn_hidden_size": INNER,
                "moe_num_experts": COUNT,
                "moe_top_k": 3,
                "moe_normalize_expert_weights": 2.0,
            },
        },
        {"norm": 2.0},
    ),
    "sparse-mixer": (
        PhimoeSparseMoeBlock,
        "phimoe",
        _LOCAL | {"num_experts_per_tok": 2, "router_jitter_noise": 0.7},
        {"score": "sparse_mixer", "jitter": 0.7, "per_token": 2},
    ),
    "deepseek-v2": (DeepseekV2Moe, "deepseek_v2", _DEEPSEEK | {"topk_method": "greedy"}, {"factor": 2.5}),
    "deepseek-v2-groups": (
        DeepseekV2Moe,
        "deepseek_v2",
        _DEEPSEEK | _GROUPS | {"topk_method": "group_limited_greedy"},
        _GROUPED | {"factor": 2.5},
    ),
    "deepseek-v3": (
        DeepseekV3MoE,
        "deepseek_v3",
        _DEEPSEEK | _GROUPS,
        _GROUPED
        | {
            "score": "sigmoid",
            "group_best": 2,
            "factor": 2.5,
            "norm": 1.0,
            "bias": "gate.e_score_correction_bias",
        },
    ),
    "ernie": (
        Ernie4_5_MoeSparseMoeBlock,
        "ernie4_5_moe",
        _SIZES | {"moe_num_experts": COUNT, "moe_k": 3, "moe_norm_min": 0.4},
        {"norm": 1.0, "norm_least": 0.4, "bias": "gate.e_score_correction_bias"},
    ),
}


class Given:
    """Tensors by name, as a checkpoint of the usual layout holds them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._tensors.pop(name)
        assert tensor.shape == shape, name
        return tensor

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
        return self.take(name, shape)

    def finish(self) -> None:
        assert not self._tensors


def published(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What ``block`` holds, by the names of MoE."""
    tensors = {}
    for name, tensor in block.state_dict().items():
        if name.startswith("experts.mlp"):
            rows = tensor.view(COUNT, INNER, HIDDEN)
            role = {"w1": "gate", "v1": "up", "w2": "down"}[name[-2:]]
            for index, part in enumerate(rows.mT if role == "down" else rows):
                tensors[f"experts.{index}.{role}_proj.weight"] = part
        elif name.startswith("experts."):
            roles = ("gate", "up") if "gate_up" in name else ("down",)
            for index, both in enumerate(tensor):
                for role, part in zip(roles, both.chunk(len(roles)), strict=True):
                    tensors[f"experts.{index}.{role}_proj.weight"] = part
        else:
            tensors[name.replace("router.layer.", "gate.").replace("router.", "gate.").replace("moe_statics.", "")] = (
                tensor
            )
    return {f"0.mlp.{name}": tensor.reshape(-1) if "bias" in name else tensor for name, tensor in tensors.items()}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Experts]:
    kind, family, sizes, routing = request.param
    torch.manual_seed(0)
    theirs = kind(AutoConfig.for_model(family, **sizes)).eval()
    for name, tensor in theirs.state_dict().items():
        torch.nn.init.normal_(tensor, std=0.1 if "bias" in name else 2 * tensor.shape[-1] ** -0.5)
    tensors = published(theirs)
    shared = next((len(tensor) for name, tensor in tensors.items() if "shared_experts.gate" in name), 0)
    config = Experts(
        block="mlp",
        count=COUNT,
        intermediate=INNER,
        routing=Routing(**{"per_token": 3} | routing),
        shared_intermediate=shared,
        layers=(True,),
    )
    return theirs, tensors, config


native = pytest.mark.skipif(library() is None, reason="there is no native library here")


@pytest.mark.parametrize("kernels", [None, pytest.param(library(), marks=native)], ids=["torch", "native"])
@torch.inference_mode()
def test_a_block(pair: tuple[torch.nn.Module, dict[str, torch.Tensor], Experts], kernels: Library | None) -> None:
    theirs, stored, config = pair
    tensors = Given(stored)
    checkpoint = Checkpoint(tensors, torch.float32, torch.device("cpu"), Group(), kernels)
    shape = ModelShape("", 1, HIDDEN, 1, 1, HIDDEN, 0, 0, 0, False)
    ours = MoE.load(checkpoint, "0", shape, config, "silu")
    tensors.finish()
    x, into = torch.randn(2, 70, HIDDEN)
    expected = into + 0.5 * theirs(x[None])[0]
    ours.add(into, x, 0.5)
    assert (into - expected).abs().max() < 1e-5 * expected.abs().max()
