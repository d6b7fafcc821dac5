"""Mixtures of experts and paged attention on CPU, beside torch's; linear.py has the linear layers.

    python benchmarks/kernels.py
    OMP_NUM_THREADS=1 python benchmarks/kernels.py --rows 1 8 --only experts

Weights and pages are rotated, so that they come from memory and not from a cache. Medians.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from device import seconds
from linear import WORKING_SET
from tgi.attention.base import AttnSpec, Precision, Segment
from tgi.core.config import BLOCK_SIZE
from tgi.core.model_config import Experts, ModelShape, Routing
from tgi.kernels.library import Library, library
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.moe import ExpertsMethod, GroupedExperts, SeparateExperts
from tgi.parallel import Group
from tgi.runtime.kvcache import BACKENDS

PARTS = ("experts", "attention")
CPU = torch.device("cpu")


class Random:
    """A checkpoint of whatever is asked for."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape)

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
        return torch.randn(shape)

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        pass

    def factor(self, name: str) -> float | None:
        return None


def experts(rows: Sequence[int]) -> None:
    """A layer of Granite 3.0 1B: eight of 32 experts for each token, by one product or one expert after the other."""
    shape = ModelShape("", 1, 1024, 16, 8, 64, 512, 0, 0, True)
    routing = Routing(per_token=8, norm=1.0)
    config = Experts(block="", count=32, intermediate=512, routing=routing, layers=(True,))
    print("\n8 of 32 experts of 512 x 1024, ms\n")
    print(f"| experts |{''.join(f' {count} |' for count in rows)}\n|---|{'---|' * len(rows)}")
    native = library()
    ways: list[tuple[str, Library | None, torch.dtype, str | None, float]] = [("torch", None, torch.float32, None, 4.0)]
    if native is not None:
        ways += [("fp32", native, torch.float32, None, 4.0), ("bf16", native, torch.bfloat16, None, 2.0)]
        ways += [("int8", native, torch.float32, "int8", 1.0625), ("int4", native, torch.float32, "int4", 0.5625)]
    for form, kernels, dtype, quantize, of_each in ways:
        checkpoint = Checkpoint(Random(), dtype, torch.device("cpu"), Group(), kernels, quantize)
        copies = max(1, int(WORKING_SET / (of_each * 3 * 32 * 512 * 1024)))
        made: dict[str, list[ExpertsMethod]] = {
            "one by one": [SeparateExperts.load(checkpoint, "", shape, config, "silu") for _ in range(copies)]
        }
        if kernels is not None:
            load = partial(GroupedExperts.load, checkpoint, kernels)
            made["grouped"] = [load("", shape, config, "silu") for _ in range(copies)]
        for name, layers in made.items():
            cells = []
            for count in rows:
                x, products = torch.randn(count, 1024), torch.randn(count, 32)
                cells.append(f"{1e3 * seconds(partial(all_experts, layers, x, products, routing), CPU) / copies:.2f}")
            print(f"| {form}, {name} | {' | '.join(cells)} |", flush=True)


def all_experts(layers: Sequence[ExpertsMethod], x: torch.Tensor, products: torch.Tensor, routing: Routing) -> None:
    for layer in layers:
        layer.add(torch.zeros_like(x), x, *layer.route(products, routing), 1.0)


class Split:
    """q, k and v as they come: nothing turns."""

    angles = None
    norm = None
    scales = (1.0, 1.0)

    def __init__(self, spec: AttnSpec) -> None:
        self._spec = spec

    def __call__(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, kv_heads = self._spec.heads, self._spec.kv_heads
        parts = qkv.view(len(qkv), -1, self._spec.head_dim)
        return parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]


def attention(requests: int, context: int, length: int) -> None:
    """The last ``length`` tokens of each request, one layer."""
    spec = AttnSpec(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    precision, device = Precision(torch.float32, torch.bfloat16), torch.device("cpu")
    width = -(-context // BLOCK_SIZE)
    order = torch.randperm(requests * width).int().view(requests, width)
    qkv = torch.randn(requests * length, (9 + 3 + 3) * 64)
    segments = [Segment(context - length, length, memoryview(blocks.numpy())) for blocks in order]
    for backend in BACKENDS:
        if backend.declines(spec, precision, device) is None:
            made = backend(spec, precision, device)
            pages = made.allocate(requests * width)
            prepared = made.prepare(segments)
            each = seconds(partial(prepared.run, pages, qkv, Split(spec)), CPU)
            read = 1e-9 * requests * context * 2 * 3 * 64 * 2 / each
            print(f"| {backend.name} | {requests} | {context} | {length} | {1e3 * each:.3f} | {read:.1f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 128, 512])
    arguments = parser.parse_args()
    if "experts" in arguments.only:
        experts(arguments.rows)
    if "attention" in arguments.only:
        print("\nAttention of one layer, keys and values in bfloat16\n")
        print("| backend | requests | context | new tokens | ms | GB/s |\n|---|---|---|---|---|---|")
        for requests, context, length in ((1, 256, 1), (8, 256, 1), (32, 256, 1), (8, 1024, 1), (32, 1024, 1)):
            attention(requests, context, length)
        for context, length in ((512, 512), (4096, 512)):
            attention(1, context, length)


if __name__ == "__main__":
    main()
