"""Formats of floating point in 8 and 4 bits with scales, and bitsandbytes'. No torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tgi.core.model_config import Raw, flag
from tgi.core.numbers import WIDTH
from tgi.quantization.formats.base import Module, Scheme, Size, Stored, T, integers
from tgi.quantization.formats.settings import names_of, object_of, one_of, only, wrong

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

ACTIVATIONS = frozenset(
    """input_scale input_scale_ub input_zero_point input_global_scale activation_scale output_scale output_zero_point
    output_global_scale q_scale q_zero_point k_zero_point v_zero_point""".split()
)
"""Scales of activations, which are not rounded by them but stay float32 or are rounded finer: what is computed is
nearer to the model before it was quantized."""


def float8(module: Module[T], weight: str, scale: str, block: tuple[int, int] | None) -> Size:
    """Of the parts that are called so. ``block``: rows and columns that share a scale; None: a whole row or all of the
    tensor does."""
    shape = module.part(weight, FLOAT8).shape
    if len(shape) < 2:
        raise module.wrong(weight, f"has shape {shape}, which is no matrix's")
    *stack, outs, inner = shape
    shapes: list[tuple[int, ...]] = [(*stack, outs, 1), (*stack, outs), (*stack, 1, 1), (*stack, 1), tuple(stack)]
    rule = "a scale for each row or one for all"
    if block is not None:
        shapes, rule = [(*stack, -(-outs // block[0]), -(-inner // block[1]))], f"blocks of {block[0]} by {block[1]}"
    module.part(scale, _SCALES, *shapes, rule=rule)
    group = inner if block is None else math.gcd(inner, block[1])
    return Size(shape, None if group % 4 else 1 + 4 / group)


def float4(module: Module[T], packed: str, scale: str, group: int, kinds: tuple[str, ...]) -> Size:
    """Of bytes of two numbers each, and a scale of one of the ``kinds`` for each ``group`` along the inputs."""
    outs, width = module.matrix(packed, ("U8",), 1, group // 2)
    module.part(scale, kinds, (outs, width * 2 // group), rule=f"groups of {group}")
    return Size((outs, width * 2), 0.5 + scale_bytes(kinds) / group)


def scale_bytes(kinds: tuple[str, ...]) -> int:
    """Of a scale beside codes of 4 bits: half precision holds any float8, but not all powers of two."""
    return 2 if kinds == ("F8_E4M3",) else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(Scheme):
    """float8 numbers: any tensor of these, and its scales."""

    PARTS = ("", "_scale_inv", "_scale")
    MADE = ""
    BESIDE = ACTIVATIONS

    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: a row or all do."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("fp8",)

    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        return (name for name, tensor in tensors.items() if tensor.kind in FLOAT8 and len(tensor.shape) > 1)

    def size(self, module: Module[T]) -> Size:
        if {"_scale_inv", "_scale"} <= module.parts.keys():
            raise module.wrong("_scale", f"is there beside {module.name}_scale_inv")
        return float8(module, "", self.scale(module), self.block)

    def scale(self, module: Module[T]) -> str:
        """The part that has the scales."""
        return "_scale_inv" if "_scale_inv" in module.parts else "_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4(Scheme):
    """MXFP4 or NVFP4: bytes ``X.weight`` with ``X.weight_scale``, and of NVFP4 ``X.weight_scale_2``, which multiplies
    all scales; or ``X_blocks`` and ``X_scales``, a stack of matrices in MXFP4."""

    PARTS = ("", "_scale", "_scale_2", "_blocks", "_scales")
    MADE = ""
    BESIDE = ACTIVATIONS

    group: int
    """Numbers that share a scale: 16 of NVFP4, 32 of MXFP4."""

    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        for name, tensor in tensors.items():
            if tensor.kind == "U8" and name.endswith(("_blocks", ".weight")):
                yield name.removesuffix("_blocks")

    def size(self, module: Module[T]) -> Size:
        if "_blocks" in module.parts:
            shape = module.part("_blocks", ("U8",)).shape
            if len(shape) < 3:
                raise module.wrong("_blocks", f"has shape {shape}, which is no stack's")
            *stack, groups, _ = shape
            module.part("_blocks", ("U8",), (*stack, groups, 16), rule="groups of 32")
            module.part("_scales", ("U8",), (*stack, groups), rule="groups of 32")
            return Size((*stack, groups * 32), 0.5 + 4 / 32)
        if self.group == 32:
            return float4(module, "", "_scale", 32, ("U8", "F8_E8M0"))
        module.part("_scale_2", ("F32",), (), (1,))
        return float4(module, "", "_scale", 16, ("F8_E4M3",))


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytes(Scheme):
    """LLM.int8, or codes of 4 bits in blocks, one row behind the other."""

    PARTS = (
        *("weight", "SCB", "weight_format"),
        *(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
        *(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")),
    )

    bits: int
    kind: str
    """Of codes: ``nf4`` or ``fp4``."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("bitsandbytes",) if self.bits == 8 else ("bitsandbytes", f"bitsandbytes-{self.kind}")

    @property
    def state(self) -> str:
        """The part that has a text of sizes."""
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        for name, tensor in tensors.items():
            coded = self.bits == 4 and (tensor.kind == "U8" or f"{name}.absmax" in tensors)
            if name.endswith(".weight") and (coded or (self.bits == 8 and tensor.kind == "I8")):
                yield name.removesuffix("weight")

    def size(self, module: Module[T]) -> Size:
        """Of codes: all numbers in a row, for the shape is in a text."""
        if self.bits == 8:
            outs, inner = module.matrix("weight", ("I8",), 1, 1)
            module.part("SCB", ("F32",), (outs,))
            return integers((outs, inner), 8, inner, 4)
        packed = module.part("weight", tuple(WIDTH))
        numbers = 2 * math.prod(packed.shape) * WIDTH[packed.kind]
        module.part(self.state, ("U8",))
        module.part("weight.quant_map", ("F32",), (16,))
        nested = "weight.nested_absmax" in module.parts
        blocks = {-(-numbers // block): block for block in (64, 128, 256, 512, 1024, 2048, 4096)}
        most = module.part("weight.absmax", ("U8" if nested else "F32",), *((count,) for count in blocks))
        if nested:
            module.part("weight.nested_absmax", ("F32",))
            module.part("weight.nested_quant_map", ("F32",), (256,))
        return Size((numbers,), 0.5 + 4 / blocks[most.shape[0]])


def read_fp8(method: str, raw: Raw) -> Scheme:
    only(
        method,
        raw,
        """activation_scheme weight_block_size modules_to_not_convert ignored_layers modules_to_convert scale_fmt fmt
        expert_dtype dequantize""",
    )
    one_of(raw, "activation_scheme", "dynamic", "static")
    one_of(raw, "scale_fmt", None, "float", "ue8m0")
    one_of(raw, "fmt", None, "e4m3", "e5m2")
    one_of(raw, "expert_dtype", None, "fp8")
    block = (1, 32) if method == "mxfp8" else None
    if (sizes := raw.get("weight_block_size")) is not None:
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise wrong("weight_block_size", f"expected two sizes, got {sizes!r}")
        block = (sizes[0], sizes[1])
    return Fp8(method=method, block=block, rounds=True)


def read_fbgemm_fp8(method: str, raw: Raw) -> Scheme:
    only(method, raw, "activation_scale_ub modules_to_not_convert")
    return Fp8(method=method, rounds=True)


def read_modelopt(method: str, raw: Raw) -> Scheme:
    only(
        method,
        raw,
        """quant_algo kv_cache_quant_algo kv_cache_scheme config_groups ignore exclude_modules group_size producer
        has_zero_point pre_quant_scale""",
    )
    algorithm = raw.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        raise wrong("quant_algo", f"{algorithm!r} is not implemented; known: FP8, NVFP4")
    one_of(raw, "has_zero_point", None, False)
    one_of(raw, "pre_quant_scale", None, False)
    return Fp8(method="fp8", rounds=True) if algorithm == "FP8" else Fp4(method=method, group=16)


def read_mxfp4(method: str, raw: Raw) -> Scheme:
    only(method, raw, "modules_to_not_convert dequantize")
    return Fp4(method=method, group=32)


def read_quark(method: str, raw: Raw) -> Scheme:
    """AMD's Quark."""
    only(
        method,
        raw,
        """global_quant_config layer_quant_config layer_type_quant_config exclude export algo_config quant_mode
        kv_cache_quant_config kv_cache_post_rope softmax_quant_spec version""",
    )
    names_of(raw, "exclude")
    one_of(object_of(raw, "export"), "weight_format", "real_quantized", None)
    whole = object_of(raw, "global_quant_config")
    weight = object_of(whole, "weight")
    kind, scheme = weight.get("dtype"), weight.get("qscheme")
    made: Scheme
    if kind == "fp8_e4m3" and scheme in ("per_tensor", "per_channel"):
        made = Fp8(method="fp8", rounds=bool(whole.get("input_tensors")))
    elif kind == "fp4" and scheme == "per_group" and weight.get("group_size") == 32:
        one_of(weight, "scale_format", "e8m0")
        made = Fp4(method=method, group=32)
    else:
        raise wrong(
            "global_quant_config",
            f"weights of dtype {kind!r} and qscheme {scheme!r} are not implemented; known: fp8_e4m3 per_tensor or "
            "per_channel, fp4 per_group of 32. llm-compressor quantizes the original model to integers.",
        )
    for key in ("layer_quant_config", "layer_type_quant_config"):
        # What layers have of their own is of the cache: activations, that is.
        for name, own in object_of(raw, key).items():
            if not isinstance(own, dict) or own.get("weight") != weight:
                raise wrong(key, f"settings of its own for {name!r} are not implemented")
    return made


def read_bitsandbytes(method: str, raw: Raw) -> Scheme:
    only(
        method,
        raw,
        """load_in_8bit load_in_4bit _load_in_8bit _load_in_4bit llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight bnb_4bit_compute_dtype bnb_4bit_quant_type
        bnb_4bit_use_double_quant bnb_4bit_quant_storage""",
    )
    eight, four = (flag(raw, key, False) or flag(raw, f"_{key}", False) for key in ("load_in_8bit", "load_in_4bit"))
    if eight == four:
        raise wrong("load_in_8bit, load_in_4bit", "expected one of them")
    one_of(raw, "bnb_4bit_quant_type", None, "nf4", "fp4")
    return BitsAndBytes(method=method, bits=8 if eight else 4, kind=raw.get("bnb_4bit_quant_type") or "fp4")
