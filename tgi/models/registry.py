"""Which architectures are implemented and where: one table. Importing it imports no torch."""

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.headers import read_model
from tgi.core.model_config import Raw, architecture
from tgi.models.config import DecoderConfig, Family, TailConfig
from tgi.models.families import baichuan, cohere, deepseek, experts, gemma, gpt, llama, olmo, tail

if TYPE_CHECKING:
    import torch

    from tgi.attention.base import Attend, AttnSpec
    from tgi.kernels.library import Library
    from tgi.kernels.sampling import Head
    from tgi.parallel import Group


log = logging.getLogger(__name__)


class Row(NamedTuple):
    """An architecture: where its class is, how its config is read, and what it is."""

    module: str
    name: str
    config: Family
    description: str


_DENSE = ("tgi.models.dense", "DenseDecoder")
_GPT = ("tgi.models.gpt", "GptDecoder")

ARCHITECTURES: dict[str, Row] = {
    "LlamaForCausalLM": Row(*_DENSE, llama.LLAMA, "Llama 1 to 3.3, SmolLM, Yi, and others of the same layout"),
    "MistralForCausalLM": Row(*_DENSE, llama.MISTRAL, "Mistral 7B and relatives, sliding window"),
    "Qwen2ForCausalLM": Row(*_DENSE, llama.QWEN2, "Qwen 2 and 2.5, QwQ"),
    "Qwen3ForCausalLM": Row(*_DENSE, llama.QWEN3, "Qwen 3, dense sizes"),
    "Phi3ForCausalLM": Row(*_DENSE, llama.PHI3, "Phi 3, 3.5 and 4"),
    "GraniteForCausalLM": Row(*_DENSE, llama.GRANITE, "Granite 3, dense sizes"),
    "SmolLM3ForCausalLM": Row(*_DENSE, llama.SMOLLM3, "SmolLM3"),
    "ArceeForCausalLM": Row(*_DENSE, llama.ARCEE, "Arcee AFM"),
    "SeedOssForCausalLM": Row(*_DENSE, llama.SEED_OSS, "Seed-OSS"),
    "Ernie4_5ForCausalLM": Row(*_DENSE, llama.ERNIE, "Ernie 4.5, dense sizes"),
    "HeliumForCausalLM": Row(*_DENSE, llama.HELIUM, "Helium"),
    "GlmForCausalLM": Row(*_DENSE, llama.GLM, "GLM 4 9B"),
    "Glm4ForCausalLM": Row(*_DENSE, llama.GLM4, "GLM 4 0414"),
    "Exaone4ForCausalLM": Row(*_DENSE, llama.EXAONE4, "EXAONE 4"),
    "Olmo2ForCausalLM": Row(*_DENSE, olmo.OLMO2, "OLMo 2"),
    "Olmo3ForCausalLM": Row(*_DENSE, olmo.OLMO3, "OLMo 3"),
    "BaichuanForCausalLM": Row(*_DENSE, baichuan.BAICHUAN, "Baichuan 2, and Baichuan 13B"),
    "BaiChuanForCausalLM": Row(*_DENSE, baichuan.BAICHUAN, "Baichuan 7B"),
    "OlmoForCausalLM": Row(*_GPT, olmo.OLMO, "OLMo 1"),
    "NemotronForCausalLM": Row(*_GPT, gpt.NEMOTRON, "Nemotron 3 and 4, Minitron"),
    "GPT2LMHeadCustomModel": Row(*_GPT, gpt.SANTACODER, "SantaCoder under its first name"),
    "Cohere2ForCausalLM": Row(*_GPT, cohere.COHERE2, "Command R7B and A"),
    "MixtralForCausalLM": Row(*_DENSE, experts.MIXTRAL, "Mixtral"),
    "Qwen2MoeForCausalLM": Row(*_DENSE, experts.QWEN2_MOE, "Qwen 1.5 and 2, mixtures of experts"),
    "Qwen3MoeForCausalLM": Row(*_DENSE, experts.QWEN3_MOE, "Qwen 3, mixtures of experts"),
    "DeepseekV2ForCausalLM": Row(*_DENSE, deepseek.DEEPSEEK_V2, "DeepSeek 2 and 2.5, Coder 2"),
    "DeepseekV3ForCausalLM": Row(*_DENSE, deepseek.DEEPSEEK_V3, "DeepSeek 3 and R1, Kimi K2"),
    "GraniteMoeForCausalLM": Row(*_DENSE, experts.GRANITE_MOE, "Granite 3, mixtures of experts"),
    "OlmoeForCausalLM": Row(*_DENSE, experts.OLMOE, "OLMoE"),
    "Glm4MoeForCausalLM": Row(*_DENSE, experts.GLM4_MOE, "GLM 4.5 and 4.6, mixtures of experts"),
    "DbrxForCausalLM": Row(*_GPT, experts.DBRX, "DBRX"),
    "PhimoeForCausalLM": Row(*_GPT, experts.PHIMOE, "Phi 3.5, mixture of experts"),
    "StableLmForCausalLM": Row(*_GPT, gpt.STABLELM, "StableLM 2 and 3B"),
    "GPTNeoXForCausalLM": Row(*_GPT, gpt.NEOX, "GPT-NeoX, Pythia, StableLM alpha, Dolly"),
    "GPTJForCausalLM": Row(*_GPT, gpt.GPTJ, "GPT-J"),
    "PhiForCausalLM": Row(*_GPT, gpt.PHI, "Phi 1, 1.5 and 2"),
    "MixFormerSequentialForCausalLM": Row(*_GPT, gpt.PHI, "Phi 1 and 1.5 under their first name"),
    "FalconForCausalLM": Row(*_GPT, gpt.FALCON, "Falcon 1 and 2, with rotary embedding or ALiBi"),
    "RWForCausalLM": Row(*_GPT, gpt.FALCON, "Falcon under its first name"),
    "GPT2LMHeadModel": Row(*_GPT, gpt.GPT2, "GPT-2"),
    "GPTBigCodeForCausalLM": Row(*_GPT, gpt.BIGCODE, "StarCoder 1, SantaCoder"),
    "OPTForCausalLM": Row(*_GPT, gpt.OPT, "OPT and Galactica"),
    "BloomForCausalLM": Row(*_GPT, gpt.BLOOM, "BLOOM, BLOOMZ"),
    "MptForCausalLM": Row(*_GPT, gpt.MPT, "MPT"),
    "MPTForCausalLM": Row(*_GPT, gpt.MPT, "MPT under its first name"),
    "Starcoder2ForCausalLM": Row(*_GPT, gpt.STARCODER2, "StarCoder 2"),
    "CohereForCausalLM": Row(*_GPT, cohere.COHERE, "Command R, Aya"),
    "GemmaForCausalLM": Row(*_DENSE, gemma.GEMMA, "Gemma 1, CodeGemma"),
    "Gemma2ForCausalLM": Row(*_DENSE, gemma.GEMMA2, "Gemma 2"),
    "Gemma3ForCausalLM": Row(*_DENSE, gemma.GEMMA3, "Gemma 3, text alone"),
}


