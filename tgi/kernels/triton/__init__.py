"""Kernels written in Triton, for GPUs: here what they need and where they run. Imports neither Triton nor torch."""

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CAPABILITY = 8.0
"""The least compute capability of NVIDIA's that Triton compiles for."""


def lacking(capability: float | None) -> str | None:
    """What Triton doesn't find here; None if it runs. It builds a small library, with Python's headers, when it is
    first used. ``capability``: of the GPU, if it is NVIDIA's."""
    if capability is not None and capability < CAPABILITY:
        return f"a GPU of compute capability {CAPABILITY}"
    if find_spec("triton") is None:
        return "to be installed"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler"
    return None if Path(sysconfig.get_path("include"), "Python.h").exists() else "Python's headers"


@cache
def runs_on(device: "torch.device") -> bool:
    """Whether the kernels run there. On CPUs they do in Triton's interpreter, by its variable TRITON_INTERPRET."""
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return lacking(None) is None
    major, minor = torch.cuda.get_device_capability(device)
    return lacking(major + minor / 10) is None
