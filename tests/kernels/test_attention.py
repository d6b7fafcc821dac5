"""Paged attention against its definition in float64, and against itself: a row's result is the same to the bit however
requests are cut, batched and laid out, and whatever number of threads there are."""

import random
from array import array
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.kernels.conftest import native
from tgi.attention.base import AttnSpec, Precision, Segment
from tgi.attention.native import NativeAttention
from tgi.core.model_config import Rope
from tgi.kernels.attention import PAGE, Layout, Step, angles, attend, turn
from tgi.kernels.library import Library
from tgi.kernels.ops import Form
from tgi.kernels.program import Program
from tgi.layers.attention import HeadNorm, Turn
from tgi.layers.rotary import Rotary

pytestmark = native

FORMS = (Form.FP32, Form.BF16, Form.INT8, Form.E4M3, Form.E5M2)
DTYPES = {Form.FP32: torch.float32, Form.BF16: torch.bfloat16}
FLOAT8 = {Form.E4M3: torch.float8_e4m3fn, Form.E5M2: torch.float8_e5m2}
SCALE = 0.3


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(x: torch.Tensor, form: Form, given: float = 1.0) -> torch.Tensor:
    """What a page keeps of x [..., dim]."""
    if form in DTYPES:
        return x.to(DTYPES[form]).float()
    top = x.abs().amax(-1, keepdim=True)
    if form in FLOAT8:
        scale = (top / torch.finfo(FLOAT8[form]).max).clamp(min=given)
        return (x * scale.reciprocal()).to(FLOAT8[form]).float() * scale
    most = torch.full_like(top, 127)  # by a number, torch multiplies with its inverse
    return (x * (most / top)).round() * (top / most)


