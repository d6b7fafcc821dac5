"""How a checkpoint says that its weights are quantized (``quantization_config``), read strictly. No torch.

One table: a method's row names what reads its config and which module turns its tensors into matrices.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw, flag, integer
from tgi.core.numbers import WIDTH
from tgi.quantization.groups import WeightGroup, named, read_groups

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """What a stored tensor has of a quantized matrix: how many numbers, and the bytes that they take in memory with
    their scales, as our kernels keep them."""

    numbers: int
    bytes: float


Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of a checkpoint's tensors by name: number format and shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What all methods have."""

    method: str
    plain: tuple[str, ...] = ()
    """Modules that are not quantized: those whose names have one of these in them."""

    def keeps(self, module: str) -> bool:
        """Whether a module's weight is stored as it is."""
        return any(part in module for part in self.plain)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``--quantize`` may call it."""
        return (self.method,)

    def held(self, headers: Headers) -> dict[str, Held]:
        """The tensors that stand for quantized matrices. The others are as they are."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Scheme):
    """Frantar et al., arXiv 2210.17323. Integers are packed along the inputs, groups of which share a scale."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(Scheme):
    """float8 numbers. Scales of activations are not used: these are not rounded."""

    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: a row or all do."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("fp8",)

    def held(self, headers: Headers) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name, (kind, shape) in headers.items():
            if kind in ("F8_E4M3", "F8_E5M2") and len(shape) > 1:
                found |= _held(headers, name, name, math.prod(shape), 1, None if self.block is None else self.block[1])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4(Scheme):
    """MXFP4 or NVFP4."""

    def held(self, headers: Headers) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name, (kind, shape) in headers.items():
            if kind == "U8" and name.endswith("_blocks"):
                found |= _held(headers, name, name, 2 * math.prod(shape), 0.5, 32)
            elif kind == "U8" and name.endswith(".weight"):
                found |= _held(headers, name, name, 2 * math.prod(shape), 0.5, 16)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytes(Scheme):
    """LLM.int8, or codes of 4 bits."""

    bits: int
    kind: str
    """Of codes: ``nf4`` or ``fp4``."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("bitsandbytes",) if self.bits == 8 else ("bitsandbytes", f"bitsandbytes-{self.kind}")

    def held(self, headers: Headers) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name, (kind, shape) in headers.items():
            if self.bits == 8 and kind == "I8":
                found |= _held(headers, name, name, math.prod(shape), 1, None)
            elif f"{name}.absmax" in headers:
                found |= _held(headers, name, name, 2 * math.prod(shape) * WIDTH.get(kind, 1), 0.5, 64)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors(Scheme):
    """What llm-compressor writes."""

    groups: tuple[WeightGroup, ...]

    def group(self, module: str) -> WeightGroup | None:
        """How the weight of a linear layer is stored: as its name says or, if nothing does, its class."""
        if named(module, self.plain):
            return None
        each = (group for group in self.groups if named(module, group.targets))
        return next(each, next((group for group in self.groups if "Linear" in group.targets), None))

    def held(self, headers: Headers) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name in headers:
            module, _, part = name.rpartition(".")
            if part == "weight_scale" and (group := self.group(module)) is not None:
                weight = packed = f"{module}.weight"
                if packed not in headers:
                    packed = f"{module}.weight_packed"
                kind, shape = headers.get(packed, ("", (0,)))
                numbers = math.prod(shape) * WIDTH.get(kind, 1) * 8 // group.bits
                columns = group.group or (group.block[1] if group.block is not None else None)
                width, scale = 0.5 if group.bits <= 4 else 1, 4 if group.symmetric else 8
                found |= _held(headers, weight, packed, numbers, width, columns, scale)
        return found


_BESIDE = (
    *("_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_g_idx", "_shape"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),
)
"""What stands behind the name of a weight in those of the tensors that say something of it."""


def _held(
    headers: Headers, weight: str, packed: str, numbers: int, width: float, group: int | None, scale: int = 4
) -> dict[str, Held]:
    """Of a ``weight``, which is in the tensor ``packed``, and the tensors beside it. ``width``: bytes of one of its
    ``numbers``. ``group``: how many share one of ``scale`` bytes; our kernels have one at least for 128."""
    beside = {key: Held(0, 0) for part in _BESIDE if (key := weight + part) in headers}
    return beside | {packed: Held(numbers, numbers * (width + scale / min(group or 128, 128)))}


class Row(NamedTuple):
    """A method."""

    module: str
    """Its ``unpack`` makes matrices of stored tensors."""
    read: Callable[[str, Raw], Scheme]
    """Of method and config."""
    description: str


def _gptq(method: str, raw: Raw) -> Scheme:
    bits = integer(raw, "bits")
    if bits not in (4, 8):
        raise StartupError(f"quantization_config: bits: {bits} is not implemented for {method}")
    group = raw.get("group_size", -1)
    if type(group) is not int or (group != -1 and (group < 16 or group % 16)):
        raise StartupError(f"quantization_config: group_size: expected -1 or a multiple of 16, got {group!r}")
    if flag(raw, "desc_act", False):
        raise StartupError("quantization_config: desc_act: True is not implemented")
    return Gptq(
        method=method, plain=_names(raw, "modules_to_not_convert"), bits=bits, group=None if group == -1 else group
    )


