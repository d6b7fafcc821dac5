"""How matrices are quantized, one class for each way: what it must know of the inputs, what becomes of a matrix, and
what the checkpoint then says of itself."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tgi.core.errors import StartupError
from tgi.core.job import Job
from tgi.quantizer import awq, gptq
from tgi.quantizer.ints import Ints, awq_tensors, gptq_tensors

_GROUPS = (128, 64, 32, 16)
"""Sizes of groups, the usual one first."""


class Method(Protocol):
    """The types ``Any`` are each method's own."""

    @property
    def reads(self) -> bool:
        """Whether it wants to know inputs, and so needs a text."""

    def declines(self, outs: int, inner: int) -> str | None:
        """Why a matrix stays as it is; None if it need not."""

    def observe(self, x: torch.Tensor, length: int | None) -> Any:
        """What it wants to know of the inputs [tokens, inner] of a product, float32. ``length``: of the sequences that
        these are; None if they are some of their tokens."""

    def quantize(self, weight: torch.Tensor, seen: Any) -> Any:
        """Float32 [outs, inner] → what has ``values`` alike. ``seen``: what was observed; None if no token came."""

    def tensors(self, quantized: Any) -> Mapping[str, torch.Tensor]:
        """As files hold it, by what stands behind the module's name."""

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config``. ``plain``: modules that stay as they are."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers of 4 or 8 bits, in the layout of AutoGPTQ."""

    bits: int
    group: int
    """-1: all inputs."""
    sym: bool
    damp: float
    act_order: bool
    reads: bool = True

    def declines(self, outs: int, inner: int) -> str | None:
        return _ragged(outs, 32 // self.bits) or _ragged(inner, 32 // self.bits)

    def observe(self, x: torch.Tensor, length: int | None) -> torch.Tensor:
        return gptq.hessian(x, length)

    def quantize(self, weight: torch.Tensor, seen: torch.Tensor | None) -> Ints:
        group = weight.shape[1] if self.group == -1 else self.group
        return gptq.quantize(
            weight, seen, bits=self.bits, group=group, sym=self.sym, damp=self.damp, act_order=self.act_order
        )

    def tensors(self, quantized: Ints) -> Mapping[str, torch.Tensor]:
        return gptq_tensors(quantized)

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.sym,
            "desc_act": False,  # whatever the order was, groups are runs of neighbours
            "damp_percent": self.damp,
            "true_sequential": True,
            "checkpoint_format": "gptq",
            "modules_to_not_convert": list(plain),  # transformers and TGI read this, GPTQModel and vLLM the next
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in plain},
        }


@dataclass(frozen=True, slots=True)
class Awq:
    """Integers of 4 bits, in the layout of AutoAWQ's ``gemm``."""

    group: int
    reads: bool = True

    def declines(self, outs: int, inner: int) -> str | None:
        return _ragged(outs, 8)

    def observe(self, x: torch.Tensor, length: int | None) -> awq.Activity:
        return awq.Activity.of(x, self.group)

    def quantize(self, weight: torch.Tensor, seen: awq.Activity | None) -> Ints:
        return awq.quantize(weight, seen, group=self.group)

    def tensors(self, quantized: Ints) -> Mapping[str, torch.Tensor]:
        return awq_tensors(quantized)

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain),
        }


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers of 8 bits with a scale for each output."""

    stored: torch.Tensor
    """int8 or float8 [outs, inner]."""
    scale: torch.Tensor
    """float32 [outs, 1]."""

    @property
    def values(self) -> torch.Tensor:
        return self.stored.float() * self.scale


@dataclass(frozen=True, slots=True)
class Nearest:
    """Each number rounded by itself, to int8 or float8; in the layout of compressed-tensors, for activations that are
    rounded alike, token by token."""

    dtype: torch.dtype
    reads: bool = False

    def declines(self, outs: int, inner: int) -> str | None:
        return None

    def observe(self, x: torch.Tensor, length: int | None) -> None:
        """Nothing."""

    def quantize(self, weight: torch.Tensor, seen: None) -> Rows:
        integers = not self.dtype.is_floating_point
        most = torch.iinfo(self.dtype).max if integers else torch.finfo(self.dtype).max
        scale = (weight.abs().amax(1, keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
        steps = (weight / scale).clamp(-most, most)
        return Rows((steps.round() if integers else steps).to(self.dtype), scale)

    def tensors(self, quantized: Rows) -> Mapping[str, torch.Tensor]:
        return {"weight": quantized.stored, "weight_scale": quantized.scale}

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        kind = "float" if self.dtype.is_floating_point else "int"
        numbers = {"num_bits": 8, "type": kind, "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{kind}-quantized",
            "quantization_status": "compressed",
            "ignore": list(plain),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**numbers, "strategy": "channel", "dynamic": False},
                    "input_activations": {**numbers, "strategy": "token", "dynamic": True},
                    "output_activations": None,
                }
            },
        }


def _ragged(size: int, by: int) -> str | None:
    return f"{size} is no multiple of {by}" if size % by else None


def method(job: Job, inputs: Mapping[str, int]) -> Method:
    """The job's, for modules with so many inputs. StartupError if the size of groups doesn't divide these."""
    match job.method:
        case "gptq":
            return Gptq(job.bits, _group(job.group_size, inputs), job.sym, job.percdamp, job.act_order)
        case "awq":
            return Awq(_group(job.group_size, inputs))
        case "int8":
            return Nearest(torch.int8)
        case "fp8":
            return Nearest(torch.float8_e4m3fn)
    raise ValueError(job.method)


def _group(asked: int | None, inputs: Mapping[str, int]) -> int:
    """Its size."""
    if asked == -1:
        return asked
    common = math.gcd(*inputs.values())
    for group in _GROUPS if asked is None else (asked,):
        if common % group == 0:
            return group
    odd = next(name for name, inner in inputs.items() if inner % group)
    others = ", ".join(str(other) for other in _GROUPS if common % other == 0) or "none"
    raise StartupError(
        f"`--groupsize {group}` does not divide the {inputs[odd]} inputs of {odd}; these divide all: {others}"
    )