def unpacked(pages: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, slots, kv heads, dim] of pages, read as csrc/attention.h says that they lie."""
    blocks, kv, dim, form = len(pages), layout.kv_heads, layout.dim, layout.form
    keys, values = pages[..., : layout.values].contiguous(), pages[..., layout.values :].contiguous()
    scales = []
    if form not in DTYPES:
        scales = [part[..., -4 * PAGE :].contiguous().view(torch.float32) for part in (keys, values)]
        keys, values = keys[..., : -4 * PAGE].contiguous(), values[..., : -4 * PAGE].contiguous()
    dtype = DTYPES.get(form, FLOAT8.get(form, torch.int8))
    if form in FLOAT8:  # of four neighbours, the second and third change places
        keys = keys.view(blocks, kv, dim // 4, 2, PAGE, 2).permute(0, 1, 2, 4, 5, 3).contiguous()
        values = values.view(blocks, kv, -1, PAGE // 4, 2, 16, 2).permute(0, 1, 2, 3, 5, 6, 4).contiguous()
        scales = [scale / (256 if form is Form.E4M3 else 1) for scale in scales]
    pack = 4 // dtype.itemsize
    k = keys.view(dtype).view(blocks, kv, dim // pack, PAGE, pack).permute(0, 3, 1, 2, 4).reshape(blocks, PAGE, kv, dim)
    panels = values.view(dtype).view(blocks, kv, -1, PAGE // pack, 16, pack)
    v = panels.permute(0, 3, 5, 1, 2, 4).reshape(blocks, PAGE, kv, -1)[..., : layout.size]
    if scales:
        return tuple(
            part.float() * scale.transpose(1, 2)[..., None] for part, scale in zip((k, v), scales, strict=True)
        )
    return k.float(), v.float()


class Request:
    """Random queries, keys and values: views of one projection, [tokens, its heads, dim]."""

    def __init__(self, tokens: int, layout: Layout) -> None:
        self.qkv = torch.randn(tokens, layout.width)
        self.q, self.k, self.v = Turn(layout.heads, layout.kv_heads, None, None, layout.latent)(self.qkv)

    def __len__(self) -> int:
        return len(self.qkv)

    def expected(self, layout: Layout, softcap: float | None, slopes: torch.Tensor | None = None) -> torch.Tensor:
        shared = layout.heads // layout.kv_heads
        k, v = (rounded(x, layout.form).double().repeat_interleave(shared, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q.double(), k) * SCALE
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.arange(len(self))[:, None] - torch.arange(len(self))
        if slopes is not None:
            scores = scores - slopes.double()[:, None, None] * behind
        hidden = (behind < 0) | (behind >= (layout.window or len(self)))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).float().flatten(1)


def serve(
    kernels: Library,
    layout: Layout,
    requests: Sequence[Request],
    chance: random.Random,
    *,
    lengths: Sequence[int],
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    begun: float = 1.0,
) -> list[torch.Tensor]:
    """All rows of each request, computed in chunks of some of ``lengths`` in steps of several requests each, over
    shuffled pages full of what is no number. ``begun``: how likely a request takes part in a step."""
    blocks = sum(-(-len(request) // PAGE) for request in requests) + 3
    pages = torch.full((blocks, layout.kv_heads, layout.page), 255, dtype=torch.uint8)
    free = chance.sample(range(blocks), blocks)
    tables = [array("i", [free.pop() for _ in range(-(-len(request) // PAGE))]) for request in requests]
    step = Step(kernels, layout, sum(map(len, requests)))
    outs: list[list[torch.Tensor]] = [[] for _ in requests]
    done = [0] * len(requests)
    while left := [i for i, request in enumerate(requests) if done[i] < len(request)]:
        chosen = [i for i in left if chance.random() < begun] or left[:1]
        chance.shuffle(chosen)
        ends = {i: min(done[i] + chance.choice(lengths), len(requests[i])) for i in chosen}
        step.plan([(done[i], ends[i] - done[i], tables[i]) for i in chosen])
        qkv = torch.cat([requests[i].qkv[done[i] : ends[i]] for i in chosen])
        turn(step, pages, qkv)
        out = attend(step, pages, qkv, scale=SCALE, softcap=softcap, slopes=slopes)
        for i, rows in zip(chosen, out.split([ends[i] - done[i] for i in chosen]), strict=True):
            outs[i].append(rows)
            done[i] = ends[i]
    return [torch.cat(rows) for rows in outs]


def random_layout(chance: random.Random, form: Form) -> Layout:
    kv = chance.choice([1, 2, 3])
    heads = kv * chance.choice([1, 2, 3, 4, 5, 7, 8, 13])
    window = chance.choice([None, None, 1, 5, 16, 100, 300])
    dim = chance.choice([4, 8, 16, 20, 64, 80, 96, 128])
    return Layout(heads, kv, dim, form, window, chance.choice([0, 0, dim - dim // 8 * 4]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(6))
def test_mixed_steps_equal_the_definition(kernels: Library, form: Form, seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(chance.choice([1, 2, 3]))
    layout = random_layout(chance, form)
    softcap = chance.choice([None, None, 2.0, 30.0])
    slopes = chance.choice([None, torch.logspace(-0.1, -2, layout.heads)])
    requests = [Request(chance.choice([1, 17, 90, 280, 600]), layout) for _ in range(3)]
    lengths = chance.choice([(600,), (1, 5, 16, 33, 100)])
    outs = serve(kernels, layout, requests, chance, lengths=lengths, softcap=softcap, slopes=slopes, begun=0.8)
    for request, out in zip(requests, outs, strict=True):
        torch.testing.assert_close(out, request.expected(layout, softcap, slopes), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_deepseeks_latent_keys(kernels: Library, form: Form) -> None:
    layout = Layout(16, 1, 576, form, latent=512)
    request = Request(70, layout)
    (out,) = serve(kernels, layout, [request], random.Random(0), lengths=(1, 33))
    torch.testing.assert_close(out, request.expected(layout, None), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(2))
def test_rows_are_the_same_to_the_bit_however_they_are_computed(kernels: Library, form: Form, seed: int) -> None:
    chance = random.Random(100 + seed)
    torch.manual_seed(seed)
    layout = random_layout(chance, form)
    requests = [Request(tokens, layout) for tokens in (700, 9, 60)]
    torch.set_num_threads(1)
    alone = [serve(kernels, layout, [request], chance, lengths=(700,))[0] for request in requests]
    for number, lengths in [(1, (1, 30, 64)), (2, (1, 100)), (2, (300,)), (3, (1, 256, 257)), (3, (650,))]:
        torch.set_num_threads(number)
        for out, once in zip(serve(kernels, layout, requests, chance, lengths=lengths, begun=0.7), alone, strict=True):
            assert torch.equal(out, once)


def test_no_token_sees_what_comes_later_or_lies_before_its_window(kernels: Library) -> None:
    """Not even what is no number, which would survive a multiplication by zero."""
    chance = random.Random(1)
    torch.manual_seed(1)
    layout = Layout(6, 2, 24, Form.FP32, window=50)
    request = Request(400, layout)
    (clean,) = serve(kernels, layout, [request], chance, lengths=(400,))
    request.k[200], request.v[200] = torch.nan, torch.inf
    (out,) = serve(kernels, layout, [request], chance, lengths=(400,))
    assert torch.equal(out[:200], clean[:200]) and torch.equal(out[250:], clean[250:])
    assert not out[200:250].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_stays_none(kernels: Library, form: Form) -> None:
    """An error of the model's must be seen, and not be rounded to a number."""
    layout = Layout(2, 1, 20, form)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for broken in "v" if bad == bad else "kv":  # an infinite key may well weigh nothing
            request = Request(5, layout)
            getattr(request, broken)[3, 0, 17] = bad
            (out,) = serve(kernels, layout, [request], random.Random(0), lengths=(5,))
            assert out[:3].isfinite().all() and not out[3:, 17].isfinite().any()