class _Model(Protocol):
    """What the runtime knows of any model."""

    description: str
    """What serves it and why, for the operator."""

    @property
    def specs(self) -> "Sequence[AttnSpec]":
        """One per layer that is served by our attention."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def compute(self) -> "torch.dtype":
        """Of activations."""

    @property
    def library(self) -> "Library | None":
        """The native kernels, if it runs on them."""

    @property
    def head(self) -> "Head | None":
        """What ``logits`` computes, if that is one product of the native kernels."""

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """[rows, hidden] → float32 [rows, vocab], valid until the next call."""


class PagedModel(_Model, Protocol):
    """Its keys and values are in the paged cache."""

    static: bool
    """Whether its forward does nothing but operations of the device, the same for every step of as many tokens."""

    def forward(self, token_ids: "torch.Tensor", positions: "torch.Tensor", attend: "Attend") -> "torch.Tensor":
        """int64 [tokens], int64 [tokens] → [tokens, hidden]. The token axis is flat: all requests of a step."""


@runtime_checkable
class CachingModel(_Model, Protocol):
    """It keeps something of its own of each request."""

    def advance(self, token_ids: "torch.Tensor", start: int, kept: Any) -> "tuple[torch.Tensor, Any]":
        """int64 [tokens], all of one request, and what it kept when it last computed some (None: nothing) → [tokens -
        start, hidden] of those from ``start`` on, and what it keeps now. What was handed in is used up."""


Model = PagedModel | CachingModel


def check(
    raw: Raw,
    *,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    trust_remote_code: bool = False,
) -> DecoderConfig | TailConfig:
    """The model's own config from a config.json, or its sizes if it has no row; StartupError, naming the key, if
    anything in it is not implemented."""
    row = ARCHITECTURES.get(architecture(raw))
    if row is None:
        scaled = rope_scaling is not None or rope_factor is not None
        return tail.read(raw, scaled=scaled, trust_remote_code=trust_remote_code)
    return row.config.read(raw, rope_scaling=rope_scaling, rope_factor=rope_factor)


def load_model(
    files: ModelFiles,
    dtype: "torch.dtype",
    device: "torch.device",
    *,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    max_total_tokens: int | None = None,
    quantize: str | None = None,
    packed: Path | None = None,
    trust_remote_code: bool = False,
    group: "Group | None" = None,
    fixed: bool = False,
    progress: Callable[[int, int], None],
) -> Model:
    """Read the weights into memory, ready to run.

    ``dtype``: of weights, where they aren't quantized. ``quantize``: see Checkpoint; needs the native kernels or, on a
    GPU, Triton. ``packed``: folder where packed weights are kept, if they shall be.
    ``max_total_tokens`` is the longest request that will be served; rope types whose frequencies depend on length
    choose by it (None: all that the config allows). ``trust_remote_code``: Python files of the model's folder may be
    run, if it has no row here. ``fixed``: see Checkpoint. ``progress`` gets (bytes done, bytes in all).
    """
    parsed = check(
        read_model(files),
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        trust_remote_code=trust_remote_code,
    )

    import torch

    from tgi.kernels.library import DTYPES, library, why_not
    from tgi.layers.checkpoint import Checkpoint
    from tgi.models.weights import open_weights
    from tgi.parallel import Group
    from tgi.quantization.packed import Pack

    group = group or Group()
    reach = max_total_tokens or parsed.shape.max_position_embeddings
    native = library() if device.type == "cpu" and dtype in (getattr(torch, name) for name in DTYPES) else None
    if device.type == "cpu" and (reason := why_not()) is not None:
        log.warning("No native kernels, plain torch instead: %s", reason)
    if quantize is not None and native is None and device.type == "cpu":
        raise StartupError(f"`--quantize {quantize}`: on CPU only the native kernels multiply such weights")
    name = parsed.shape.architecture
    if isinstance(parsed, TailConfig):
        from tgi.models import hf

        served = hf.load(
            files,
            parsed,
            dtype,
            device,
            reach,
            library=native,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        served.description = f"{name} has no row in tgi.models.registry: {served.description}"
        log.info("%s", served.description)
        return served
    row = ARCHITECTURES[name]
    model_class = getattr(importlib.import_module(row.module), row.name)
    with torch.inference_mode(), open_weights(files, parsed, progress) as tensors:
        sources = [Path(path) for path in (*files.weights, *files.adapter)]
        pack = Pack.open(packed if native else None, sources, dtype, quantize, parsed.scheme, group.rank, group.size)
        rounds = parsed.scheme is not None and parsed.scheme.rounds
        checkpoint = Checkpoint(tensors, dtype, device, group, native, quantize, pack, tensors.orders, rounds, fixed)
        model: Model = model_class(parsed, checkpoint, reach)
        tensors.finish()
    pack.save()
    model.description = f"{row.module}, by the row of {name} in tgi.models.registry ({row.description})"
    log.info("%s", model.description)
    return model


def document() -> str:
    """docs/models.md."""
    rows = [
        f"| `{name}` | {row.description} | [{row.module.rpartition('.')[2]}](../{row.module.replace('.', '/')}.py) |"
        for name, row in sorted(ARCHITECTURES.items())
    ]
    return "\n".join(
        [
            "# Models",
            "",
            "Made by `python -m tgi.models.registry > docs/models.md`; a test checks that it is up to date.",
            "",
            "`architectures` of a model's config.json decides. Each is tested against transformers on random weights:",
            "all at once, in chunks through the cache, in a batch with others, preempted. A value of the config that",
            "changes what is computed and isn't implemented stops the start with its name.",
            "",
            "An architecture without a row is served by transformers' own module of it (the *tail*), if transformers",
            "knows it as a causal language model, or by the Python files of its repository with `--trust-remote-code`.",
            "Linear layers that its tensor-parallel plan names are ours, with `--quantize` too; the others, experts",
            "among them, stay as they are. Its attention is ours if it asks transformers' registry for it and, tried",
            "at load on short sequences, makes the same logits with it; otherwise each request has a cache of",
            "transformers' own and runs by itself, slower. The log says which. Refused by name: state-space models,",
            "encoder-decoders, models of several parts (images, sound), and quantized checkpoints.",
            "",
            "| Architecture | Models | Implementation |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(document(), end="")
