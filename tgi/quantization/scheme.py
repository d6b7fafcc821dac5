"""How a checkpoint says that its weights are quantized (``quantization_config``), read strictly. No torch.

One table: a method's row names what reads its config and which module turns its tensors into matrices.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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

    @property
    def names(self) -> tuple[str, ...]:
        """What ``--quantize`` may call it."""
        return (self.method,)

    def held(self, headers: Headers) -> dict[str, Held]:
        """The tensors that stand for quantized matrices. The others are as they are."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped(Scheme):
    """Integers, of which groups along the inputs share a scale."""

    PARTS: ClassVar[tuple[str, ...]]
    """A quantized module's tensors. Whatever has the first is one; which of them may be missing the parser knows."""
    PACKED: ClassVar[str]
    """That which has the integers."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""
    symmetric: bool = False
    """There are no zeros but the middle: a scale, in half precision, is all that is kept with a group."""

    def of(self, module: str) -> tuple[int, int | None]:
        """Bits and group of a module."""
        return self.bits, self.group

    def each(self, module: str, headers: Headers) -> float:
        """How many integers one of the packed numbers holds."""
        return 8

    def held(self, headers: Headers) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name in headers:
            module, _, part = name.rpartition(".")
            packed = f"{module}.{self.PACKED}"
            if part == self.PARTS[0] and packed in headers:
                found |= {key: Held(0, 0) for other in self.PARTS if (key := f"{module}.{other}") in headers}
                numbers = round(math.prod(headers[packed][1]) * self.each(module, headers))
                found[packed] = Held(numbers, numbers * self._width(*self.of(module)))
        return found

    def _width(self, bits: int, group: int | None) -> float:
        """Bytes of a number with its share of scales. Our kernels have one at least for 128 numbers."""
        return (0.5 if bits <= 4 else 1) + (2 if self.symmetric else 8) / min(group or 128, 128)


class Rule(NamedTuple):
    """Other settings for modules whose names begin so."""

    pattern: re.Pattern[str]
    bits: int
    group: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Grouped):
    """Frantar et al., arXiv 2210.17323. Integers are packed along the inputs."""

    PARTS = ("qweight", "qzeros", "scales", "g_idx")
    PACKED = "qweight"

    less_one: bool = True
    """Zeros are stored less one (version 1 of the format)."""
    rules: tuple[Rule, ...] = ()
    """The first that fits a module holds."""

    def of(self, module: str) -> tuple[int, int | None]:
        rule = next((rule for rule in self.rules if rule.pattern.match(module)), None)
        return (self.bits, self.group) if rule is None else (rule.bits, rule.group)

    def each(self, module: str, headers: Headers) -> float:
        return 32 / self.of(module)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Grouped):
    """Lin et al., arXiv 2306.00978."""

    PARTS = ("qweight", "qzeros", "scales")
    PACKED = "qweight"

    version: str
    """Kernel for which it is packed: ``gemm`` or ``gemv``."""

    @property
    def names(self) -> tuple[str, ...]:
        return "awq", "gptq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marlin(Grouped):
    """GPTQ's matrices in the order of the GPU kernel Marlin (Frantar et al., arXiv 2408.11743)."""

    PARTS = ("B", "s", "workspace")
    PACKED = "B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Eetq(Grouped):
    """int8, a scale for each output."""

    PARTS = ("weight_scales", "weight")
    PACKED = "weight"

    def each(self, module: str, headers: Headers) -> float:
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exl2(Grouped):
    """ExLlamaV2's mixture of 2 to 8 bits. Our kernels have one width for a matrix: that of its widest group."""

    PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm", "q_group_map")
    PACKED = "q_weight"

    def each(self, module: str, headers: Headers) -> float:
        inputs, words = (headers.get(f"{module}.{part}", ("", (0,)))[1][0] for part in ("q_invperm", "q_weight"))
        return inputs / max(words, 1)


HQQ_PACKED = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Bits → numbers to a word: of 8 bits or, of 3 bits, to one of 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq(Grouped):
    """Half-quadratic quantization (Badri & Shaji, 2023). Modules' own tensors say how each is packed."""

    PARTS = (
        *("W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype"),
        *("view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
        *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
    )
    PACKED = "W_q"

    tags: tuple[tuple[str, int, int | None], ...] = ()
    """Bits and group of layers of these names, of which layers' numbers and what is before them are left away."""

    def of(self, module: str) -> tuple[int, int | None]:
        tag = ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isdecimal())
        return next(((bits, group) for name, bits, group in self.tags if name == tag), (self.bits, self.group))

    def each(self, module: str, headers: Headers) -> float:
        bits = self.of(module)[0]
        return HQQ_PACKED[bits] * WIDTH.get(headers[f"{module}.W_q"][0], 1) / (4 if bits == 3 else 1)


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


