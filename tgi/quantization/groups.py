"""Which modules a compressed-tensors config quantizes, and how. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgi.core.errors import StartupError

_CONFIG = "config.json: quantization_config"

FORMATS: Mapping[str, tuple[str, tuple[int, ...], tuple[str, ...], int | None]] = {
    "pack-quantized": ("int", (2, 4, 8), ("tensor", "channel", "group"), None),
    "int-quantized": ("int", (8,), ("tensor", "channel", "group"), None),
    "float-quantized": ("float", (8,), ("tensor", "channel", "group", "block"), None),
    "nvfp4-pack-quantized": ("float", (4,), ("tensor_group",), 16),
    "mxfp4-pack-quantized": ("float", (4,), ("group",), 32),
    "mxfp8-quantized": ("float", (8,), ("group",), 32),
}
"""How weights are stored: type, bits and strategies that there are, and the group size if there is one only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Modules whose weights are stored alike."""

    targets: tuple[str, ...]
    """Names, patterns behind ``re:``, or the class ``Linear``."""
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


def named(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of the targets is the module's name, or a pattern that it begins with."""
    return any(
        re.match(target.removeprefix("re:"), module) is not None if target.startswith("re:") else target == module
        for target in targets
    )


def read_groups(raw: Mapping[str, Any]) -> tuple[WeightGroup, ...]:
    """Of a config. StartupError names the key that is not implemented."""
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise StartupError(f"{_CONFIG}: config_groups: expected an object of groups, got {groups!r}")
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise StartupError(f"{_CONFIG}: config_groups: {name}: expected an object, got {group!r}")
        if group.get("weights") is not None:
            found.append(_group(f"{_CONFIG}: config_groups: {name}", group, raw.get("format")))
    return tuple(found)


def _group(where: str, raw: Mapping[str, Any], form: object) -> WeightGroup:
    weights, targets = raw["weights"], raw.get("targets")
    if not isinstance(weights, dict):
        raise StartupError(f"{where}: weights: expected an object, got {weights!r}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise StartupError(f"{where}: targets: expected a list of names, got {targets!r}")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise StartupError(f"{where}: targets: {target!r}: {error}") from None
        elif target[:1].isupper() and target != "Linear":
            raise StartupError(f"{where}: targets: the class {target!r} is not implemented")
    kind, bits, symmetric = str(weights.get("type", "int")), weights.get("num_bits", 8), weights.get("symmetric", True)
    form = raw.get("format") or form
    if form == "naive-quantized":
        form = f"{kind}-quantized"
    if form not in FORMATS:
        raise StartupError(f"{where}: format: {form!r} is not implemented; known: {', '.join(FORMATS)}")
    numbers, widths, strategies, only = FORMATS[str(form)]
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
        if value not in known:
            raise StartupError(f"{where}: weights: {key}: {value!r} is not implemented for {form}")
    if strategy in ("group", "tensor_group"):
        if type(group) is not int or group < 1 or (only is not None and group != only):
            raise StartupError(f"{where}: weights: group_size: {group!r} is not implemented for {form}")
    else:
        group = None
    return WeightGroup(
        targets=tuple(targets),
        format=str(form),
        bits=bits,
        strategy=strategy,
        group=group,
        block=_block(where, weights.get("block_structure")) if strategy == "block" else None,
        symmetric=symmetric,
        ordered=weights.get("actorder") in ("group", "dynamic"),
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
