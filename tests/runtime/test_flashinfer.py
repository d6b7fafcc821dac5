"""How FlashInfer is asked, by a stand-in for it, and that it is used by name alone."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tgi.attention import flashinfer
from tgi.attention.base import AttnSpec, Precision, Segment
from tgi.attention.flashinfer import FlashInferAttention
from tgi.core.config import KVPool
from tgi.core.errors import StartupError
from tgi.layers.attention import Turn
from tgi.runtime.kvcache import KVCache

pytest.importorskip("triton")

BF16 = Precision(torch.bfloat16, torch.bfloat16)
SPEC = AttnSpec(8, 2, 64, 0.1, window=40, softcap=30.0)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Wrapper:
    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        self.layout = layout

    def plan(self, *args: Any, **options: Any) -> None:
        self.planned = [arg.tolist() if isinstance(arg, torch.Tensor) else arg for arg in args]
        self.options = options

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.cache = cache
        return q


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: module)
    monkeypatch.setattr("tgi.attention.triton.runs_on", lambda device: True)


def test_a_step_is_planned_once(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FlashInferAttention(SPEC, BF16, CPU)
    prepared = backend.prepare([Segment(31, 1, [4, 2]), Segment(0, 5, [1]), Segment(16, 20, [3, 0, 5, 6])])
    wrapper = backend.wrapper
    assert wrapper.layout == "HND"
    assert wrapper.planned == [[0, 1, 6, 26], [0, 2, 3, 6], [4, 2, 1, 3, 0, 5], [16, 5, 4], 8, 2, 64, 16]
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    assert wrapper.options == {"causal": True, "sm_scale": 0.1, "window_left": 39, "logits_soft_cap": 30.0, **types}
    stored = torch.randn(26, 8, 64)
    monkeypatch.setattr(backend.pages, "store", lambda *args: stored)
    pages = backend.allocate(7)
    out = prepared.run(pages, torch.zeros(26, 12 * 64), Turn(8, 2, None, None))
    assert torch.equal(out, stored.flatten(1))
    # [pages, kv heads, slots, dim], each a view of our pages.
    assert [part.shape for part in wrapper.cache] == [(7, 2, 16, 64)] * 2
    pages[3, 1, 1, 7] = 1
    assert not wrapper.cache[0].any() and wrapper.cache[1][3, 1, 7].all()


@pytest.mark.parametrize(
    "spec, precision, device, reason",
    [
        (SPEC, BF16, CPU, "not made for cpu"),
        (AttnSpec(2, 1, 576, 0.1, latent=512), BF16, GPU, "no latent keys, slopes or sinks"),
        (AttnSpec(2, 1, 80, 0.1), BF16, GPU, "no heads of 80 dimensions"),
        (SPEC, Precision(torch.bfloat16, torch.bfloat16, fixed=True), GPU, "a row's result depends on the others"),
        (
            SPEC,
            Precision(torch.bfloat16, torch.float8_e5m2),
            GPU,
            "no cache in torch.float8_e5m2 with arithmetic in torch.bfloat16",
        ),
        (SPEC, BF16, GPU, None),
    ],
)
def test_it_declines_what_it_is_not_asked(
    installed: None, spec: AttnSpec, precision: Precision, device: torch.device, reason: str | None
) -> None:
    assert FlashInferAttention.declines(spec, precision, device) == reason


def test_a_cache_uses_the_backend_that_is_named() -> None:
    precision, pools = Precision(torch.float32, torch.float32), [KVPool(4, None)]
    assert KVCache([SPEC], pools, precision, CPU, "sdpa").names == ["sdpa"]
    with pytest.raises(StartupError, match=r"flashinfer: not installed$"):
        KVCache([SPEC], pools, precision, CPU, "flashinfer")
