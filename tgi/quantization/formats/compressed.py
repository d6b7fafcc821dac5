"""compressed-tensors, as llm-compressor writes it: which modules a config quantizes, and how. No torch."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw
from tgi.quantization.formats.base import FLOATS, Module, Scheme, Size, Stored, T, integers
from tgi.quantization.formats.floats import ACTIVATIONS, float4, float8
from tgi.quantization.formats.integers import INDEX, INTEGERS, run_of, sparse
from tgi.quantization.formats.settings import WHERE, names_of, object_of, one_of, only, pattern_of, wrong

FORMATS: Mapping[str, tuple[str, tuple[int, ...], tuple[str, ...], int | None]] = {
    "pack-quantized": ("int", (2, 4, 8), ("tensor", "channel", "group"), None),
    "marlin-24": ("int", (4, 8), ("channel", "group"), None),
    "int-quantized": ("int", (8,), ("tensor", "channel", "group"), None),
    "float-quantized": ("float", (8,), ("tensor", "channel", "group", "block"), None),
    "nvfp4-pack-quantized": ("float", (4,), ("tensor_group",), 16),
    "mxfp4-pack-quantized": ("float", (4,), ("group",), 32),
    "mxfp8-quantized": ("float", (8,), ("group",), 32),
}
"""How weights are stored: type, bits and strategies that there are, and the group size if there is one only."""


@dataclass(frozen=True, slots=True)
class Names:
    """Modules by name, or by a pattern behind ``re:`` that their names begin with."""

    exact: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, key: str, names: Iterable[str]) -> "Names":
        """StartupError names the ``key`` of what is no pattern."""
        names = tuple(names)
        patterns = (pattern_of(key, name.removeprefix("re:")) for name in names if name.startswith("re:"))
        return cls(tuple(name for name in names if not name.startswith("re:")), tuple(patterns))

    def have(self, module: str) -> bool:
        return module in self.exact or any(pattern.match(module) for pattern in self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Modules whose weights are stored alike."""

    targets: Names
    """Or the class ``Linear``."""
    format: str
    """A name of FORMATS."""
    bits: int
    strategy: str
    """What shares a scale: ``tensor``, ``channel``, ``group``, ``block``, ``tensor_group``."""
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    ordered: bool
    """Columns belong to groups in an order of their own."""
    rounds: bool
    """What they multiply is meant to be rounded, too."""

    @property
    def shares(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None: a whole row or all of the tensor does."""
        return self.block if self.group is None else (1, self.group)


MARLIN_24 = ("weight_packed", "meta", "scale_packed")
_SCALED = ("weight_scale", "weight_zero_point")
_USES: Mapping[str, tuple[str, ...]] = {
    "pack-quantized": (*_SCALED, "weight_packed", "weight_shape", "weight_g_idx"),
    "marlin-24": MARLIN_24,
    "int-quantized": (*_SCALED, "weight", "weight_g_idx"),
    "float-quantized": (*_SCALED, "weight"),
    "nvfp4-pack-quantized": (*_SCALED, "weight_packed", "weight_global_scale"),
    "mxfp4-pack-quantized": (*_SCALED, "weight_packed"),
    "mxfp8-quantized": (*_SCALED, "weight"),
}
"""Tensors of a module. Zeros of floating point are zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors(Scheme):
    """Each module as its group of the config says."""

    PARTS = (
        *(f"weight{part}" for part in ("_scale", "", "_packed", "_zero_point", "_shape", "_g_idx", "_global_scale")),
        *("scale_packed", "meta"),
    )
    BESIDE = ACTIVATIONS

    plain: Names
    """Modules that are not quantized."""
    groups: tuple[WeightGroup, ...]

    def group(self, module: str) -> WeightGroup | None:
        """How the weight of a linear layer is stored: as its name says or, if nothing does, its class."""
        if self.plain.have(module):
            return None
        each = (group for group in self.groups if group.targets.have(module))
        return next(each, next((group for group in self.groups if "Linear" in group.targets.exact), None))

    def of(self, module: Module[T]) -> WeightGroup:
        group = self.group(module.name.removesuffix("."))
        if group is None:
            raise module.wrong(next(iter(module.parts)), "quantizes a module that quantization_config leaves out")
        return group

    def beginnings(self, tensors: Mapping[str, Stored]) -> Iterator[str]:
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part in ("weight_scale", "scale_packed"):
                yield f"{module}."

    def modules(self, tensors: Mapping[str, T]) -> Iterator[Module[T]]:
        for module in Scheme.modules(self, tensors):
            yield replace(module, method=self.of(module).format)

    def size(self, module: Module[T]) -> Size:
        group = self.of(module)
        if other := sorted(module.parts.keys() - set(_USES[group.format])):
            raise module.wrong(other[0], f"is not used by {group.format}")
        match group.format:
            case "pack-quantized":
                outs, words = module.matrix("weight_packed", INTEGERS, 1, 1)
                module.part("weight_shape", INDEX, (2,))
                inner = words * 32 // group.bits  # what is left of the last word a tensor tells
                if group.group is not None:
                    inner -= inner % group.group
                return _integers(module, group, (outs, inner))
            case "marlin-24":
                return sparse(module, MARLIN_24, group.bits, group.group)
            case "int-quantized":
                return _integers(module, group, module.matrix("weight", ("I8",), 1, 1))
            case "nvfp4-pack-quantized":
                module.part("weight_global_scale", ("F32",), (1,), ())
                return float4(module, "weight_packed", "weight_scale", 16, ("F8_E4M3",))
            case "mxfp4-pack-quantized":
                return float4(module, "weight_packed", "weight_scale", 32, ("U8",))
            case _:
                return float8(module, "weight", "weight_scale", group.shares)


def _integers(module: Module[T], group: WeightGroup, shape: tuple[int, ...]) -> Size:
    outs, inner = shape
    groups, rest = divmod(inner, group.group or inner)
    if rest:
        raise module.wrong("weight", f"has {inner} columns, which don't divide into groups of {group.group}")
    shapes: list[tuple[int, ...]] = [(outs, groups)]
    if group.strategy == "tensor":
        shapes = [(), (1,), (1, 1)]
    elif group.strategy == "channel":
        shapes = [(outs, 1), (outs,)]
    rule = f"strategy {group.strategy}" if group.group is None else f"group_size {group.group}"
    scale = module.part("weight_scale", FLOATS, *shapes, rule=rule)
    minima = not group.symmetric or "weight_zero_point" in module.parts
    if minima and group.format == "pack-quantized":
        words = -(-outs * group.bits // 32)
        module.part("weight_zero_point", INTEGERS, (words, groups), rule=f"num_bits {group.bits} and {rule}")
    elif minima:
        module.part("weight_zero_point", ("I8",), *shapes, rule=rule)
    if group.ordered or "weight_g_idx" in module.parts:
        module.part("weight_g_idx", INDEX, (inner,), rule=rule)
    half = scale.kind == "F16" and not minima
    return integers(shape, group.bits, run_of(inner, group.group), 2 if half else 8 if minima else 4)


def read_compressed_tensors(method: str, raw: Raw) -> Scheme:
    only(
        method,
        raw,
        """config_groups format quantization_status ignore kv_cache_scheme global_compression_ratio sparsity_config
        transform_config moe_sparsity_config version""",
    )
    one_of(raw, "quantization_status", "compressed", "frozen")
    for key in ("transform_config", "moe_sparsity_config"):
        value = object_of(raw, key)
        if value.get("config_groups", value):
            raise wrong(key, "is not implemented")
    sparsity = object_of(raw, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise wrong(
            "sparsity_config",
            f"format: {sparsity.get('format')!r} is not implemented. What llm-compressor saves today is dense.",
        )
    plain = Names.of("ignore", names_of(raw, "ignore"))
    groups = tuple(_groups(raw))
    return CompressedTensors(method=method, rounds=all(group.rounds for group in groups), plain=plain, groups=groups)


def _groups(raw: Raw) -> Iterator[WeightGroup]:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise wrong("config_groups", f"expected an object of groups, got {groups!r}")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise wrong("config_groups", f"{name}: expected an object, got {group!r}")
        if group.get("weights") is not None:
            yield _group(f"{WHERE}: config_groups: {name}", group, raw.get("format"))


def _group(where: str, raw: Mapping[str, Any], form: object) -> WeightGroup:
    weights, targets = raw["weights"], raw.get("targets")
    if not isinstance(weights, dict):
        raise StartupError(f"{where}: weights: expected an object, got {weights!r}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise StartupError(f"{where}: targets: expected a list of names, got {targets!r}")
    for target in targets:
        if target[:1].isupper() and target != "Linear":
            raise StartupError(f"{where}: targets: the class {target!r} is not implemented")
    kind, bits, symmetric = str(weights.get("type", "int")), weights.get("num_bits", 8), weights.get("symmetric", True)
    form = raw.get("format") or form
    if form == "naive-quantized":
        form = f"{kind}-quantized"
    if not isinstance(form, str) or form not in FORMATS:
        raise StartupError(f"{where}: format: {form!r} is not implemented; known: {', '.join(FORMATS)}")
    numbers, widths, strategies, only = FORMATS[form]
    group = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    for key, value, known in (
        ("type", kind, (numbers,)),
        ("num_bits", bits, widths),
        ("strategy", strategy, strategies),
        ("symmetric", symmetric, (True, False) if numbers == "int" else (True,)),
        ("dynamic", weights.get("dynamic", False), (False,)),
        ("actorder", weights.get("actorder") or None, (None, "weight", "static", "group", "dynamic")),
    ):
        if not any(type(value) is type(each) and value == each for each in known):
            raise StartupError(f"{where}: weights: {key}: {value!r} is not implemented for {form}")
    if strategy in ("group", "tensor_group"):
        if type(group) is not int or group < 1 or (only is not None and group != only):
            raise StartupError(f"{where}: weights: group_size: {group!r} is not implemented for {form}")
    else:
        group = None
    return WeightGroup(
        targets=Names.of("targets", targets),
        format=form,
        bits=bits,
        strategy=strategy,
        group=group,
        block=_block(where, weights.get("block_structure")) if strategy == "block" else None,
        symmetric=symmetric,
        ordered=weights.get("actorder") in ("group", "dynamic"),
        rounds=bool(raw.get("input_activations")),
    )


def _block(where: str, raw: object) -> tuple[int, int]:
    """Rows and columns; older files have them as "128x128"."""
    sizes = raw.split("x") if isinstance(raw, str) else raw
    try:
        high, wide = map(int, sizes)  # type: ignore[call-overload]  # what is no list is refused below
    except (TypeError, ValueError):
        high = wide = 0
    if high < 1 or wide < 1:
        raise StartupError(f"{where}: weights: block_structure: expected two sizes, got {raw!r}")
    return high, wide
