"""How much a program of each kernel takes at once, by device: measured by ``benchmarks/gpu.py`` and frozen, so that
nothing is tuned when a server starts."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

_TABLE = Path(__file__).with_name("tiles.json")


@cache
def tile(kernel: str, device: torch.device) -> Mapping[str, int]:
    """The constants of a kernel: as its parameters are named, and Triton's own ``num_warps`` and ``num_stages``."""
    table: dict[str, dict[str, dict[str, int]]] = json.loads(_TABLE.read_text())
    own = table.get(_name(device), {})
    return own.get(kernel) or table["any"][kernel]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type == "cpu":  # the interpreter
        return 8
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count)


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
