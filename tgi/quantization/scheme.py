"""Which methods of quantization there are (``quant_method``): one table of those that are read, one of those that
aren't. No torch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tgi.core.errors import StartupError
from tgi.core.model_config import Raw
from tgi.quantization.formats import compressed, floats, integers
from tgi.quantization.formats.base import Scheme
from tgi.quantization.formats.settings import WHERE


class Row(NamedTuple):
    """A method."""

    module: str
    """Its ``unpack`` makes matrices of stored tensors."""
    read: Callable[[str, Raw], Scheme]
    """Of method and config."""
    description: str


def _row(module: str, read: Callable[[str, Raw], Scheme], description: str) -> Row:
    return Row(f"tgi.quantization.{module}", read, description)


METHODS: Mapping[str, Row] = {
    "gptq": _row(
        "gptq",
        integers.read_gptq,
        "GPTQ in 2, 3, 4 and 8 bits, any group, symmetric or not, act-order, versions 1 and 2 (AutoGPTQ, GPTQModel)",
    ),
    "awq": _row("awq", integers.read_awq, "AWQ in 4 bits, packed for the kernels gemm and gemv (AutoAWQ)"),
    "auto-round": _row("gptq", integers.read_auto_round, "AutoRound, packed as GPTQ or AWQ are"),
    "marlin": _row("marlin", integers.read_marlin, "GPTQ's 4 bits packed for the GPU kernel Marlin"),
    "marlin_24": _row("marlin", integers.read_marlin_24, "GPTQ's 4 and 8 bits, two of four inputs, for Sparse-Marlin"),
    "eetq": _row("eetq", integers.read_eetq, "EETQ's int8, packed for GPUs from Turing on"),
    "exl2": _row("exl2", integers.read_exl2, "ExLlamaV2's mixture of 2 to 8 bits, held in the widest of each matrix"),
    "hqq": _row("hqq", integers.read_hqq, "HQQ in 1, 2, 3, 4 and 8 bits, groups along the inputs (transformers)"),
    "bitnet": _row("bitnet", integers.read_bitnet, "BitNet's -1, 0 and 1, in 4 bits each"),
    "metal": _row("affine", integers.read_affine, "MLX's 2, 4 and 8 bits, and what transformers' Metal kernels have"),
    "fp8": _row("fp8", floats.read_fp8, "float8, a scale for each tensor, row or block"),
    "mxfp8": _row("fp8", floats.read_fp8, "float8, a power of two for each 32 inputs"),
    "fbgemm_fp8": _row("fp8", floats.read_fbgemm_fp8, "float8, a scale for each row"),
    "compressed-tensors": _row(
        "compressed",
        compressed.read_compressed_tensors,
        "llm-compressor's formats: integers of 2, 4 and 8 bits, float8, MXFP8, MXFP4, NVFP4, Sparse-Marlin",
    ),
    "bitsandbytes": _row("bitsandbytes", floats.read_bitsandbytes, "LLM.int8, NF4, FP4"),
    "mxfp4": _row("mx", floats.read_mxfp4, "MXFP4"),
    "modelopt": _row("mx", floats.read_modelopt, "ModelOpt: NVFP4, float8"),
    "quark": _row("mx", floats.read_quark, "AMD's Quark: float8, MXFP4"),
}

_CODEBOOKS = "has codes into tables of vectors, which no kernel here multiplies"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("aqlm", "vptq", "higgs", "quip", "quip_sharp"), _CODEBOOKS),
    "exl3": "has trellises, which no kernel here decodes; EXL2 and GGUF files are read",
    "spqr": "has outliers in sparse matrices beside integers",
    "sinq": "scales columns, too, which no kernel here does",
    "fp_quant": "rotates activations before they are multiplied, which is not implemented",
    "gemma": "rounds activations as the model was trained to, which is not implemented",
    "torchao": "has tensor classes of its own, which change with its version",
    "fouroversix": "has layouts of its own library",
    "quanto": "is never written by transformers",
    "nvfp4": "is never written by transformers; llm-compressor's and ModelOpt's NVFP4 are read",
    "gguf": "is no config's: name the GGUF file itself",
}
"""Method → why not."""
_INSTEAD = (
    "`--quantize` rounds the model that it was made of, and `text-generation-server quantize` writes GPTQ and AWQ"
)

_ALIASES = {
    "intel/auto-round": "auto-round",
    "auto_round": "auto-round",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
}


def _guessed(raw: Raw, settings: Raw) -> str:
    """Of configs that don't say: llm-compressor's, bitsandbytes', MLX's, and the files that AutoGPTQ and AutoAWQ wrote
    before there was a place for it in config.json."""
    if "config_groups" in settings:
        return "compressed-tensors"
    if any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
        return "bitsandbytes"
    if raw.get("quantization") == settings:
        return "metal"
    if not {"bits", "w_bit"} & settings.keys():
        raise StartupError(f"{WHERE}: quant_method is missing")
    return "awq" if str(settings.get("version")).lower() in ("gemm", "gemv") else "gptq"


def read_scheme(raw: Raw) -> Scheme | None:
    """Of a config.json; None if its weights are plain. StartupError names what is not implemented."""
    settings: Any = raw.get("quantization_config") or raw.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise StartupError(f"{WHERE}: expected an object, got {settings!r}")
    named = str(settings.get("quant_method") or settings.get("method") or _guessed(raw, settings))
    method = _ALIASES.get(named, named)
    if method in REFUSED:
        raise StartupError(f"{WHERE}: quant_method: {named!r} is not implemented: it {REFUSED[method]}. {_INSTEAD}")
    if method not in METHODS:
        raise StartupError(f"{WHERE}: quant_method: {named!r} is not implemented; known: {', '.join(METHODS)}")
    return METHODS[method].read(method, settings)
