"""Mixtures of experts by Triton's kernels: on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

test_triton_experts.py runs these in a process of their own. The interpreter multiplies bfloat16 wrongly.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.coded_forms import FORMS
from tests.kernels.test_experts import ROUTINGS
from tests.parity.conftest import load, logits, tokens, write_reference
from tests.parity.test_experts import HIDDEN, Given, pair
from tests.parity.test_more import VARIANTS
from tests.quantization.test_checkpoint import Stored
from tests.quantization.test_formats import MIXTRAL
from tests.quantization.writers import FORMATS as STORED
from tests.quantization.writers import requantize
from tgi.core.config import ModelFiles
from tgi.core.model_config import Activation, Experts, ModelShape, Routing, read_config
from tgi.kernels.triton import experts as kernels
from tgi.kernels.triton.coded import Coded
from tgi.kernels.triton.experts import Matrices
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.moe import FusedExperts, MoE, SeparateExperts
from tgi.models.config import DecoderConfig
from tgi.models.dense import DenseDecoder
from tgi.models.registry import check
from tgi.models.weights import open_weights
from tgi.parallel import Group
from tgi.quantization.base import ACTS, activate
from tgi.quantization.quantized import Packed, Quantized
from tgi.quantizer.sites import Sites

__all__ = ["pair"]  # a fixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def all_to_one(count: int, per_token: int) -> torch.Tensor:
    return torch.arange(per_token).expand(count, -1)


def anywhere(count: int, per_token: int) -> torch.Tensor:
    """But to the first and the last of seven."""
    return torch.rand(count, 5).argsort(1)[:, :per_token] + 1


WAYS: list[tuple[int, int, Callable[[int, int], torch.Tensor]]] = [
    (1, 3, anywhere),
    (2, 1, all_to_one),
    (23, 3, anywhere),
    (33, 2, all_to_one),
    (40, 4, anywhere),
]
"""Tokens, experts that each goes to, and which of seven."""


@pytest.mark.parametrize("way", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize(("count", "per_token"), [(8, 2), (20, 4), (72, 6)])
def test_routing(way: dict[str, Any], count: int, per_token: int) -> None:
    torch.manual_seed(count)
    routing = Routing(**{"per_token": per_token} | way)
    products = (torch.randn(12, count + 3) * 3)[:, :count].to(DEVICE)
    bias = torch.randn(count, device=DEVICE) / 4 if routing.bias else None
    none = Matrices(torch.empty(0), count)
    weights, chosen = FusedExperts(Group(), none, none, "silu").route(products, routing, bias)
    right, theirs = SeparateExperts([]).route(products, routing, bias)
    assert torch.equal(chosen.long(), theirs)
    assert (weights / right - 1).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_route_of_no_numbers_leads_somewhere() -> None:
    """Of the tokens that fill up a captured step."""
    products = torch.full((2, 9), torch.nan, device=DEVICE)
    for score in ("softmax", "sigmoid"):
        _, chosen = kernels.route(products, per_token=3, score=score, groups=3, groups_per_token=1)
        assert bool(((chosen >= 0) & (chosen < 9)).all())


@pytest.mark.parametrize("count, per_token", [(1, 3), (9, 2), (900, 4)])
def test_pairs_are_in_the_order_of_experts(count: int, per_token: int) -> None:
    """As many as a program looks at, and more; those of no expert are nowhere."""
    chosen = torch.rand(count, 5).argsort(1)[:, :per_token] - 1
    pairs = kernels.arrange(chosen.to(DEVICE), 4)
    order = chosen.flatten().argsort(stable=True)
    order = order[chosen.flatten()[order] >= 0]
    counts = chosen[chosen >= 0].bincount(minlength=4)
    first = pairs.first.cpu()
    assert torch.equal(first.diff(), counts.int())
    assert torch.equal(pairs.pair.cpu()[first[0] : first[-1]], order.int())


def expected(
    x: torch.Tensor,
    gate_ups: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    weights: torch.Tensor,
    chosen: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """Token by token, in float64."""
    out = torch.zeros(len(x), len(downs[0]), dtype=torch.float64)
    for token, experts in enumerate(chosen.tolist()):
        for weight, expert in zip(weights[token], experts, strict=True):
            gate, up = (gate_ups[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (downs[expert].double() @ (activate(gate, activation) * up))
    return out


def shape(hidden: int) -> ModelShape:
    return ModelShape("", 1, hidden, 1, 1, hidden, 0, 0, 0, False)


def config(count: int, inner: int) -> Experts:
    return Experts(block="mlp", count=count, intermediate=inner, routing=Routing(per_token=1), layers=(True,))


def plain(hidden: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of seven experts."""
    gate_ups = torch.randn(7, 2 * inner, hidden).mul_(hidden**-0.5).to(dtype)
    return gate_ups, torch.randn(7, hidden, inner).mul_(inner**-0.5).to(dtype)


def stacked(*matrices: torch.Tensor) -> list[Matrices]:
    return [Matrices(each.flatten(0, 1).to(DEVICE), len(each)) for each in matrices]


