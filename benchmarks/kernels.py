"""The pieces that a step is made of, against their alternatives: linear layers and paged attention on CPU.

    python benchmarks/kernels.py

Weights and pages are rotated, so that they come from memory and not from a cache. Medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from tgi.attention.base import AttnSpec, Segment
from tgi.attention.sdpa import SdpaAttention
from tgi.core.config import BLOCK_SIZE
from tgi.quantization.base import LinearMethod, PackedLinear, PlainLinear

WORKING_SET = 60_000_000
"""Numbers in all weights of one measurement: 240 MB."""


def seconds(work: Callable[[], object], runs: int = 9) -> float:
    work()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def linear(out: int, inner: int) -> None:
    copies = max(1, WORKING_SET // (out * inner))
    weights = [torch.randn(out, inner) for _ in range(copies)]
    plain: list[LinearMethod] = [PlainLinear(weight, None) for weight in weights]
    packed: list[LinearMethod] = [PackedLinear(weight, None) for weight in weights]
    print(f"\n{out} x {inner}, GFLOP/s\n")
    print("| rows | F.linear | packed | each row bit-equal to itself alone |\n|---|---|---|---|")
    for rows in (1, 2, 8, 32, 128, 512):
        x = torch.randn(rows, inner)
        rates = [
            2e-9 * rows * out * inner * copies / seconds(partial(all_of, methods, x)) for methods in (plain, packed)
        ]
        equal = torch.equal(packed[0](x), torch.cat([packed[0](x[row : row + 1]) for row in range(rows)]))
        print(f"| {rows} | {rates[0]:.0f} | {rates[1]:.0f} | {equal} |", flush=True)


def all_of(methods: Sequence[LinearMethod], x: torch.Tensor) -> None:
    for method in methods:
        method(x)


def attention(requests: int, context: int) -> None:
    """One decoding step of one layer: our padded gather, and one call of SDPA for each request."""
    spec = AttnSpec(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    backend = SdpaAttention(spec, torch.float32, torch.device("cpu"))
    width = -(-context // BLOCK_SIZE)
    pages = backend.allocate(requests * width).normal_()
    order = torch.randperm(requests * width).view(requests, width)
    q, k, v = (torch.randn(requests, heads, 64) for heads in (9, 3, 3))
    prepared = backend.prepare([Segment(context - 1, 1, blocks) for blocks in order.tolist()])

    def one_by_one() -> list[torch.Tensor]:
        outs = []
        for request in range(requests):
            kv = pages[order[request]].view(-1, 2, 3, 64)[:context]
            keys, values = kv[:, 0].transpose(0, 1)[None], kv[:, 1].transpose(0, 1)[None]
            outs.append(scaled_dot_product_attention(q[request].view(1, 3, 3, 64), keys, values))
        return outs

    padded = 1e3 * seconds(lambda: prepared.run(pages, q, k, v))
    single = 1e3 * seconds(one_by_one)
    print(f"| {requests} | {context} | {padded:.3f} | {single:.3f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    for out, inner in ((960, 576), (3072, 576), (576, 1536), (49152, 576)):
        linear(out, inner)
    print(
        "\nDecoding attention, ms a layer\n\n| requests | context | one padded batch | one by one |\n|---|---|---|---|"
    )
    for requests, context in ((1, 256), (8, 256), (32, 256), (8, 1024), (32, 1024)):
        attention(requests, context)


if __name__ == "__main__":
    main()
