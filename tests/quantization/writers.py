"""Checkpoints in the formats that other programs write, by their published layouts: what stands for a matrix, and what
that means in float32."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_model
from tgi.quantization.bitsandbytes import TABLES

Tensors = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Of a matrix [out, in]: tensors by what stands behind the module's name, and their meaning."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def tiles(weight: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """The greatest number of each block, [out / high, in / wide]; the last blocks may be smaller."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % wide, 0, -weight.shape[0] % high))
    return padded.view(len(padded) // high, high, -1, wide).abs().amax((1, 3))


def spread(scale: torch.Tensor, weight: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Each block's number for all of its own."""
    full = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return full[: weight.shape[0], : weight.shape[1]]


def e8m0(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales rounded up to powers of two: their exponents, and they."""
    exponent = scale.log2().ceil() + 127
    return exponent.to(torch.uint8), torch.ldexp(torch.ones_like(scale), exponent.int() - 127)


def fp8(
    block: tuple[int, int] | None = None,
    suffix: str = "_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scales: torch.dtype = torch.float32,
    shape: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Writer:
    """``block``: rows and columns that share a scale; 0 rows or columns: all. ``shape``: what is stored of them."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        high, wide = block or (0, 0)
        high, wide = high or len(weight), wide or weight.shape[1]
        scale = tiles(weight, high, wide) / torch.finfo(dtype).max
        stored = scale.to(scales)
        if scales == torch.uint8:
            stored, scale = e8m0(scale)
        scale = spread(stored.float() if scales != torch.uint8 else scale, weight, high, wide)
        values = (weight / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        return {"weight": values, f"weight{suffix}": shape(stored)}, values.float() * scale

    return write


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns] → int32 [rows, columns · bits / 32], the first column in the lowest bits."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each)).view(len(values), -1, each).long()
    summed = (padded << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(summed >= 1 << 31, summed - (1 << 32), summed).to(torch.int32)


def integers(
    bits: int,
    group: int = 0,
    *,
    packed: bool = True,
    symmetric: bool = True,
    scales: torch.dtype = torch.bfloat16,
    tensor: bool = False,
    ordered: bool = False,
) -> Writer:
    """``group``: columns that share a scale; 0: all. ``tensor``: and all rows. ``ordered``: columns belong to groups in
    an order of their own."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outs, inner = weight.shape
        half = 1 << bits - 1
        wide = group or inner
        order = torch.randperm(inner) if ordered else torch.arange(inner)
        sorted_ = weight[:, order]
        blocks = sorted_.view(outs, -1, wide)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = (high - low) / (2 * half - 1) if not symmetric else torch.maximum(-low, high) / (half - 0.5)
        if tensor:
            scale = scale.amax().expand(outs, 1)
        scale = scale.to(scales)
        zero = torch.zeros_like(scale) if symmetric else (-half - low / scale).float().round().clamp(-half, half - 1)
        stored = (blocks / scale.float()[..., None] + zero[..., None]).round().clamp(-half, half - 1)
        values = ((stored - zero[..., None]) * scale.float()[..., None]).view(outs, inner)
        whole = stored.view(outs, inner).to(torch.int8)[:, order.argsort()]
        tensors = {"weight_scale": scale[:1, 0].clone() if tensor else scale.contiguous()}
        if packed:
            tensors["weight_packed"] = words((whole + half).to(torch.uint8), bits)
            tensors["weight_shape"] = torch.tensor([outs, inner])
        else:
            tensors["weight"] = whole
        if not symmetric:
            unsigned = (zero + half).to(torch.uint8)
            tensors["weight_zero_point"] = words(unsigned.T, bits).T.contiguous() if packed else zero.to(torch.int8)
        if ordered:
            tensors["weight_g_idx"] = (torch.arange(inner) // wide)[order.argsort()].int()
        return tensors, values[:, order.argsort()]

    return write


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the levels that are nearest."""
    return (values[..., None] - table).abs().argmin(-1).to(torch.uint8)


def low_first(codes: torch.Tensor) -> torch.Tensor:
    """[rows, columns] → [rows, columns / 2]."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def mxfp4(packed: str) -> Writer:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        exponent, scale = e8m0(tiles(weight, 1, 32) / 6)
        scale = spread(scale, weight, 1, 32)
        codes = nearest(weight / scale, E2M1)
        return {packed: low_first(codes), "weight_scale": exponent}, E2M1[codes.int()] * scale

    return write


def nvfp4(names: tuple[str, str, str], *, divides: bool) -> Writer:
    """``names``: of codes, scales, and what all scales are divided by or, if it isn't ``divides``, multiplied."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        most = tiles(weight, 1, 16)
        whole = 6 * 448 / most.amax() if divides else most.amax() / (6 * 448)
        stored = (most / 6 * whole if divides else most / 6 / whole).to(torch.float8_e4m3fn)
        scale = spread(stored.float() / whole if divides else stored.float() * whole, weight, 1, 16)
        codes = nearest(weight / scale, E2M1)
        tensors = (low_first(codes), stored, whole.reshape(1) if divides else whole)
        return dict(zip(names, tensors, strict=True)), E2M1[codes.int()] * scale

    return write


def four_bits(kind: str, *, nested: bool = False) -> Writer:
    """bitsandbytes': blocks of 64 numbers, one row behind the other."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        most = flat.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors = {"weight.absmax": most, "weight.quant_map": TABLES[kind]}
        if nested:
            offset = most.mean().item()
            table = torch.linspace(-1, 1, 256)
            scales = torch.nn.functional.pad(most - offset, (0, -len(most) % 256)).view(-1, 256)
            above = scales.abs().amax(1)
            index = (scales / above[:, None])[..., None].sub(table).abs().argmin(-1)
            most = (table[index] * above[:, None]).flatten()[: len(most)] + offset
            tensors["weight.absmax"] = index.flatten()[: len(most)].to(torch.uint8)
            tensors |= {"weight.nested_absmax": above, "weight.nested_quant_map": table}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = nearest(flat / most[:, None], TABLES[kind])
        values = (TABLES[kind][codes.int()] * most[:, None]).flatten()[: weight.numel()].view_as(weight)
        codes = codes.flatten()[: weight.numel()]
        tensors["weight"] = (codes[0::2] << 4 | codes[1::2])[:, None]
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors, values

    return write


def eight_bits(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes' LLM.int8."""
    most = weight.abs().amax(1)
    stored = (weight * (127 / most)[:, None]).round().to(torch.int8)
    tensors = {"weight": stored, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, stored.float() * (most / 127)[:, None]


@dataclass(frozen=True)
class Format:
    writer: Writer
    config: Mapping[str, Any]
    beside: Tensors = field(default_factory=dict)
    """What stands beside each matrix and changes nothing."""


def llm_compressor(form: str, weights: Mapping[str, Any], **group: Any) -> dict[str, Any]:
    weights = {"dynamic": False, "symmetric": True, "observer": "minmax"} | dict(weights)
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None} | group},
        "kv_cache_scheme": None,
    }


def quark(dtype: str, qscheme: str, **weight: Any) -> dict[str, Any]:
    weights = {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False} | weight
    cache = {"*k_proj": {"weight": weights, "output_tensors": {"dtype": "fp8_e4m3"}}}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weights, "input_tensors": None},
        "layer_quant_config": cache,
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
    }