def close(found: torch.Tensor, right: torch.Tensor, error: float) -> None:
    assert (found.double().cpu() - right).norm() <= error * right.norm()


def computed(experts: FusedExperts, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    into = torch.zeros_like(x).to(DEVICE)
    experts.add(into, x.to(DEVICE), weights.to(DEVICE), chosen.to(DEVICE), 1.0)
    return into


@pytest.mark.parametrize(
    "dtype, fixed, error",
    [(torch.float32, False, 1e-6), (torch.float16, False, 1e-3), (torch.float16, True, 1e-3)],
    ids=["float32", "float16", "fixed"],
)
@pytest.mark.parametrize("count, per_token, way", WAYS)
def test_experts(
    count: int,
    per_token: int,
    way: Callable[[int, int], torch.Tensor],
    dtype: torch.dtype,
    fixed: bool,
    error: float,
) -> None:
    hidden, inner = 130, 67
    gate_ups, downs = plain(hidden, inner, dtype)
    x, weights, chosen = torch.randn(count, hidden).to(dtype), torch.rand(count, per_token), way(count, per_token)
    found = computed(FusedExperts(Group(), *stacked(gate_ups, downs), "silu", fixed=fixed), x, weights, chosen)
    close(found, expected(x, gate_ups, downs, weights, chosen, "silu"), error)


@pytest.mark.parametrize("activation", ACTS)
def test_what_is_between_the_products(activation: Activation) -> None:
    gate_ups, downs = plain(32, 16, torch.float32)
    x, weights, chosen = torch.randn(9, 32), torch.rand(9, 2), anywhere(9, 2)
    found = computed(FusedExperts(Group(), *stacked(gate_ups, downs), activation), x, weights, chosen)
    close(found, expected(x, gate_ups, downs, weights, chosen, activation), 1e-6)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_token_does_not_know_the_others(fixed: bool) -> None:
    """Where there are few; if ``fixed``, of how many there are neither."""
    experts = FusedExperts(Group(), *stacked(*plain(130, 67, torch.float16)), "silu", fixed=fixed)
    x, weights, chosen = torch.randn(40, 130).half(), torch.rand(40, 4), anywhere(40, 4)
    own = slice(3, 9)
    alone = computed(experts, x[own], weights[own], chosen[own])
    for others in (slice(0, 12), slice(0, 40 if fixed else 28)):
        assert torch.equal(computed(experts, x[others], weights[others], chosen[others])[own], alone)


@pytest.mark.parametrize("form", FORMS)
def test_quantized_experts(form: str) -> None:
    """Gate and up in groups of different size; with act-order, each expert in one of its own."""
    hidden, inner = 160, 32
    matrices: dict[str, Packed] = {}
    for expert in range(7):
        gate = matrices[f"0.{expert}.gate_proj.weight"] = FORMS[form](inner, hidden, 80)
        up = matrices[f"0.{expert}.up_proj.weight"] = FORMS[form](inner, hidden, 32)
        if isinstance(gate, Quantized) and isinstance(up, Quantized):
            matrices[f"0.{expert}.up_proj.weight"] = replace(up, order=gate.order)
        matrices[f"0.{expert}.down_proj.weight"] = FORMS[form](hidden, inner, 16)
    checkpoint = Checkpoint(Stored(matrices), torch.float16, DEVICE, Group(), None, "stored")  # type: ignore[arg-type]  # all of it that is needed
    experts = FusedExperts.load(checkpoint, "0", shape(hidden), config(7, inner), "silu")
    assert isinstance(experts._gate_up.weight, Coded) and isinstance(experts._down.weight, Coded)
    assert (experts._down.order is not None) == ("order" in form)
    exact = {name: matrix.dequantize().half() for name, matrix in matrices.items()}
    gate_ups = [torch.cat([exact[f"0.{expert}.{part}_proj.weight"] for part in ("gate", "up")]) for expert in range(7)]
    downs = [exact[f"0.{expert}.down_proj.weight"] for expert in range(7)]
    for count, per_token in ((3, 2), (40, 4)) if form in ("8 bits, minima", "4 bits, act-order") else ((5, 2),):
        x, weights, chosen = (
            (torch.randn(count, hidden) / 16).half(),
            torch.rand(count, per_token),
            anywhere(count, per_token),
        )
        right = expected(x, gate_ups, downs, weights, chosen, "silu")
        close(computed(experts, x, weights, chosen), right, 1e-3)


def test_what_can_not_be_multiplied_as_it_is() -> None:
    """Gate and up in different orders, and groups too small for a kernel: plain, as they mean."""
    matrices: dict[str, Packed] = {}
    for expert in range(2):
        for part in ("gate", "up"):
            matrices[f"0.{expert}.{part}_proj.weight"] = FORMS["4 bits, act-order"](16, 64, 32)
        matrices[f"0.{expert}.down_proj.weight"] = FORMS["8 bits"](64, 16, 2)
    checkpoint = Checkpoint(Stored(matrices), torch.float32, DEVICE, Group(), None, "stored")  # type: ignore[arg-type]  # all of it that is needed
    experts = FusedExperts.load(checkpoint, "0", shape(64), config(2, 16), "silu")
    for found, part in ((experts._gate_up, "up"), (experts._down, "down")):
        assert isinstance(found.weight, torch.Tensor)
        assert torch.equal(
            found.weight[-found.outs // (1 + (part == "up")) :].cpu(), matrices[f"0.1.{part}_proj.weight"].dequantize()
        )


def test_rounding_at_load() -> None:
    tensors = Given({f"0.0.{part}_proj.weight": torch.randn(64, 64) for part in ("gate", "up", "down")})
    checkpoint = Checkpoint(tensors, torch.float32, DEVICE, Group(), None, "fp8")
    experts = FusedExperts.load(checkpoint, "0", shape(64), config(1, 64), "silu")
    assert isinstance(experts._gate_up.weight, Coded) and isinstance(experts._down.weight, Coded)


def test_experts_are_quantized_one_by_one() -> None:
    """By ``quantize``, which has to see the input of each."""
    parts = [f"experts.{expert}.{part}_proj" for expert in range(2) for part in ("gate", "up", "down")]
    tensors: Any = Given(
        {f"0.mlp.{part}.weight": torch.zeros(32, 32) for part in parts} | {"0.mlp.gate.weight": torch.zeros(2, 32)}
    )
    sites = Sites(
        tensors=tensors, dtype=torch.float32, device=DEVICE, group=Group(), quantize="gptq", ready=lambda *_: None
    )  # type: ignore[arg-type,return-value]  # nothing is computed
    MoE.load(sites, "0", shape(32), config(2, 32), "silu")
    assert [site.name for site in sites.found[1:]] == [f"0.mlp.{part}" for part in parts if "up" not in part]


def test_ranks_add_up(pair: tuple[torch.nn.Module, dict[str, torch.Tensor], Experts]) -> None:
    """To transformers' own block, for every way of choosing experts."""
    theirs, stored, experts = pair
    x, into = torch.randn(2, 7, HIDDEN)
    right = into + 0.5 * theirs(x[None])[0]
    total = into.to(DEVICE)
    for rank in range(2):
        tensors = Given(stored)
        group = Group(rank, 2, Added())  # type: ignore[arg-type]  # all of it that is needed
        block = MoE.load(Checkpoint(tensors, torch.float32, DEVICE, group), "0", shape(HIDDEN), experts, "silu")
        assert isinstance(block._experts, FusedExperts)
        tensors.finish()
        block.add(total, x.to(DEVICE), 0.5)
    close(total, right.double(), 1e-5)


class Added:
    """Ranks that compute one after the other: what each has is added, and none sees the sum."""

    def total(self, x: torch.Tensor, into: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        assert into is not None
        return into.add_(x, alpha=factor)


def fused(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> tuple[DenseDecoder, list[FusedExperts]]:
    """A folder's model on Triton's kernels, and its blocks of experts."""
    parsed = check(read_config(folder))
    assert isinstance(parsed, DecoderConfig)
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    made: list[FusedExperts] = []
    of = FusedExperts.load
    monkeypatch.setattr(FusedExperts, "load", lambda *how: made.append(of(*how)) or made[-1])
    with open_weights(files, parsed, lambda done, total: None) as weights:
        model = DenseDecoder(parsed, Checkpoint(weights, dtype, DEVICE, Group(), None, "stored"), 64)
        weights.finish()
    return model, made


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_models(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers' making, beside the same on other kernels."""
    write_reference(tmp_path, VARIANTS[family][0], **VARIANTS[family][1])
    ours, made = fused(tmp_path, monkeypatch, torch.float32)
    assert made and not any(isinstance(block._gate_up.weight, Coded) for block in made)
    monkeypatch.setattr(Checkpoint, "triton", False)
    reference = load(tmp_path, DEVICE.type)
    for ids in (tokens(9).to(DEVICE), tokens(1).to(DEVICE)):
        expected = logits(reference, ids)
        assert expected.std() > 0.3, "logits this flat would hide a mistake"
        assert (logits(ours, ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["nf4", "fp8 blocks"])
def test_quantized_models(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reference(tmp_path, "mixtral", **MIXTRAL | {"num_hidden_layers": 1, "num_local_experts": 3})
    meant, _ = requantize(tmp_path, STORED[name], lambda name: ".experts." in name)
    ours, made = fused(tmp_path, monkeypatch, torch.float32)
    assert all(isinstance(block._gate_up.weight, Coded) and isinstance(block._down.weight, Coded) for block in made)
    monkeypatch.setattr(Checkpoint, "triton", False)
    reference = load(meant, DEVICE.type)
    for ids in (tokens(9).to(DEVICE), tokens(1).to(DEVICE)):
        assert (logits(ours, ids) - logits(reference, ids)).abs().max() < 1e-4
