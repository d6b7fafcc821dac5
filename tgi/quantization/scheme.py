"""How a checkpoint says that its weights are quantized (``quantization_config``), read strictly. No torch.

One table: a method's row names what reads its config and which module turns its tensors into matrices.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw, flag, integer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What all methods have."""

    method: str
    plain: tuple[str, ...] = ()
    """Modules that are not quantized: those whose names have one of these in them."""

    def keeps(self, module: str) -> bool:
        """Whether a module's weight is stored as it is."""
        return any(part in module for part in self.plain)

    def resident(self, size: int, width: int) -> float:
        """Bytes that a stored tensor of ``size`` numbers of ``width`` bytes takes in memory, as our kernels read it."""
        return size * width


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Scheme):
    """Frantar et al., arXiv 2210.17323. Integers are packed along the inputs, groups of which share a scale."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""


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


def _names(raw: Raw, key: str) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StartupError(f"quantization_config: {key}: expected a list of names, got {names!r}")
    return tuple(names)


METHODS: Mapping[str, Row] = {
    "gptq": Row("tgi.quantization.gptq", _gptq, "GPTQ, 4 and 8 bits"),
}


def read_scheme(raw: Raw) -> Scheme | None:
    """Of a config.json; None if its weights are plain. StartupError names what is not implemented."""
    settings: Any = raw.get("quantization_config") or raw.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise StartupError(f"config.json: quantization_config: expected an object, got {settings!r}")
    method = str(settings.get("quant_method"))
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise StartupError(
            f"config.json: quantization_config: quant_method: {method!r} is not implemented; known: {known}"
        )
    return METHODS[method].read(method, settings)
