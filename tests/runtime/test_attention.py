"""Every backend against attention written out per token, over shuffled pages."""

import random

import pytest
import torch

from tgi.attention.base import AttentionBackend, AttnSpec, Precision, Segment, choose
from tgi.attention.sdpa import SdpaAttention
from tgi.attention.triton import TritonAttention
from tgi.core.config import BLOCK_SIZE
from tgi.core.errors import StartupError
from tgi.layers.attention import Turn

BLOCKS = 64
PRECISION = Precision(torch.float32, torch.float32)
BACKENDS = [
    ("cpu", SdpaAttention),
    *(pytest.param("cuda", backend, marks=pytest.mark.gpu) for backend in (SdpaAttention, TritonAttention)),
]


def reference(
    spec: AttnSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One token's attention. q: [heads, dim]; k, v: [context, kv heads, dim] up to the token itself."""
    first = 0 if spec.window is None else max(position - spec.window + 1, 0)
    outs = []
    for head in range(spec.heads):
        kv = head // (spec.heads // spec.kv_heads)
        scores = (k[first : position + 1, kv].double() @ q[head].double()) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        if spec.slopes is not None:
            scores -= spec.slopes[head] * torch.arange(len(scores) - 1, -1, -1)
        if sinks is not None:
            scores = torch.cat((scores, sinks[head : head + 1]))
        outs.append(scores.softmax(0)[: position + 1 - first] @ v[first : position + 1, kv].double())
    return torch.cat(outs).float()


@pytest.mark.parametrize("device, kind", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("seed", range(4))
def test_mixed_steps_equal_the_definition(device: str, kind: type[AttentionBackend], window: int | None, seed: int):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads = chance.choice([1, 2, 3])
    heads = kv_heads * chance.choice([1, 3])
    slopes = chance.choice([None, tuple(0.5**head for head in range(heads))])
    dim, softcap = chance.choice([8, 16]), chance.choice([None, 1.5])
    spec = AttnSpec(heads, kv_heads, dim, 0.3, window, softcap, slopes, sinks=seed == 3)
    sinks = torch.randn(heads) if spec.sinks else None
    backend = kind(spec, PRECISION, torch.device(device))
    pages = backend.allocate(BLOCKS).fill_(float("nan"))  # left by a request that failed
    free = chance.sample(range(BLOCKS), BLOCKS)
    requests = []
    for _ in range(6):
        total = chance.randrange(1, 150)
        table = [free.pop() for _ in range(-(-total // BLOCK_SIZE))]
        q = torch.randn(total, spec.heads, spec.head_dim)
        k, v = torch.randn(2, total, spec.kv_heads, spec.head_dim)
        requests.append((total, table, q, k, v))
    done = [0] * len(requests)
    while any(at < request[0] for at, request in zip(done, requests, strict=True)):
        segments, parts = [], []
        for number, (total, table, q, k, v) in enumerate(requests):
            length = min(chance.choice([1, 1, 1, 5, 16, 33]), total - done[number])
            if length and chance.random() < 0.9:
                span = slice(done[number], done[number] + length)
                segments.append(Segment(done[number], length, table))
                parts.append((number, span, q[span], k[span], v[span]))
        if not segments:
            continue
        qkv = torch.cat([torch.cat([part[i] for part in parts]) for i in (2, 3, 4)], dim=1).flatten(1).to(device)
        turn = Turn(spec.heads, spec.kv_heads, None, None, sinks=None if sinks is None else sinks.to(device))
        out = backend.prepare(segments).run(pages, qkv, turn).cpu()
        at = 0
        for number, span, _, _, _ in parts:
            _, _, q, k, v = requests[number]
            for position in range(span.start, span.stop):
                expected = reference(spec, q[position], k, v, position, sinks)
                torch.testing.assert_close(out[at], expected, atol=2e-5, rtol=1e-4)
                at += 1
            done[number] = span.stop


@pytest.mark.parametrize("device, kind", BACKENDS)
@pytest.mark.parametrize(("stored", "most"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_float8_keeps_the_largest_and_what_is_no_number(
    device: str, kind: type[AttentionBackend], stored: torch.dtype, most: float
):
    backend = kind(AttnSpec(1, 1, 8, 1.0), Precision(torch.float32, stored), torch.device(device))
    pages = backend.allocate(1)
    v = torch.tensor([0.3, -1e6, 1e6, torch.nan, torch.inf, -torch.inf, 0.0, -7.0], device=device)
    qkv = torch.cat((torch.zeros(16, device=device), v))[None]
    out = backend.prepare([Segment(0, 1, [0])]).run(pages, qkv, Turn(1, 1, None, None))
    expected = [torch.tensor(0.3).to(stored).item(), -most, most, *3 * [torch.nan], 0.0, -7.0]
    torch.testing.assert_close(out[0].cpu(), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_no_backend_for_a_spec_is_an_error_with_each_reason():
    precision = Precision(torch.float32, torch.int8)
    with pytest.raises(StartupError, match=r"sdpa: no cache in torch\.int8"):
        choose(AttnSpec(2, 2, 8, 1.0), precision, torch.device("cpu"), [SdpaAttention])