def _fp8(method: str, raw: Raw) -> Scheme:
    _only(
        method,
        raw,
        """activation_scheme weight_block_size modules_to_not_convert ignored_layers modules_to_convert scale_fmt fmt
        expert_dtype dequantize""",
    )
    _one_of(raw, "activation_scheme", "dynamic", "static")
    _one_of(raw, "scale_fmt", None, "float", "ue8m0")
    _one_of(raw, "fmt", None, "e4m3", "e5m2")
    _one_of(raw, "expert_dtype", None, "fp8")
    block = raw.get("weight_block_size")
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise StartupError(f"quantization_config: weight_block_size: expected two sizes, got {block!r}")
        block = (block[0], block[1])
    return Fp8(method=method, block=block)


def _fbgemm_fp8(method: str, raw: Raw) -> Scheme:
    _only(method, raw, "activation_scale_ub modules_to_not_convert")
    return Fp8(method=method)


def _modelopt(method: str, raw: Raw) -> Scheme:
    _only(
        method,
        raw,
        """quant_algo kv_cache_quant_algo kv_cache_scheme config_groups ignore exclude_modules group_size producer
        has_zero_point pre_quant_scale""",
    )
    _one_of(raw, "quant_algo", "FP8", "NVFP4")
    _one_of(raw, "has_zero_point", None, False)
    _one_of(raw, "pre_quant_scale", None, False)
    return Fp8(method=method) if raw["quant_algo"] == "FP8" else Fp4(method=method)


def _mxfp4(method: str, raw: Raw) -> Scheme:
    _only(method, raw, "modules_to_not_convert dequantize")
    return Fp4(method=method)


def _bitsandbytes(method: str, raw: Raw) -> Scheme:
    _only(
        method,
        raw,
        """load_in_8bit load_in_4bit _load_in_8bit _load_in_4bit llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight bnb_4bit_compute_dtype bnb_4bit_quant_type
        bnb_4bit_use_double_quant bnb_4bit_quant_storage""",
    )
    eight, four = (flag(raw, key, False) or flag(raw, f"_{key}", False) for key in ("load_in_8bit", "load_in_4bit"))
    if eight == four:
        raise StartupError("quantization_config: load_in_8bit, load_in_4bit: expected one of them")
    _one_of(raw, "bnb_4bit_quant_type", None, "nf4", "fp4")
    return BitsAndBytes(method=method, bits=8 if eight else 4, kind=raw.get("bnb_4bit_quant_type") or "fp4")


def _compressed_tensors(method: str, raw: Raw) -> Scheme:
    _only(
        method,
        raw,
        """config_groups format quantization_status ignore kv_cache_scheme global_compression_ratio sparsity_config
        transform_config moe_sparsity_config version""",
    )
    _one_of(raw, "quantization_status", "compressed", "frozen")
    for key in ("transform_config", "moe_sparsity_config"):
        if isinstance(value := raw.get(key) or {}, dict) and not value.get("config_groups", value):
            continue
        raise StartupError(f"quantization_config: {key} is not implemented")
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise StartupError(f"quantization_config: sparsity_config: {sparsity!r} is not implemented")
    return CompressedTensors(method=method, plain=_names(raw, "ignore"), groups=read_groups(raw))


def _only(method: str, raw: Raw, keys: str) -> None:
    """A warning for each other key."""
    for key in sorted(set(raw) - set(keys.split()) - {"quant_method"}):
        log.warning("config.json: quantization_config: %s is unknown for %s and has no effect", key, method)


def _one_of(raw: Raw, key: str, *values: object) -> None:
    if raw.get(key, values[0]) not in values:
        raise StartupError(f"quantization_config: {key}: {raw[key]!r} is not implemented")


def _names(raw: Raw, key: str) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StartupError(f"quantization_config: {key}: expected a list of names, got {names!r}")
    return tuple(names)


METHODS: Mapping[str, Row] = {
    "gptq": Row("tgi.quantization.gptq", _gptq, "GPTQ, 4 and 8 bits"),
    "fp8": Row("tgi.quantization.fp8", _fp8, "float8, a scale for each tensor, row or block"),
    "fbgemm_fp8": Row("tgi.quantization.fp8", _fbgemm_fp8, "float8, a scale for each row"),
    "compressed-tensors": Row("tgi.quantization.compressed", _compressed_tensors, "compressed-tensors"),
    "bitsandbytes": Row("tgi.quantization.bitsandbytes", _bitsandbytes, "LLM.int8, NF4, FP4"),
    "mxfp4": Row("tgi.quantization.mx", _mxfp4, "MXFP4"),
    "modelopt": Row("tgi.quantization.mx", _modelopt, "ModelOpt: NVFP4, float8"),
}


def read_scheme(raw: Raw) -> Scheme | None:
    """Of a config.json; None if its weights are plain. StartupError names what is not implemented."""
    settings: Any = raw.get("quantization_config") or raw.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise StartupError(f"config.json: quantization_config: expected an object, got {settings!r}")
    method = str(settings.get("quant_method") or ("compressed-tensors" if "config_groups" in settings else None))
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise StartupError(
            f"config.json: quantization_config: quant_method: {method!r} is not implemented; known: {known}"
        )
    return METHODS[method].read(method, settings)