_GPTQ = """bits group_size sym checkpoint_format format is_marlin_format dynamic modules_to_not_convert pack_dtype
    adapter rotation"""
"""Keys that are read."""
_MAKING = """desc_act static_groups act_group_aware true_sequential damp_percent damp_auto_increment mse lm_head meta
    model_name_or_path model_file_base_name model_seqlen tokenizer dataset quantizer batch_size pad_token_id
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize cache_block_outputs
    use_exllama disable_exllama exllama_config max_input_length use_cuda_fp16 backend kernel offload_to_disk
    offload_to_disk_path pack_impl preprocessors telemetry fallback hessian gptaq foem v2 v2_alpha compile gc_mode"""
"""Keys that say how it was made, or by what it was multiplied; what must be known of that is in the tensors."""


def _gptq(method: str, raw: Raw) -> Scheme:
    format = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if flag(raw, "is_marlin_format", False) or format == "marlin":
        return _marlin("marlin", raw)
    _only(method, raw, f"{_GPTQ} {_MAKING}")
    if format not in ("gptq", "gptq_v2"):
        key = "checkpoint_format" if raw.get("checkpoint_format") else "format"
        raise StartupError(
            f"quantization_config: {key}: {format!r} is not implemented for gptq; known: gptq, gptq_v2, marlin. "
            "GPTQModel or llm-compressor quantize the original model to one of these."
        )
    bits, group = _bits(raw, "bits", 2, 3, 4, 8), _group(raw)
    _one_of(raw, "pack_dtype", "int32", None)
    _one_of(raw, "adapter", None)
    _one_of(raw, "rotation", None)
    return Gptq(
        method=method,
        bits=bits,
        group=group,
        symmetric=flag(raw, "sym", False),
        less_one=format == "gptq",
        rules=tuple(_rules(raw, bits, group)),
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


def _rules(raw: Raw, bits: int, group: int | None) -> Iterator[Rule]:
    """GPTQModel's ``dynamic``: patterns of modules' names. Behind ``-:`` are modules that stayed as they were."""
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(own, dict) for own in dynamic.values()):
        raise StartupError(f"quantization_config: dynamic: expected an object of objects, got {dynamic!r}")
    for pattern, own in dynamic.items():
        try:
            compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise StartupError(f"quantization_config: dynamic: {pattern!r}: {error}") from None
        if pattern.startswith("-:"):
            own = {}
        _only("dynamic", own, f"bits group_size sym {_MAKING}")
        yield Rule(
            compiled,
            _bits(own, "bits", 2, 3, 4, 8) if "bits" in own else bits,
            _group(own) if "group_size" in own else group,
        )


def _awq(method: str, raw: Raw) -> Scheme:
    _only(
        method,
        raw,
        """bits w_bit group_size q_group_size zero_point version format backend modules_to_not_convert do_fuse
        modules_to_fuse fuse_max_seq_len exllama_config pack_dtype sym desc_act lm_head meta""",
    )
    bits = _bits(raw, "w_bit" if raw.get("bits") is None else "bits", 4)
    _one_of(raw, "zero_point", True, None)
    _one_of(raw, "desc_act", False, None)
    _one_of(raw, "pack_dtype", "int32", None)
    if raw.get("backend") == "llm-awq":
        raise StartupError("quantization_config: backend: 'llm-awq' is not implemented; AutoAWQ writes what is")
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise StartupError(f"quantization_config: version: {version!r} is not implemented for awq; known: gemm, gemv")
    group = _group(raw, "q_group_size" if raw.get("group_size") is None else "group_size")
    return Awq(method=method, bits=bits, group=group, version=version)


def _marlin(method: str, raw: Raw) -> Scheme:
    _only(method, raw, f"{_GPTQ} {_MAKING}")
    _one_of(raw, "checkpoint_format", "marlin", None, "gptq")  # AutoGPTQ says gptq beside is_marlin_format
    _one_of(raw, "dynamic", None)
    _one_of(raw, "sym", True, None)
    return Marlin(method=method, bits=_bits({"bits": 4, **raw}, "bits", 4), group=_group(raw), symmetric=True)


def _eetq(method: str, raw: Raw) -> Scheme:
    _only(method, raw, "weights modules_to_not_convert")
    _one_of(raw, "weights", "int8")
    return Eetq(method=method, bits=8, group=None, symmetric=True)


def _exl2(method: str, raw: Raw) -> Scheme:
    _only(method, raw, "version bits head_bits calibration")
    return Exl2(method=method, bits=8, group=32, symmetric=False)