def test_prefix_hits_read_the_pages_of_others(kernels: Library) -> None:
    chance = random.Random(2)
    torch.manual_seed(2)
    layout = Layout(4, 2, 16, Form.BF16)
    request = Request(64, layout)
    (alone,) = serve(kernels, layout, [request], chance, lengths=(64,))
    pages = torch.zeros(8, 2, layout.page, dtype=torch.uint8)
    step = Step(kernels, layout, 64)
    step.plan([(0, 48, [5, 1, 4])])
    first = request.qkv[:48].clone()
    turn(step, pages, first)
    attend(step, pages, first, scale=SCALE)
    step.plan([(48, 16, [5, 1, 4, 7]), (47, 1, [5, 1, 4]), (32, 5, [5, 1, 2])])
    rows = torch.cat((request.qkv[48:], request.qkv[47:48], request.qkv[32:37]))
    turn(step, pages, rows)
    out = attend(step, pages, rows, scale=SCALE)
    assert torch.equal(out, torch.cat((alone[48:], alone[47:48], alone[32:37])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("latent", [0, 12])
@pytest.mark.parametrize("dim, partial", [(64, 1.0), (80, 1.0), (24, 0.5), (16, 1.0), (20, 0.2), (128, 0.25)])
def test_turning_norms_rotates_and_stores(kernels: Library, form: Form, latent: int, dim: int, partial: float) -> None:
    torch.manual_seed(dim)
    layout = Layout(6, 3, dim, form, latent=latent if partial < 1 else 0)
    rows = 21
    rope = Rope("default", 10000.0, partial)
    positions = torch.randint(0, 5000, (rows,))
    cos, sin = Rotary(rope, dim, 100, torch.device("cpu")).angles(positions)
    norm = HeadNorm(torch.randn(9, dim), 1e-5) if dim % 3 else None
    norm = None if layout.latent else norm
    qkv = torch.randn(rows, 12 * dim + 7)[:, : layout.width]
    q, k, v = Turn(6, 3, (cos, sin), norm, layout.latent)(qkv)
    pages = torch.zeros(7, 3, layout.page, dtype=torch.uint8)
    step = Step(kernels, layout, rows)
    step.plan([(14, 20, [6, 0, 3]), (0, 1, [2])])
    turn(step, pages, qkv, angles=(cos, sin), norm=None if norm is None else norm.weight, eps=1e-5)
    torch.testing.assert_close(qkv[:, : 6 * dim], q.flatten(1), atol=2e-6, rtol=1e-5)
    keys, values = unpacked(pages, layout)
    places = [(6, 14), (6, 15), *((0, slot) for slot in range(16)), (3, 0), (3, 1), (2, 0)]
    at, slot = torch.tensor(places).T
    tolerance = {Form.FP32: 2e-6, Form.BF16: 0.03, Form.INT8: 0.05, Form.E4M3: 0.07, Form.E5M2: 0.13}[form]
    torch.testing.assert_close(keys[at, slot], k, atol=tolerance, rtol=tolerance)
    assert torch.equal(values[at, slot], rounded(v, form))
    keys[at, slot] = values[at, slot] = 0
    assert not keys.any() and not values.any()


@pytest.mark.parametrize("form", FLOAT8)
def test_numbers_of_eight_bits_are_the_nearest(kernels: Library, form: Form) -> None:
    """With a scale that is given, and with one of the token's own where that is too small."""
    layout = Layout(1, 1, 640, form)
    numbers = torch.arange(128, dtype=torch.uint8).view(FLOAT8[form]).float()
    numbers = numbers[numbers.isfinite()]
    between = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, between, between * (1 + 2**-20), between * (1 - 2**-20)])
    exact = torch.cat([exact, -exact, torch.zeros(-2 * len(exact) % 640)]).view(-1, 640)
    rows = torch.cat([exact * 0.5, exact * 3, torch.randn(3, 640) * torch.logspace(-9, 9, 640)])
    qkv = torch.cat([rows, rows, rows / 4], 1)
    pages = torch.zeros(1, 1, layout.page, dtype=torch.uint8)
    step = Step(kernels, layout, len(rows))
    step.plan([(0, len(rows), [0])])
    turn(step, pages, qkv, scales=(0.5, 0.125))
    keys, values = unpacked(pages, layout)
    assert torch.equal(keys[0, : len(rows), 0], rounded(rows, form, 0.5))
    assert torch.equal(values[0, : len(rows), 0], rounded(rows / 4, form, 0.125))


