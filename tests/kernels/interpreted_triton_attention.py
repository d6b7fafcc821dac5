"""Paged attention by Triton's kernels: on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

test_triton_attention.py runs these in a process of their own. The interpreter multiplies bfloat16 wrongly, and
rounds to float8 wrongly: it is float16 that tiles are tested with, and numbers of eight bits are such already.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tgi.attention.base import AttnSpec, Precision, Segment
from tgi.attention.placed import PADDING, Placed
from tgi.attention.triton import TritonAttention
from tgi.core.config import BLOCK_SIZE
from tgi.kernels.triton import attention as kernels
from tgi.layers.attention import HeadNorm, Turn

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SINGLE = Precision(torch.float32, torch.float32)
HALF = Precision(torch.float16, torch.float16)
SCALE = 0.3


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_PROGRAMS", 1)  # of which each takes a millisecond


class Request:
    """Random queries, keys and values in one projection."""

    def __init__(self, tokens: int, spec: AttnSpec, dtype: torch.dtype = torch.float32) -> None:
        heads = spec.heads + (1 if spec.latent else 2) * spec.kv_heads
        self.qkv = torch.randn(tokens, heads * spec.head_dim).to(dtype)

    def __len__(self) -> int:
        return len(self.qkv)

    def expected(self, spec: AttnSpec, turn: Turn, stored: torch.dtype) -> torch.Tensor:
        """By the definition, of keys and values as they are stored."""
        q, k, v = turn(self.qkv)
        shared = spec.heads // spec.kv_heads
        key, value = turn.scales
        k, v = ((x / s).to(stored).double() * s for x, s in ((k, key), (v, key if spec.latent else value)))
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        behind = torch.arange(len(self))[:, None] - torch.arange(len(self))
        if spec.slopes is not None:
            scores = scores - torch.tensor(spec.slopes).double()[:, None, None] * behind
        hidden = (behind < 0) | (behind >= (spec.window or len(self)))
        scores = scores.masked_fill(hidden, -torch.inf)
        if turn.sinks is not None:
            sinks = turn.sinks.double().cpu()[:, None, None].expand(-1, len(self), 1)
            scores = torch.cat((scores, sinks), -1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(self)], v).flatten(1)


def serve(
    spec: AttnSpec,
    precision: Precision,
    requests: Sequence[Request],
    chance: random.Random,
    *,
    lengths: Sequence[int],
    turn: Turn,
    begun: float = 1.0,
    padded: int = 0,
) -> list[torch.Tensor]:
    """All rows of each request, computed in chunks of some of ``lengths`` in steps of several requests each, single
    tokens first, over shuffled pages full of what is no number. ``begun``: how likely a request takes part in a step.
    ``padded``: tokens of nobody in each step."""
    backend = TritonAttention(spec, precision, DEVICE)
    blocks = sum(-(-len(request) // BLOCK_SIZE) for request in requests) + 3
    pages = backend.allocate(blocks)
    pages.view(torch.uint8).fill_(0 if INTERPRETED and precision.stored.itemsize == 1 else 255)
    free = chance.sample(range(blocks), blocks)
    tables = [array("i", [free.pop() for _ in range(-(-len(request) // BLOCK_SIZE))]) for request in requests]
    untouched = [pages[block].clone() for block in free]
    outs: list[list[torch.Tensor]] = [[] for _ in requests]
    done = [0] * len(requests)
    while left := [i for i, request in enumerate(requests) if done[i] < len(request)]:
        chosen = [i for i in left if chance.random() < begun] or left[:1]
        ends = {i: min(done[i] + chance.choice(lengths), len(requests[i])) for i in chosen}
        chosen.sort(key=lambda i: ends[i] - done[i] > 1)
        segments = [PADDING] * padded + [Segment(done[i], ends[i] - done[i], tables[i]) for i in chosen]
        idle = torch.full((padded, requests[0].qkv.shape[1]), torch.nan, dtype=precision.compute)
        qkv = torch.cat([idle, *(requests[i].qkv[done[i] : ends[i]] for i in chosen)])
        out = backend.prepare(segments).run(pages, qkv.to(DEVICE), turn).cpu()
        assert not out[:padded].any()
        for i, rows in zip(chosen, out[padded:].split([ends[i] - done[i] for i in chosen]), strict=True):
            outs[i].append(rows)
            done[i] = ends[i]
    for block, before in zip(free, untouched, strict=True):
        assert torch.equal(pages[block].view(torch.uint8), before.view(torch.uint8))
    return [torch.cat(rows) for rows in outs]


def check(spec: AttnSpec, precision: Precision, requests: Sequence[Request], turn: Turn, **how: object) -> None:
    chance = random.Random(0)
    outs = serve(spec, precision, requests, chance, turn=turn, **how)  # type: ignore[arg-type]  # of several
    error = {torch.float32: 1e-5, torch.float16: 4e-3}[precision.compute]
    for request, out in zip(requests, outs, strict=True):
        expected = request.expected(spec, turn, precision.stored)
        torch.testing.assert_close(out.double(), expected, atol=error, rtol=error)


def plain(spec: AttnSpec, **fields: object) -> Turn:
    return Turn(spec.heads, spec.kv_heads, None, None, spec.latent, **fields)  # type: ignore[arg-type]  # of several


@pytest.mark.parametrize("seed", range(8))
def test_mixed_steps_equal_the_definition(seed: int) -> None:
    chance = random.Random(seed)
    precision = (SINGLE, HALF)[seed % 2]
    shared = (1, 2, 3, 4, 5, 8, 13, 20)[seed]
    kv_heads = chance.choice([1, 2, 3]) if shared < 5 else 1
    heads = kv_heads * shared
    dim = chance.choice([8, 20, 64, 80, 96, 128, 256])
    spec = AttnSpec(
        heads,
        kv_heads,
        dim,
        0.1,
        chance.choice([None, 1, 5, 16, 40]),
        chance.choice([None, None, 2.0, 30.0]),
        chance.choice([None, tuple(0.9 * 0.7**head for head in range(heads))]),
        chance.choice([0, 0, dim - dim // 8 * 2]),
        chance.choice([False, True]),
    )
    requests = [Request(tokens, spec, precision.compute) for tokens in (chance.choice([1, 17]), 70, 40)]
    turn = plain(spec, sinks=torch.randn(heads, device=DEVICE) if spec.sinks else None)
    lengths = (70,) if seed > 4 else (1, 16, 33)
    check(spec, precision, requests, turn, lengths=lengths, begun=0.8, padded=seed % 3)


def test_deepseeks_latent_keys() -> None:
    spec = AttnSpec(16, 1, 576, 0.04, latent=512)
    check(spec, HALF, [Request(50, spec, torch.float16)], plain(spec), lengths=(1, 33))


@pytest.mark.parametrize(
    "stored, latent", [(torch.float8_e4m3fn, 0), (torch.float8_e5m2, 0), (torch.float8_e4m3fn, 32)]
)
def test_caches_of_eight_bits(stored: torch.dtype, latent: int) -> None:
    spec = AttnSpec(4, 2, 40, 0.3, latent=latent)
    request = Request(40, spec)
    request.qkv = torch.randint(-8, 9, request.qkv.shape) / 4
    scales = (0.25, 0.5) if stored == torch.float8_e4m3fn else (1.0, 1.0)
    check(spec, Precision(torch.float32, stored), [request], plain(spec, scales=scales), lengths=(1, 9))


@pytest.mark.parametrize(
    "dim, partial, latent", [(64, 1.0, 0), (80, 0.4, 0), (24, 0.5, 12), (20, 0.0, 0), (12, 0.0, 12)]
)
def test_storing_norms_rotates_and_writes(dim: int, partial: float, latent: int) -> None:
    backend = TritonAttention(
        AttnSpec(6, 3, dim, SCALE, latent=latent), Precision(torch.float32, torch.float16), DEVICE
    )
    rows, half = 23, int(dim * partial) // 2
    angles = (torch.randn(rows, half, device=DEVICE), torch.randn(rows, half, device=DEVICE)) if half else None
    norm = None if latent else HeadNorm(torch.randn(9, dim, device=DEVICE), 1e-5)
    width = (9 if latent else 12) * dim
    qkv = torch.randn(rows, width + 7, device=DEVICE)[:, :width]
    q, k, v = Turn(6, 3, angles, norm, latent)(qkv)
    placed = Placed.of([PADDING, Segment(14, 20, [6, 0, 3]), Segment(0, 1, [2]), PADDING], DEVICE)
    pages, weight = backend.allocate(7), None if norm is None else norm.weight
    step = kernels.Step(*placed[:5])
    found = kernels.store(backend.layout, step, pages, qkv, angles=angles, norm=weight, eps=1e-5)
    torch.testing.assert_close(found, q, atol=2e-6, rtol=1e-5)
    places = [(6, 14), (6, 15), *((0, slot) for slot in range(16)), (3, 0), (3, 1), (2, 0)]
    at, slot = torch.tensor(places, device=DEVICE).T
    for kind, x in enumerate((k, v)[: pages.shape[2]]):
        torch.testing.assert_close(pages[at, :, kind, slot].float(), x[1:22], atol=2e-3, rtol=2e-3)
    pages[at, :, :, slot] = 0
    assert not pages.any()


@pytest.mark.parametrize("stored, most", [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_numbers_of_eight_bits_keep_the_largest(stored: torch.dtype, most: float) -> None:
    backend = TritonAttention(AttnSpec(1, 1, 4, 1.0), Precision(torch.float32, stored), DEVICE)
    qkv = torch.tensor([[0.0] * 8 + [0.3125, -1e6, 1e6, -7.0]], device=DEVICE)
    out = backend.prepare([Segment(0, 1, [0])]).run(backend.allocate(1), qkv, Turn(1, 1, None, None))
    assert out[0].tolist() == [0.3125, -most, most, -7.0]


def in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A product whose rows don't depend on where they are, as on tensor cores: numpy's do."""
    out = np.zeros((a.shape[0], b.shape[1]), dtype)
    for column, row in zip(a.T.astype(dtype), b.astype(dtype), strict=True):
        out += column[:, None] * row
    return out


@pytest.mark.parametrize("spec", [AttnSpec(2, 1, 32, SCALE, window=60), AttnSpec(3, 1, 48, SCALE, latent=32)])
def test_fixed_rows_are_the_same_to_the_bit_however_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, spec: AttnSpec
) -> None:
    if INTERPRETED:
        monkeypatch.setattr(np, "matmul", in_order)
    chance = random.Random(1)
    turn = plain(spec)
    requests = [Request(tokens, spec) for tokens in (90, 9, 30)]
    precision = replace(SINGLE, fixed=True)
    alone = [serve(spec, precision, [request], chance, lengths=(90,), turn=turn)[0] for request in requests]
    for request, once in zip(requests, alone, strict=True):
        expected = request.expected(spec, turn, torch.float32)
        torch.testing.assert_close(once.double(), expected, atol=1e-5, rtol=1e-5)
    for lengths in ((1, 29), (1, 1, 30)):
        outs = serve(spec, precision, requests, chance, lengths=lengths, turn=turn, begun=0.7)
        assert all(map(torch.equal, outs, alone))
