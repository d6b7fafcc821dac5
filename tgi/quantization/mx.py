"""Floating point of 4 bits with a scale for each group of columns: MXFP4 (OCP Microscaling Formats 1.0), NVFP4."""

from collections.abc import Mapping
from dataclasses import dataclass

from tgi.core.errors import StartupError
from tgi.quantization import fp8
from tgi.quantization.forms import Codes
from tgi.quantization.parts import E2M1, floating, halves, matrix, part, weights_alone
from tgi.quantization.quantized import Entry
from tgi.quantization.scheme import Fp8, Scheme


def unpack(entries: Mapping[str, Entry], scheme: Scheme) -> dict[str, Entry]:
    """What ModelOpt writes: bytes ``X.weight`` with ``X.weight_scale`` and ``X.weight_scale_2`` (NVFP4), or float8.
    What gpt-oss has: ``X_blocks`` and ``X_scales`` (MXFP4), a stack of [out, in] matrices."""
    if isinstance(scheme, Fp8):
        return fp8.unpack(entries, scheme)
    found = weights_alone(entries)
    for name, entry in list(found.items()):
        module = name.removesuffix("_blocks")
        if module != name:
            *stack, groups, width = entry.shape
            packed = part(found, name, entry, scheme.method, ("U8",), (*stack, groups, 16))
            scale = part(found, f"{module}_scales", entry, scheme.method, ("U8",), (*stack, groups))
            found[module] = coded(packed, scale, (*stack, groups * width * 2), scheme.method)
            del found[name], found[f"{module}_scales"]
        elif name.endswith(".weight") and entry.kind == "U8":
            outs, width = entry.shape
            scale = part(found, f"{name}_scale", entry, scheme.method, ("F8_E4M3",), (outs, width // 8))
            factor = part(found, f"{name}_scale_2", entry, scheme.method, ("F32",), (), (1,))
            found[name] = coded(entry, scale, (outs, width * 2), scheme.method, factor)
            del found[f"{name}_scale"], found[f"{name}_scale_2"]
    return found


def coded(
    packed: Entry,
    scale: Entry,
    shape: tuple[int, ...],
    method: str,
    factor: Entry | None = None,
    divisor: Entry | None = None,
) -> Entry:
    """The matrix, or stack of them, of ``shape``, two numbers to a byte. ``factor``, ``divisor``: of all scales."""
    if shape[-1] % scale.shape[-1]:
        raise StartupError(f"{packed.path}: {method}: {shape[-1]} columns don't divide into {scale.shape[-1]} groups")
    parts = [entry for entry in (packed, scale, factor, divisor) if entry is not None]
    return matrix(parts, shape, _Coded(packed, scale, factor, divisor))


@dataclass(frozen=True, slots=True)
class _Coded:
    packed: Entry
    scale: Entry
    factor: Entry | None
    divisor: Entry | None

    def __getitem__(self, rows: slice) -> Codes:
        groups = self.scale.shape[-1]
        scale = floating(self.scale.values[:].reshape(-1, groups)[rows])
        packed = self.packed.values[:].reshape(self.scale.values[:].numel() // groups, -1)[rows]
        if self.factor is not None:
            scale = scale * self.factor.values[:].float()
        if self.divisor is not None:
            scale = scale / self.divisor.values[:].float()
        return Codes(halves(packed), E2M1, scale)