def _int(bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group} | more


def _float(bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": group} | more


_STATIC = {"input_scale": torch.tensor(0.02)}
_CT8 = "float-quantized"
_NVFP4 = ("weight_packed", "weight_scale", "weight_global_scale")
_MODELOPT = ("weight", "weight_scale", "weight_scale_2")

FORMATS: dict[str, Format] = {
    "fp8 tensor": Format(
        fp8(suffix="_scale", shape=lambda scale: scale.reshape(())),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        _STATIC,
    ),
    "fp8 e5m2": Format(
        fp8((1, 0), dtype=torch.float8_e5m2),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e5m2", "weight_block_size": None},
    ),
    "fp8 blocks": Format(
        fp8((32, 32)), {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    ),
    "fp8 blocks that don't divide": Format(fp8((48, 40)), {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "fp8 exponents": Format(
        fp8((32, 32), scales=torch.uint8),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
    ),
    "fbgemm_fp8": Format(
        fp8((1, 0), "_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        {"input_scale_ub": torch.tensor([1200.0])},
    ),
    "mxfp8": Format(fp8((1, 32), scales=torch.uint8), {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head"]}),
    "mxfp4": Format(mxfp4("weight"), {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "quark fp8": Format(
        fp8(suffix="_scale", shape=lambda scale: scale.reshape(())), quark("fp8_e4m3", "per_tensor"), _STATIC
    ),
    "quark mxfp4": Format(mxfp4("weight"), quark("fp4", "per_group", group_size=32, scale_format="e8m0")),
    "modelopt fp8": Format(
        fp8(suffix="_scale", shape=lambda scale: scale.reshape(())),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        _STATIC,
    ),
    "modelopt nvfp4": Format(
        nvfp4(_MODELOPT, divides=False), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, _STATIC
    ),
    "w4a16": Format(integers(4, 32), llm_compressor("pack-quantized", _int(4, "group", 32))),
    "w4a16 asymmetric": Format(
        integers(4, 16, symmetric=False), llm_compressor("pack-quantized", _int(4, "group", 16, symmetric=False))
    ),
    "w4a16 in an order of its own": Format(
        integers(4, 32, ordered=True), llm_compressor("pack-quantized", _int(4, "group", 32, actorder="group"))
    ),
    "w4a16 asymmetric, ordered": Format(
        integers(4, 32, ordered=True, symmetric=False),
        llm_compressor("pack-quantized", _int(4, "group", 32, actorder="group", symmetric=False)),
    ),
    "w8a16": Format(
        integers(8, scales=torch.float16), llm_compressor("pack-quantized", _int(8, "channel", actorder="weight"))
    ),
    "w2a16": Format(integers(2, 16), llm_compressor("pack-quantized", _int(2, "group", 16))),
    "w8a8": Format(
        integers(8, packed=False),
        llm_compressor("int-quantized", _int(8, "channel"), input_activations=_int(8, "token", dynamic=True)),
    ),
    "w8a8 tensor": Format(
        integers(8, packed=False, tensor=True), llm_compressor("naive-quantized", _int(8, "tensor")), _STATIC
    ),
    "w8a8 asymmetric": Format(
        integers(8, packed=False, symmetric=False), llm_compressor("int-quantized", _int(8, "channel", symmetric=False))
    ),
    "compressed fp8 tensor": Format(
        fp8(suffix="_scale", shape=lambda scale: scale.reshape(1), scales=torch.bfloat16),
        llm_compressor("naive-quantized", _float(8, "tensor")),
        _STATIC,
    ),
    "compressed fp8": Format(
        fp8((1, 0), "_scale", scales=torch.bfloat16),
        llm_compressor(_CT8, _float(8, "channel"), input_activations=_float(8, "token", dynamic=True)),
    ),
    "compressed fp8 blocks": Format(
        fp8((32, 32), "_scale"), llm_compressor(_CT8, _float(8, "block", block_structure=[32, 32]))
    ),
    "compressed nvfp4": Format(
        nvfp4(_NVFP4, divides=True),
        llm_compressor("nvfp4-pack-quantized", _float(4, "tensor_group", 16)),
        {"input_global_scale": torch.tensor([3.0])},
    ),
    "compressed mxfp4": Format(mxfp4("weight_packed"), llm_compressor("mxfp4-pack-quantized", _float(4, "group", 32))),
    "compressed mxfp8": Format(
        fp8((1, 32), "_scale", scales=torch.uint8), llm_compressor("mxfp8-quantized", _float(8, "group", 32))
    ),
    "nf4": Format(
        four_bits("nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    ),
    "nf4 nested": Format(
        four_bits("nf4", nested=True),
        {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "fp4": Format(four_bits("fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": Format(eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}),
}


def requantize(folder: Path, form: Format, chosen: Callable[[str], bool]) -> tuple[Path, dict[str, torch.Tensor]]:
    """Quantize those weights of a model's folder that are ``chosen``. Returns another with what they mean then, and
    what that is."""
    torch.manual_seed(0)
    (path,) = folder.glob("*.safetensors")
    stored: Tensors = {}
    plain: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(path).items():
        plain[name] = stored[name] = tensor.float()
        if chosen(name):
            del stored[name]
            module = name.removesuffix("weight")
            parts, meant[name] = form.writer(tensor.float())
            plain[name] = meant[name]
            stored |= {module + part: value.clone() for part, value in (parts | form.beside).items()}
    config = json.loads((folder / "config.json").read_text())
    other = folder / "plain"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, other / path.name, {"format": "pt"})
    save_file(stored, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(form.config)}))
    return other, meant


def write(folder: Path, form: Format) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama whose layers are quantized; as ``requantize``."""
    write_model(folder, "llama", intermediate_size=96)
    return requantize(folder, form, lambda name: name.endswith("_proj.weight"))
