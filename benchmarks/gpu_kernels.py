"""Kernels by themselves: what the device allows, attention, linear layers, sampling."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention

import linear
from device import Trace, copied, multiplied, seconds
from gpu_run import Run
from tgi.attention.base import AttentionBackend, AttnSpec, Precision, Segment
from tgi.attention.placed import Placed
from tgi.core.config import BLOCK_SIZE
from tgi.core.messages import Sampling, Submit, Token
from tgi.core.plan import Work
from tgi.kernels.triton import runs_on
from tgi.layers.attention import Turn
from tgi.runtime.kvcache import BACKENDS
from tgi.runtime.sampler import Sampler
from tgi.runtime.triton_sampler import TritonSampler


def ceilings(run: Run) -> None:
    """The rooflines: copies, of which small ones stay in a cache, and matrix products."""
    copies = {count: copied(count, run.device) for count in run.sizes.copies}
    found = {"read_gb_s": copies[max(copies)], "copies_gb_s": copies, "where": str(run.device)}
    if run.device.type != "cpu":
        found["gpu"] = torch.get_device_module(run.device).get_device_name()
    found["gemm_gflop_s"] = multiplied(run.sizes.gemm, torch.bfloat16, run.device)
    with run.attempt("float8"):
        found["float8_gflop_s"] = multiplied(run.sizes.gemm, torch.float8_e4m3fn, run.device)
    run.journal.write("ceiling", **found, threads=torch.get_num_threads())


def attention(run: Run) -> None:
    """Decoding by batch and context, then prompts, by every backend that there is."""
    sizes, device = run.sizes, run.device
    heads, kv_heads, dim = (sizes.model[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    spec = AttnSpec(heads, kv_heads, dim, dim**-0.5)
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        precision = Precision(compute, stored)
        for made in BACKENDS:
            if made.declines(spec, precision, device) is not None:
                continue
            for batch, context in product(sizes.batches, sizes.contexts):
                # Without a kernel of its own it gathers what it reads; a few sizes tell how much that costs.
                if made.name == "sdpa" and batch * context > 1 << 16:
                    continue
                with run.attempt(f"{made.name}, decode, {batch} of {context}, {stored}"):
                    backend = made(spec, precision, device)
                    _decode(run, backend, spec, precision, batch, context)
    precision = Precision(compute, compute)
    for tokens in sizes.prompts:
        flop = 2 * tokens * tokens * heads * dim  # half of all pairs
        cell = {"what": "prompt", "batch": 1, "context": tokens, "cache": _name(compute), "flop": flop}
        for made in BACKENDS:
            if made.declines(spec, precision, device) is None:
                with run.attempt(f"{made.name}, prompt of {tokens}"):
                    work, _ = layers(made(spec, precision, device), spec, precision, [0], tokens, 1)
                    run.journal.write("attention", backend=made.name, **cell, seconds=seconds(work, device))
        q = torch.randn(heads, tokens, dim, dtype=compute, device=device)
        k, v = torch.randn(2, kv_heads, tokens, dim, dtype=compute, device=device)
        for name, attend in _OTHERS.items():
            with run.attempt(f"{name}, prompt of {tokens}"):
                each = seconds(attend(q, k, v), device)
                run.journal.write("attention", backend=name, **cell, seconds=each)


def _decode(
    run: Run, backend: AttentionBackend, spec: AttnSpec, precision: Precision, batch: int, context: int
) -> None:
    """As many layers as no cache holds, each with pages of its own; a step of all of them."""
    size = batch * context * 2 * spec.kv_heads * spec.head_dim * precision.stored.itemsize
    count = max(1, min(math.ceil(run.sizes.working_set / size), 32))
    work, _ = layers(backend, spec, precision, [context - 1] * batch, 1, count)
    each = seconds(work, run.device) / count
    cell = {"what": "decode", "batch": batch, "context": context, "cache": _name(precision.stored), "bytes": size}
    run.journal.write("attention", backend=backend.name, **cell, seconds=each)


def layers(
    backend: AttentionBackend, spec: AttnSpec, precision: Precision, starts: Sequence[int], length: int, count: int
) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """What layers do in a step of segments that begin there; pages lie anywhere. And what each returned at last."""
    device = backend.allocate(1).device
    segments, pages = paged(starts, length)
    caches = [backend.allocate(pages) for _ in range(count)]
    for cache in caches:
        randomized(cache)
    tokens = length * len(starts)
    qkv = torch.randn(tokens, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, device=device, dtype=precision.compute)
    angles = torch.randn(tokens, spec.head_dim // 2, device=device)
    turn = Turn(spec.heads, spec.kv_heads, (angles.cos(), angles.sin()), None)
    placed = Placed.of(segments, device)
    prepared = backend.prepare(segments, placed)
    outs = [torch.empty(0)] * count

    def work() -> None:
        for layer, cache in enumerate(caches):
            outs[layer] = prepared.run(cache, qkv, turn)

    return torch.inference_mode()(work), outs


def paged(starts: Sequence[int], length: int) -> tuple[list[Segment], int]:
    """Segments with pages in random order, and how many these are."""
    each = [-(-(start + length) // BLOCK_SIZE) for start in starts]
    order = iter(torch.randperm(sum(each)).tolist())
    return [Segment(s, length, [next(order) for _ in range(n)]) for s, n in zip(starts, each, strict=True)], sum(each)


def randomized(cache: torch.Tensor) -> None:
    """Fill pages, whatever their numbers: bytes that are small finite ones in all of float8's forms."""
    if cache.dtype.itemsize > 1:
        cache.normal_()
    else:
        cache.view(torch.uint8).random_(0, 64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    return partial(scaled_dot_product_attention, q[None], k[None], v[None], is_causal=True, enable_gqa=True)


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    from flashinfer import single_prefill_with_kv_cache  # type: ignore[import-not-found]  # optional

    return partial(single_prefill_with_kv_cache, *(x.transpose(0, 1).contiguous() for x in (q, k, v)), causal=True)


_OTHERS = {"torch": _torch} | ({"flashinfer": _flashinfer} if find_spec("flashinfer") else {})
"""Attention of one prompt without pages: [heads, tokens, dim] of q, k and v → what computes it."""


def linears(run: Run) -> None:
    """linear.py's measurement: first compared with the product by float32 weights."""
    forms = ("F.linear", "e4m3", "int4/128") if run.device.type != "cpu" else ("F.linear", "bf16", "int8/32")
    for (out, inner), form in product(run.sizes.matrices, forms):
        with run.attempt(f"{form}, {out} x {inner}"):
            linear.measure(form, out, inner, run.sizes.rows, run.device.type, run.journal.write, run.sizes.working_set)


WISHES = {
    "greedy": Sampling(),
    "temperature": Sampling(greedy=False, temperature=0.8),
    "top-k, top-p": Sampling(greedy=False, temperature=0.8, top_k=50, top_p=0.9),
    "penalties": Sampling(greedy=False, temperature=0.8, repetition_penalty=1.1, presence_penalty=0.1),
    "5 most likely": Sampling(top_n_tokens=5),
}


def sampling(run: Run) -> None:
    """The time in the kernels that draw, and in which."""
    vocabulary = run.sizes.model["vocab_size"]
    for rows, (name, wish) in product(run.sizes.drawn, WISHES.items()):
        with run.attempt(f"{name}, {rows} rows"):
            logits = torch.randn(rows, vocabulary, device=run.device)
            draw = drawing(logits, wish)
            draw()
            kernels = Trace.of(draw, run.device).kernels()
            longest = {kernel: total for kernel, (_, total) in [*kernels.items()][:8]}
            cell = {"wish": name, "rows": rows, "vocabulary": vocabulary, "bytes": logits.nbytes}
            run.journal.write("sampling", **cell, seconds=seconds(draw, run.device, graph=False), kernels=longest)


def drawing(logits: torch.Tensor, wish: Sampling) -> Callable[[], Sequence[Token | None]]:
    """What draws a token for each row, as on a device without kernels of the CPU's."""
    rows, vocabulary = logits.shape
    ids = [[(row + 7 * at) % vocabulary for at in range(100)] for row in range(rows)]
    works = [
        Work(Submit(row, own, 90, 20, [], wish, 0.0), own, 99, 1, 100, True, [], {}) for row, own in enumerate(ids)
    ]
    triton = TritonSampler(vocabulary, logits.device) if runs_on(logits.device) else None
    return torch.inference_mode()(lambda: Sampler(None, triton=triton).draw(logits, works).read())
