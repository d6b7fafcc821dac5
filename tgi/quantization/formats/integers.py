"""Formats of integers, of which groups along the inputs share a scale. No torch."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw, flag
from tgi.core.numbers import WIDTH
from tgi.quantization.formats.base import FLOATS, Module, Scheme, Size, Stored, T, integers
from tgi.quantization.formats.settings import (
    WHERE,
    bits_of,
    group_of,
    names_of,
    object_of,
    one_of,
    only,
    pattern_of,
    text_of,
    wrong,
)

INTEGERS = ("I32",)
INDEX = ("I32", "I64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers(Scheme):
    """A module is what has a tensor called as the first of PARTS."""

    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        first = self.PARTS[0]
        return (name.removesuffix(first) for name in tensors if name.endswith(f".{first}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped(Integers):
    """All modules have the same bits and groups, unless a rule says otherwise."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""


def groups_of(inner: int, group: int | None) -> int:
    """How many there are; the last may be smaller."""
    return -(-inner // (group or inner))


def run_of(inner: int, group: int | None) -> int:
    """Columns that share a scale everywhere."""
    return math.gcd(inner, group or inner) if groups_of(inner, group) > 1 else inner


class Rule(NamedTuple):
    """Other settings for modules whose names begin so."""

    pattern: re.Pattern[str]
    bits: int
    group: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Grouped):
    """Frantar et al., arXiv 2210.17323. Integers are packed along the inputs."""

    PARTS = ("qweight", "qzeros", "scales", "g_idx")
    BESIDE = frozenset(("gptq_bits", "gptq_groupsize", "gptq_sym"))  # core/headers.py has read them

    symmetric: bool = False
    """There are no zeros but the middle."""
    less_one: bool = True
    """Zeros are stored less one (version 1 of the format)."""
    rules: tuple[Rule, ...] = ()
    """The first that fits a module holds."""

    def of(self, module: str) -> tuple[int, int | None]:
        """Bits and group of a module."""
        rule = next((rule for rule in self.rules if rule.pattern.match(module.removesuffix("."))), None)
        return (self.bits, self.group) if rule is None else (rule.bits, rule.group)

    def size(self, module: Module[T]) -> Size:
        bits, group = self.of(module.name)
        straddle = 32 % bits > 0
        words, outs = module.matrix("qweight", INTEGERS, bits if straddle else 1, 32 if straddle else 1)
        inner = words * 32 // bits
        groups, rule = groups_of(inner, group), f"bits {bits} and group_size {group or -1}"
        scales = module.part("scales", FLOATS, (groups, outs), rule=rule)
        module.part("qzeros", INTEGERS, (groups, -(-outs * bits // 32)), rule=rule)
        if "g_idx" in module.parts:
            module.part("g_idx", INDEX, (inner,), rule=rule)
        half = self.symmetric and scales.kind == "F16"
        return integers((outs, inner), bits, run_of(inner, group), 2 if half else 4 if self.symmetric else 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Grouped):
    """Lin et al., arXiv 2306.00978."""

    PARTS = ("qweight", "qzeros", "scales")

    version: str
    """Kernel for which it is packed: ``gemm`` or ``gemv``."""

    @property
    def names(self) -> tuple[str, ...]:
        return "awq", "gptq"

    def size(self, module: Module[T]) -> Size:
        rows, words = module.matrix("qweight", INTEGERS, 1, 1)
        rule = f"group_size {self.group or -1}"
        if self.version == "gemm":  # words hold eight outputs of one input
            outs, inner = words * 8, rows
            groups = groups_of(inner, self.group)
            module.part("scales", FLOATS, (groups, outs), rule=rule)
            module.part("qzeros", INTEGERS, (groups, words), rule=rule)
        else:  # eight inputs of one output; zeros and scales are filled up to whole words, by the kernel's needs
            outs, inner = rows, words * 8
            group = self.group or inner
            times = max(128 // group, 1)
            wide = -(-(inner // group) // (8 * times)) * times
            module.part("scales", FLOATS, (outs, wide * 8), rule=rule)
            module.part("qzeros", INTEGERS, (outs, wide), rule=rule)
        return integers((outs, inner), 4, run_of(inner, self.group), 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marlin(Grouped):
    """GPTQ's matrices in the order of the GPU kernel Marlin (Frantar et al., arXiv 2408.11743)."""

    PARTS = ("B", "s", "workspace")

    def size(self, module: Module[T]) -> Size:
        tiles, words = module.matrix("B", INTEGERS, 1, 128)
        outs, inner = words // 2, tiles * 16
        scales = module.part("s", FLOATS, (groups_of(inner, self.group), outs), rule=f"group_size {self.group or -1}")
        return integers((outs, inner), 4, run_of(inner, self.group), 2 if scales.kind == "F16" else 4)


def sparse(module: Module[T], names: tuple[str, str, str], bits: int, group: int | None) -> Size:
    """Of the integers, their places, and the scales, in the order of the GPU kernel Sparse-Marlin."""
    each = 32 // bits
    tiles, words = module.matrix(names[0], INTEGERS, 1, 64 * 16 // each)
    outs, inner = words * each // 16, tiles * 32
    module.part(names[1], ("I16",), (tiles, 2 * outs))
    scales = module.part(names[2], FLOATS, (groups_of(inner, group), outs), rule=f"group_size {group or -1}")
    return integers((outs, inner), bits, run_of(inner, group), 2 if scales.kind == "F16" else 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marlin24(Grouped):
    """Of each four inputs two, in Marlin's order (Castro et al., arXiv 2408.11743, section 6)."""

    PARTS = ("B_24", "B_meta", "s", "workspace")

    @property
    def names(self) -> tuple[str, ...]:
        return ("marlin",)

    def size(self, module: Module[T]) -> Size:
        return sparse(module, ("B_24", "B_meta", "s"), self.bits, self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eetq(Integers):
    """int8, a scale for each output."""

    PARTS = ("weight_scales", "weight")

    def size(self, module: Module[T]) -> Size:
        inner, outs = module.matrix("weight", ("I8",), 64, 64)
        scales = module.part("weight_scales", FLOATS, (outs,), rule="its weight")
        return integers((outs, inner), 8, inner, 2 if scales.kind == "F16" else 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exl2(Integers):
    """ExLlamaV2's mixture of 2 to 8 bits. Our kernels have one width for a matrix: that of its widest group."""

    PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm", "q_group_map")

    def size(self, module: Module[T]) -> Size:
        _, outs = module.matrix("q_weight", INTEGERS, 1, 8)
        (inner,) = module.matrix("q_invperm", ("I16", "I32"), 1)
        (table,) = module.matrix("q_groups", ("I16", "I32"), 2)
        rule = f"{table // 2} groups"
        module.part("q_scale", INTEGERS, (table // 2, outs // 8), rule=rule)
        module.part("q_scale_max", FLOATS, (table // 2,), rule=rule)
        return integers((outs, inner), 8, 32, 4)  # at the most: what bits and groups there are tensors know


HQQ_PACKED = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Bits → numbers to a word: of 8 bits or, of 3 bits, to one of 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq(Integers):
    """Half-quadratic quantization (Badri & Shaji, 2023)."""

    PARTS = (
        *("W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype"),
        *("view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
        *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
    )

    tags: tuple[tuple[str, int, int | None], ...]
    """Bits and group of layers of these names, of which layers' numbers and what is before them are left away, or,
    without a name, of all."""

    def of(self, module: str) -> tuple[int, int | None]:
        """Bits and group of a module; 0 bits: nothing is said of it."""
        parts = module.removesuffix(".").split(".")
        tag = ".".join(part for part in parts if part not in ("model", "layers") and not part.isdecimal())
        return next(((bits, group) for name, bits, group in self.tags if name in ("", tag)), (0, None))

    def size(self, module: Module[T]) -> Size:
        """Its shape is in the numbers of a tensor: here there is a row for each group."""
        bits, group = self.of(module.name)
        rule = f"nbits {bits} and group_size {group or -1}"
        packed = module.part("W_q", ("U8", "I32", *FLOATS))
        if not bits:
            raise module.wrong("W_q", "is of a layer that quant_config has no settings for")
        count, _ = module.matrix("scale", FLOATS, 1, 1)
        module.part("scale", FLOATS, (count, 1))
        module.part("zero", FLOATS, (count, 1), rule=f"{count} groups")
        for part in ("nbits", "axis", "shape"):
            module.part(part, ("U8", *INDEX))
        size, word = math.prod(packed.shape) * WIDTH[packed.kind], 4 if bits == 3 else 1
        words = -(-count // HQQ_PACKED[bits])
        if size % (words * word) or (group is not None and size != words * word * group):
            raise module.wrong("W_q", f"has {size} bytes, which hqq with {rule} has no {count} groups in")
        inner = size // (words * word)
        return integers((count, inner), bits, inner, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(Grouped):
    """MLX's scales and minima, of words along the inputs."""

    PARTS = ("scales", "weight", "biases", "qbiases")

    def size(self, module: Module[T]) -> Size:
        outs, words = module.matrix("weight", ("U32",), 1, 1)
        inner, rule = words * 32 // self.bits, f"bits {self.bits} and group_size {self.group}"
        assert self.group is not None
        groups, rest = divmod(inner, self.group)
        if rest:
            raise module.wrong("weight", f"has {inner} columns, which don't divide into groups of {self.group}")
        module.part("scales", FLOATS, (outs, groups), rule=rule)
        module.part(self.minima(module), FLOATS, (outs, groups), rule=rule)
        return integers((outs, inner), self.bits, self.group, 8)

    def minima(self, module: Module[T]) -> str:
        """MLX's name or transformers', whose modules have a bias of their own."""
        return "biases" if "biases" in module.parts else "qbiases"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitNet(Integers):
    """-1, 0 or 1 times one number (Ma et al., arXiv 2402.17764)."""

    PARTS = ("weight_scale", "weight")

    divides: bool
    """By the number instead."""

    def size(self, module: Module[T]) -> Size:
        rows, inner = module.matrix("weight", ("U8",), 1, 1)
        module.part("weight_scale", FLOATS, (1,), ())
        return integers((rows * 4, inner), 2, inner, 4)


_GPTQ = """bits group_size sym checkpoint_format format is_marlin_format dynamic modules_to_not_convert pack_dtype
    adapter rotation"""
"""Keys that are read."""
_MAKING = """desc_act static_groups act_group_aware true_sequential damp_percent damp_auto_increment mse lm_head meta
    model_name_or_path model_file_base_name model_seqlen tokenizer dataset quantizer batch_size pad_token_id
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize cache_block_outputs
    use_exllama disable_exllama exllama_config max_input_length use_cuda_fp16 backend kernel offload_to_disk
    offload_to_disk_path pack_impl preprocessors telemetry fallback hessian gptaq foem v2 v2_alpha compile gc_mode"""
"""Keys that say how it was made, or by what it was multiplied; what must be known of that is in the tensors."""


def read_gptq(method: str, raw: Raw) -> Scheme:
    key = "checkpoint_format" if raw.get("checkpoint_format") else "format"
    format = text_of(raw, key, "gptq")
    if flag(raw, "is_marlin_format", False) or format == "marlin":
        return read_marlin("marlin", raw)
    if format == "marlin_24":
        return read_marlin_24("marlin_24", raw)
    only(method, raw, f"{_GPTQ} {_MAKING}")
    if format not in ("gptq", "gptq_v2"):
        raise wrong(
            key,
            f"{format!r} is not implemented for gptq; known: gptq, gptq_v2, marlin, marlin_24. "
            "GPTQModel or llm-compressor quantize the original model to one of these.",
        )
    bits, group = bits_of(raw, "bits", 2, 3, 4, 8), group_of(raw)
    one_of(raw, "pack_dtype", "int32", None)
    one_of(raw, "adapter", None)
    one_of(raw, "rotation", None)
    return Gptq(
        method=method,
        bits=bits,
        group=group,
        symmetric=flag(raw, "sym", False),
        less_one=format == "gptq",
        rules=tuple(_dynamic(raw, bits, group)),
    )


def _dynamic(raw: Raw, bits: int, group: int | None) -> Iterator[Rule]:
    """GPTQModel's ``dynamic``: patterns of modules' names. Behind ``-:`` are modules that stayed as they were."""
    for pattern, own in _objects(raw, "dynamic"):
        compiled = pattern_of("dynamic", pattern.removeprefix("-:").removeprefix("+:"))
        yield _rule(compiled, {} if pattern.startswith("-:") else own, bits, group, f"bits group_size sym {_MAKING}")


def _objects(raw: Raw, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, own in object_of(raw, key).items():
        if not isinstance(own, dict):
            raise wrong(key, f"expected an object of objects, got {own!r} for {name!r}")
        yield name, own


def _rule(pattern: re.Pattern[str], own: Raw, bits: int, group: int | None, keys: str) -> Rule:
    only("such a rule", own, keys)
    return Rule(
        pattern,
        bits_of(own, "bits", 2, 3, 4, 8) if "bits" in own else bits,
        group_of(own) if "group_size" in own else group,
    )


_AUTO_ROUND = """bits group_size sym packing_format backend data_type act_bits extra_config modules_to_not_convert
    autoround_version amp batch_size nsamples seqlen iters lr minmax_lr low_gpu_mem_usage gradient_accumulate_steps
    enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning enable_alg_ext scale_dtype dataset
    to_quant_block_names block_name_to_quantize quant_block_list super_bits super_group_size act_data_type
    act_dynamic act_group_size act_sym static_kv_dtype static_attention_dtype lm_head damp_percent true_sequential"""
_OWN = "bits group_size sym data_type act_bits act_data_type act_dynamic act_group_size act_sym super_bits in_blocks"


def read_auto_round(method: str, raw: Raw) -> Scheme:
    """Intel's AutoRound (Cheng et al., arXiv 2309.05516), which packs as others do."""
    only(method, raw, f"{_AUTO_ROUND} {_OWN}")
    packing = text_of(raw, "packing_format", text_of(raw, "backend", "auto_round:auto_gptq"))
    own = list(_objects(raw, "extra_config"))
    for settings in (raw, *(settings for _, settings in own)):
        one_of(settings, "data_type", "int", None)
        if isinstance(bits := settings.get("act_bits"), int) and bits < 16:
            raise wrong("act_bits", f"{bits} is not implemented for {method}")
    kind = packing.removeprefix("auto_round:").removeprefix("auto_").partition(":")[0]
    if kind == "awq":
        if any(settings.get("bits", 16) != 16 for _, settings in own):
            raise wrong("extra_config", "modules with bits of their own are not implemented for auto_awq")
        return Awq(method="awq", bits=bits_of(raw, "bits", 4), group=group_of(raw), version="gemm")
    if kind not in ("gptq", "gptqmodel", "round", "auto"):
        known = "auto_round:auto_gptq, auto_round:auto_awq"
        raise wrong("packing_format", f"{packing!r} is not implemented; known: {known}")
    bits, group = bits_of(raw, "bits", 2, 3, 4, 8), group_of(raw)
    quantized = [(name, settings) for name, settings in own if settings.get("bits") not in (16, 32)]
    rules = [
        _rule(pattern_of("extra_config", name if _is_pattern(name) else f"{re.escape(name)}$"), each, bits, group, _OWN)
        for name, each in sorted(quantized, key=lambda pair: _is_pattern(pair[0]))
    ]
    return Gptq(
        method="gptq",
        bits=bits,
        group=group,
        symmetric=flag(raw, "sym", True),
        less_one=kind in ("gptq", "auto"),
        rules=tuple(rules),
    )


def _is_pattern(name: str) -> bool:
    """A module's own settings come before those of a pattern that it fits, too."""
    return any(letter in name for letter in r"*+?^$()[]{}|\\")


def read_awq(method: str, raw: Raw) -> Scheme:
    only(
        method,
        raw,
        """bits w_bit group_size q_group_size zero_point version format backend modules_to_not_convert do_fuse
        modules_to_fuse fuse_max_seq_len exllama_config pack_dtype sym desc_act lm_head meta""",
    )
    bits = bits_of(raw, "w_bit" if "w_bit" in raw and raw.get("bits") is None else "bits", 4)
    one_of(raw, "zero_point", True, None)
    one_of(raw, "desc_act", False, None)
    one_of(raw, "pack_dtype", "int32", None)
    if raw.get("backend") == "llm-awq":
        raise wrong("backend", "'llm-awq' is not implemented; AutoAWQ writes what is")
    key = "version" if raw.get("version") else "format"
    version = text_of(raw, key, "gemm")
    if version not in ("gemm", "gemv"):
        raise wrong(key, f"{version!r} is not implemented for awq; known: gemm, gemv")
    group = group_of(raw, "q_group_size" if raw.get("group_size") is None else "group_size")
    return Awq(method=method, bits=bits, group=group, version=version)


def read_marlin(method: str, raw: Raw) -> Scheme:
    only(method, raw, f"{_GPTQ} {_MAKING}")
    one_of(raw, "checkpoint_format", "marlin", None, "gptq")  # AutoGPTQ says gptq beside is_marlin_format
    one_of(raw, "dynamic", None)
    one_of(raw, "sym", True, None)
    return Marlin(method=method, bits=bits_of({"bits": 4, **raw}, "bits", 4), group=group_of(raw))


def read_marlin_24(method: str, raw: Raw) -> Scheme:
    only(method, raw, f"{_GPTQ} {_MAKING}")
    one_of(raw, "checkpoint_format", "marlin_24", None)
    one_of(raw, "dynamic", None)
    one_of(raw, "sym", True, None)
    return Marlin24(method=method, bits=bits_of(raw, "bits", 4, 8), group=group_of(raw))


def read_eetq(method: str, raw: Raw) -> Scheme:
    only(method, raw, "weights modules_to_not_convert")
    one_of(raw, "weights", "int8")
    return Eetq(method=method)


def read_exl2(method: str, raw: Raw) -> Scheme:
    only(method, raw, "version bits head_bits calibration")
    return Exl2(method=method)


def read_hqq(method: str, raw: Raw) -> Scheme:
    only(method, raw, "quant_config skip_modules")
    settings = object_of(raw, "quant_config")
    if not settings:
        raise wrong("quant_config", "expected settings of all layers, or of layers by their names")
    own = {"": settings} if "weight_quant_params" in settings else settings
    return Hqq(method=method, tags=tuple((tag, *_hqq_of(tag, each)) for tag, each in own.items()))


def _hqq_of(tag: str, settings: Any) -> tuple[int, int | None]:
    """Bits and group of layers with this tag."""
    weights = settings.get("weight_quant_params") if isinstance(settings, dict) else None
    if not isinstance(weights, dict):
        raise StartupError(f"{WHERE}: quant_config: {tag or settings!r}: weight_quant_params is missing")
    for key in ("scale_quant_params", "zero_quant_params"):
        one_of(settings, key, None)
    one_of(weights, "axis", 1)
    one_of(weights, "channel_wise", True)
    return bits_of(weights, "nbits", *HQQ_PACKED), group_of({**weights, "group_size": weights.get("group_size") or -1})


def read_affine(method: str, raw: Raw) -> Scheme:
    """transformers' Metal kernels and MLX, whose configs have no method but modules' names with settings of their
    own."""
    own = [name for name, settings in raw.items() if isinstance(settings, dict) and "." in name]
    if own:
        raise wrong(own[0], f"settings of its own are not implemented for {method}")
    only(method, raw, f"bits group_size mode modules_to_not_convert dequantize {' '.join(own)}")
    one_of(raw, "mode", "affine")
    names_of(raw, "modules_to_not_convert")
    group = group_of({"group_size": 64, **raw})
    if group is None:
        raise wrong("group_size", "-1 is not implemented")
    return Affine(method=method, bits=bits_of({"bits": 4, **raw}, "bits", 2, 4, 8), group=group)


def read_bitnet(method: str, raw: Raw) -> Scheme:
    only(method, raw, "linear_class quantization_mode use_rms_norm rms_norm_eps modules_to_not_convert")
    one_of(raw, "linear_class", "bitlinear", "autobitlinear")
    one_of(raw, "quantization_mode", "offline")
    one_of(raw, "use_rms_norm", False, None)
    return BitNet(method=method, divides=raw.get("linear_class") != "autobitlinear")
