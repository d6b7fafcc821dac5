"""Where the scales of a product's inputs can go: into the norm or the matrix that makes these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tgi.models.config import DecoderConfig, DenseConfig, GptConfig
from tgi.quantizer.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class NormFold:
    """All that takes what a norm makes."""

    norm: str
    offset: float
    """What the checkpoint leaves away from the norm's weights."""
    takers: tuple[Site, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ProductFold:
    """A product whose inputs are outputs of another, perhaps times something else."""

    source: Site
    outputs: torch.Tensor
    """Of ``source``, for each input."""
    takers: tuple[Site, ...]


Fold = NormFold | ProductFold


def layer_name(config: DecoderConfig, layer: int) -> str:
    """Of the module."""
    return config.names.layer.format(layer, layer + 1) if isinstance(config, GptConfig) else f"model.layers.{layer}"


def folds(config: DecoderConfig, layer: int, sites: Sequence[Site]) -> Mapping[Site, Fold]:
    """Of the ``sites`` of a layer, in the model's order, those whose inputs can be scaled."""
    name = layer_name(config, layer)
    if isinstance(config, DenseConfig):
        attention, o, up = "self_attn", "o_proj", "mlp.up_proj"
        attention_norm, mlp_norm, offset = config.norms.before_attention, config.norms.before_mlp, config.norm_offset
    else:
        assert isinstance(config, GptConfig)
        names = config.names
        attention, o, up = names.attention, names.o, names.up
        attention_norm, mlp_norm, offset = names.norm, names.mlp_norm, config.norm_offset
        if not config.two_norms:
            mlp_norm = names.norm
        if config.norms_behind or not config.norm_weight:
            attention_norm = mlp_norm = ""
    found: dict[Site, Fold] = {}
    into: dict[str, list[Site]] = {}
    before = None
    for site in sites:
        if site.name == f"{name}.{attention}.{o}":
            if before is not None and config.clip_qkv is None and not config.shape.latent:
                found[site] = ProductFold(before, _values(config), (site,))
        elif before is not None and before.gated:
            found[site] = ProductFold(before, site.inner + torch.arange(site.inner), (site,))
        elif before is not None and before.name == f"{name}.{up}":
            if config.activation == "relu":
                found[site] = ProductFold(before, torch.arange(site.inner), (site,))
        elif site.name != f"{name}.{attention}.q_b_proj":  # of latent attention, behind a norm of its own
            norm = attention_norm if site.name.startswith(f"{name}.{attention}.") else mlp_norm
            if norm:
                into.setdefault(norm, []).append(site)
        before = site
    for norm, takers in into.items():
        fold = NormFold(f"{name}.{norm}", offset, tuple(takers))
        found |= dict.fromkeys(takers, fold)
    return found


def _values(config: DecoderConfig) -> torch.Tensor:
    """For each input of attention's last product, the output of its first that holds the value."""
    shape = config.shape
    head, dim = torch.arange(shape.heads)[:, None], torch.arange(shape.head_dim)
    kv_head = head // (shape.heads // shape.kv_heads)
    return ((shape.heads + shape.kv_heads + kv_head) * shape.head_dim + dim).flatten()