def test_angles(kernels: Library) -> None:
    rotary = Rotary(Rope("default", 5e5), 64, 100, torch.device("cpu"))
    positions = torch.tensor([0, 1, 2, 17, 1000, 32767, 131071, 1 << 20])
    cos, sin = angles(kernels, positions, rotary.frequencies, 1.5)
    expected = positions[:, None].float() * rotary.frequencies
    torch.testing.assert_close(cos, 1.5 * expected.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, 1.5 * expected.sin(), atol=1e-6, rtol=0)


def test_recorded_steps_equal_those_run_one_by_one(kernels: Library) -> None:
    torch.manual_seed(3)
    layout = Layout(6, 2, 32, Form.BF16, window=20)
    frequencies = torch.rand(16)
    pages = torch.zeros(8, 2, layout.page, dtype=torch.uint8)
    step = Step(kernels, layout, 40)
    qkv, positions = torch.zeros(40, 10 * 32), torch.zeros(40, dtype=torch.int64)

    def forward() -> torch.Tensor:
        turn(step, pages, qkv, angles=angles(kernels, positions, frequencies))
        return attend(step, pages, qkv, scale=SCALE)

    program = Program(kernels, 40)
    out = program.record(forward)
    for segments in [[(0, 30, [1, 2]), (0, 3, [7])], [(30, 1, [1, 2]), (3, 12, [7])], [(31, 5, [1, 2, 4])]]:
        rows = sum(length for _, length, _ in segments)
        given = torch.randn(40, 10 * 32)
        positions[:rows] = torch.cat([torch.arange(start, start + length) for start, length, _ in segments])
        step.plan(segments)
        qkv.copy_(given)
        before = pages.clone()
        program.run(rows)
        recorded, written = out[:rows].clone(), pages.clone()
        pages.copy_(before)
        turn(step, pages, given[:rows], angles=angles(kernels, positions[:rows], frequencies))
        assert torch.equal(attend(step, pages, given[:rows], scale=SCALE), recorded)
        assert torch.equal(pages, written)


@pytest.mark.parametrize(
    "dim, compute, stored, device, reason",
    [
        (64, torch.float32, torch.int8, "cpu", None),
        (64, torch.float32, torch.float8_e4m3fn, "cpu", None),
        (64, torch.float32, torch.float16, "cpu", "no cache in torch.float16"),
        (64, torch.bfloat16, torch.bfloat16, "cpu", "no arithmetic in torch.bfloat16"),
        (6, torch.float32, torch.float32, "cpu", "no heads of 6 dimensions"),
        (644, torch.float32, torch.float32, "cpu", "no heads of 644 dimensions"),
        (64, torch.float32, torch.float32, "cuda", "not made for cuda"),
    ],
)
def test_the_backend_declines_what_the_kernel_cannot_do(
    dim: int, compute: torch.dtype, stored: torch.dtype, device: str, reason: str | None
) -> None:
    assert (
        NativeAttention.declines(AttnSpec(4, 2, dim, 0.1), Precision(compute, stored), torch.device(device)) == reason
    )


def test_the_backend_reads_a_layer_as_its_spec_says(kernels: Library) -> None:
    """Its memory grows with the steps; scale, window, soft-cap, norm and angles reach the kernel."""
    torch.manual_seed(4)
    layout = Layout(4, 2, 16, Form.FP32, window=6)
    norm, request = HeadNorm(torch.rand(6, 16), 1e-5), Request(30, layout)
    cosines, sines = Rotary(Rope("default", 10000.0), 16, 100, torch.device("cpu")).angles(torch.arange(30))
    spec = AttnSpec(4, 2, 16, SCALE, window=6, softcap=1.5)
    backend = NativeAttention(spec, Precision(torch.float32, torch.float32), torch.device("cpu"))
    pages, outs = backend.allocate(5), []
    for start, end in [(0, 3), (3, 20), (20, 21), (21, 30)]:
        rotation = Turn(4, 2, (cosines[start:end], sines[start:end]), norm)
        prepared = backend.prepare([Segment(start, end - start, [4, 2])])
        outs.append(prepared.run(pages, request.qkv[start:end].clone(), rotation))
    request.q, request.k, request.v = Turn(4, 2, (cosines, sines), norm)(request.qkv)
    torch.testing.assert_close(torch.cat(outs), request.expected(layout, 1.5), atol=2e-5, rtol=1e-4)
