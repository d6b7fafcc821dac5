"""Models with weights that mean nothing, for measurements: made on a device, or written as a checkpoint."""

import importlib
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tgi.kernels.library import library
from tgi.layers.checkpoint import Checkpoint
from tgi.models.config import DecoderConfig
from tgi.models.registry import ARCHITECTURES, Model, check
from tgi.parallel import Group


def drawn(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A synthetic tensor: vectors are norms; products with matrices keep their inputs' size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, shape[-1] ** -0.5)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tensors of any checkpoint."""

    device: torch.device

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return drawn(shape, self.device)

    def skip(self, name: str, shape: tuple[int, ...]) -> None: ...

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
        return drawn(shape, self.device)

    def factor(self, name: str) -> float | None:
        return None


def synthetic(config: dict[str, Any], quantize: str | None, device: torch.device) -> Model:
    parsed = check(config)
    assert isinstance(parsed, DecoderConfig)
    row = ARCHITECTURES[config["architectures"][0]]
    made = getattr(importlib.import_module(row.module), row.name)
    native = library() if device.type == "cpu" else None
    checkpoint = Checkpoint(Drawn(device), torch.bfloat16, device, Group(), native, quantize)
    with torch.inference_mode():
        model: Model = made(parsed, checkpoint, config["max_position_embeddings"])
    model.description = "synthetic"
    return model


def write_checkpoint(folder: Path, config: dict[str, Any], device: torch.device) -> Path:
    """A folder of a model with synthetic weights; as it is, if it is there already."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    write_tokenizer(folder, config["vocab_size"])
    hidden, vocab, dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (config["intermediate_size"], hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    names = deque(shapes)
    files = math.ceil(2 * sum(map(math.prod, shapes.values())) / 4e9)
    index: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        own = [names.popleft() for _ in range(math.ceil(len(names) / (files - number)))]
        save_file({f"{name}.weight": drawn(shapes[name], device) for name in own}, folder / file, {"format": "pt"})
        index |= {f"{name}.weight": file for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Of as many tokens: bytes, then pairs, triples and quadruples of letters. It costs what others do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(["<s>", "</s>", *alphabet])
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges: list[tuple[str, str]] = []
    longest: Sequence[str] = letters
    while len(tokens) < vocabulary:
        pairs = [(start, end) for start in longest for end in letters][: vocabulary - len(tokens)]
        merges += pairs
        longest = [start + end for start, end in pairs]
        tokens |= dict.fromkeys(longest)
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
