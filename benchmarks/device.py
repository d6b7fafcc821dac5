"""Time on a device: of a graph, of single kernels, of what lies idle; and how fast it copies and multiplies.

All of it runs on a CPU as well, where it shows that a benchmark works, and nothing else.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

Work = Callable[[], object]


def synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()


def seconds(work: Work, device: torch.device, runs: int = 11, *, graph: bool = True) -> float:
    """Median; on a GPU without the time to launch kernels: of a graph, or, where none can be captured, in all kernels.
    What is read should be more than caches hold, or be in them when it is read in earnest. ``graph``: False if it is
    known that the work asks the device for something."""
    work()
    if device.type == "cpu":
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    replay = _captured(work, device) if graph else None
    if replay is None:
        return Trace.of(lambda: [work() for _ in range(runs)], device).busy / runs
    replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin_event, end_event in events:
        begin_event.record()
        replay()
        end_event.record()
    synchronize(device)
    return 1e-3 * statistics.median(begin_event.elapsed_time(end_event) for begin_event, end_event in events)


def _captured(work: Work, device: torch.device) -> Work | None:
    """None: the work asks the device for something, or torch has no graphs for it."""
    synchronize(device)
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        synchronize(device)
        return None
    return graph.replay


@dataclass(frozen=True, slots=True)
class Trace:
    """What ran on a device, in the order of beginnings."""

    spans: Sequence[tuple[float, float, str]]
    """(begin, end, kernel), in microseconds."""

    @classmethod
    def of(cls, work: Work, device: torch.device) -> "Trace":
        """On a CPU these are torch's operations."""
        synchronize(device)
        activities = supported_activities() - ({ProfilerActivity.CPU} if device.type != "cpu" else set())
        with profile(activities=activities) as made:
            work()
            synchronize(device)
        kind = getattr(DeviceType, device.type.upper())
        own = [event for event in made.events() if event.device_type == kind and not event.is_user_annotation]
        spans = [(event.time_range.start, event.time_range.end, event.name) for event in own if not event.cpu_parent]
        return cls(sorted(spans))

    def kernels(self) -> dict[str, tuple[int, float]]:
        """Name → how often it ran, seconds in all; those that took longest first."""
        found: dict[str, tuple[int, float]] = {}
        for begin, end, name in self.spans:
            calls, total = found.get(name, (0, 0.0))
            found[name] = calls + 1, total + 1e-6 * (end - begin)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def busy(self) -> float:
        """Seconds in which at least one ran."""
        found, until = 0.0, 0.0
        for begin, end, _ in self.spans:
            found += max(end - max(begin, until), 0.0)
            until = max(until, end)
        return 1e-6 * found

    @property
    def idle(self) -> float:
        """Share of the time, from the first to the end of the last, in which none ran."""
        return 1 - self.busy / (1e-6 * (max(end for _, end, _ in self.spans) - self.spans[0][0]))


def copied(count: int, device: torch.device) -> float:
    """GB/s, what is read and what is written, of copying ``count`` bytes."""
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2e-9 * count / seconds(lambda: copy.copy_(source), device)


def multiplied(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a product of two matrices of ``size`` · ``size``, by torch; float8 with a scale for each row."""
    x = torch.randn(size, size, device=device)
    if dtype.itemsize > 1:
        y = x.to(dtype)
        return 2e-9 * size**3 / seconds(lambda: y @ y, device)
    z, scale = x.to(dtype), torch.ones(size, 1, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(z, z.T, scale_a=scale, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16)

    return 2e-9 * size**3 / seconds(product, device)


def ceilings(device: torch.device) -> dict[str, float]:
    """Copying 1 GB, and a bfloat16 matrix product of 8192³."""
    return {"read_gb_s": copied(1 << 30, device), "gemm_gflop_s": multiplied(8192, torch.bfloat16, device)}
