"""A PEFT adapter's adapter_config.json, read strictly, and the names of its tensors. No torch."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tgi.core.errors import StartupError
from tgi.core.model_config import flag, number

_NEUTRAL = frozenset(
    """auto_mapping base_model_name_or_path revision bias corda_config eva_config exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config
    megatron_core modules_to_save parent_library peft_type peft_version qalora_group_size rank_pattern
    target_modules task_type ensure_weight_tying merge_weights r lora_alpha alpha_pattern use_rslora
    init_lora_weights""".split()
)
"""Keys that are read here, that say how the adapter was trained, or that the tensors and their names say as well."""

_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that begin beside the base's weights; others begin by changing these."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank changes of a base model (LoRA; Hu et al., arXiv 2106.09685)."""

    base: str
    """Model id of what it changes."""
    revision: str | None
    """Of the base, where that is on the hub."""
    alpha: float
    alphas: Mapping[str, float]
    """By pattern of a module's name, where it is another."""
    by_root: bool
    """Whether alpha is divided by the rank's square root instead of the rank (Kalajdzievski, arXiv 2312.03732)."""

    def scale(self, module: str, rank: int) -> float:
        """What B · A is multiplied by."""
        own = (value for pattern, value in self.alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(own, self.alpha) / (math.sqrt(rank) if self.by_root else rank)


def read_adapter(path: Path) -> Adapter:
    """The adapter_config.json at ``path``; StartupError names the key at fault."""
    try:
        return _read(json.loads(path.read_bytes()))
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path}: {error}") from None
    except StartupError as error:
        raise StartupError(str(error).replace("config.json", str(path), 1)) from None


def _read(raw: Any) -> Adapter:
    if not isinstance(raw, dict):
        raise ValueError("expected a JSON object")
    if (kind := raw.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type: {kind!r} is not implemented; known: LORA")
    if (start := raw.get("init_lora_weights")) not in _KEEPS_BASE:
        raise ValueError(f"init_lora_weights: {start!r} changes the base's weights, which is not implemented")
    for key in sorted(raw.keys() - _NEUTRAL):
        if raw[key]:
            raise ValueError(f"{key}: {raw[key]!r} is not implemented")
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(f"base_model_name_or_path: expected a model id, got {base!r}")
    if not isinstance(revision, str | None):
        raise ValueError(f"revision: expected a name, got {revision!r}")
    alphas = raw.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise ValueError(f"alpha_pattern: expected an object, got {alphas!r}")
    for pattern, alpha in alphas.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"alpha_pattern: {pattern!r}: {error}") from None
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"alpha_pattern: {pattern}: expected a number, got {alpha!r}")
    return Adapter(base, revision, number(raw, "lora_alpha", 8.0), alphas, flag(raw, "use_rslora", False))


Part = Literal["whole", "A", "B", "embedding_A", "embedding_B"]


def place(name: str) -> tuple[str, Part]:
    """The base's tensor that an adapter's tensor is meant for, and what it is to it. ValueError for an unknown name."""
    if not name.startswith("base_model.model."):
        raise ValueError(f"tensor {name} does not begin with base_model.model")
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    match re.fullmatch(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(\.weight)?", name):
        case None if ".lora_" not in name:
            return name, "whole"
        case re.Match() as found:
            part: Any = found[2]
            return f"{found[1]}.weight", part
    raise ValueError(f"tensor {name} is not implemented")