def _hqq(method: str, raw: Raw) -> Scheme:
    _only(method, raw, "quant_config skip_modules")
    settings = raw.get("quant_config")
    if not isinstance(settings, dict) or not settings:
        raise StartupError(f"quantization_config: quant_config: expected an object, got {settings!r}")
    own = {"": settings} if "weight_quant_params" in settings else settings
    tags = [(tag, *_hqq_of(tag, each)) for tag, each in own.items()]
    _, bits, group = tags[0]
    return Hqq(method=method, bits=bits, group=group, tags=tuple(tags))


def _hqq_of(tag: str, settings: Any) -> tuple[int, int | None]:
    """Bits and group of layers with this tag."""
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    if not isinstance(weights, dict):
        raise StartupError(f"quantization_config: quant_config: {tag or settings!r}: weight_quant_params is missing")
    for key in ("scale_quant_params", "zero_quant_params"):
        _one_of(settings, key, None)
    _one_of(weights, "axis", 1)
    _one_of(weights, "channel_wise", True)
    return _bits(weights, "nbits", *HQQ_PACKED), _group({**weights, "group_size": weights.get("group_size") or -1})


def _only(method: str, raw: Raw, keys: str) -> None:
    """A warning for each other key."""
    for key in sorted(set(raw) - set(keys.split()) - {"quant_method", "method"}):
        log.warning("config.json: quantization_config: %s is unknown for %s and has no effect", key, method)


def _one_of(raw: Raw, key: str, *values: object) -> None:
    if raw.get(key, values[0]) not in values:
        raise StartupError(f"quantization_config: {key}: {raw[key]!r} is not implemented")


def _bits(raw: Raw, key: str, *known: int) -> int:
    bits: int = integer(raw, key)
    if bits not in known:
        raise StartupError(
            f"quantization_config: {key}: {bits} is not implemented; known: {', '.join(map(str, known))}"
        )
    return bits


def _group(raw: Raw, key: str = "group_size") -> int | None:
    group = raw.get(key, -1)
    if type(group) is not int or (group < 1 and group != -1):
        raise StartupError(f"quantization_config: {key}: expected -1 or a positive integer, got {group!r}")
    return None if group == -1 else group


def _names(raw: Raw, key: str) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StartupError(f"quantization_config: {key}: expected a list of names, got {names!r}")
    return tuple(names)


METHODS: Mapping[str, Row] = {
    "gptq": Row(
        "tgi.quantization.gptq",
        _gptq,
        "GPTQ in 2, 3, 4 and 8 bits, any group, symmetric or not, act-order, versions 1 and 2 (AutoGPTQ, GPTQModel)",
    ),
    "awq": Row("tgi.quantization.awq", _awq, "AWQ in 4 bits, packed for the kernels gemm and gemv (AutoAWQ)"),
    "marlin": Row(
        "tgi.quantization.marlin", _marlin, "GPTQ's 4 bits packed for the GPU kernel Marlin; not its 2:4 form"
    ),
    "eetq": Row("tgi.quantization.eetq", _eetq, "EETQ's int8, packed for GPUs from Turing on"),
    "exl2": Row(
        "tgi.quantization.exl2", _exl2, "ExLlamaV2's mixture of 2 to 8 bits, held in the widest of each matrix"
    ),
    "hqq": Row("tgi.quantization.hqq", _hqq, "HQQ in 1, 2, 3, 4 and 8 bits, groups along the inputs (transformers)"),
    "fp8": Row("tgi.quantization.fp8", _fp8, "float8, a scale for each tensor, row or block"),
    "fbgemm_fp8": Row("tgi.quantization.fp8", _fbgemm_fp8, "float8, a scale for each row"),
    "compressed-tensors": Row("tgi.quantization.compressed", _compressed_tensors, "compressed-tensors"),
    "bitsandbytes": Row("tgi.quantization.bitsandbytes", _bitsandbytes, "LLM.int8, NF4, FP4"),
    "mxfp4": Row("tgi.quantization.mx", _mxfp4, "MXFP4"),
    "modelopt": Row("tgi.quantization.mx", _modelopt, "ModelOpt: NVFP4, float8"),
}


def _guessed(settings: Raw) -> str:
    """Of configs that don't say: llm-compressor's, and the files that AutoGPTQ and AutoAWQ wrote before there was a
    place for it in config.json."""
    if "config_groups" in settings:
        return "compressed-tensors"
    return "awq" if str(settings.get("version")).lower() in ("gemm", "gemv") else "gptq"


def read_scheme(raw: Raw) -> Scheme | None:
    """Of a config.json; None if its weights are plain. StartupError names what is not implemented."""
    settings: Any = raw.get("quantization_config") or raw.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise StartupError(f"config.json: quantization_config: expected an object, got {settings!r}")
    method = str(settings.get("quant_method") or settings.get("method") or _guessed(settings))
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise StartupError(
            f"config.json: quantization_config: quant_method: {method!r} is not implemented; known: {known}"
        )
    return METHODS[method].read(method, settings)
