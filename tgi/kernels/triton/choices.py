"""How requests' wishes lie in memory, for the kernels that draw tokens. Imports no Triton."""

from typing import NamedTuple

import numpy as np
import torch

GREEDY, FREE, LIMITED = 0, 1, 2
"""The likeliest token; one drawn of all; one drawn of those that top-k, top-p, typical-p and min-p leave."""

CHOICE = np.dtype(
    [
        ("seed", "<u4"),  # its lower half
        ("seed_above", "<u4"),
        ("position", "<i4"),  # tokens before the one to draw
        ("way", "<i4"),  # GREEDY, FREE or LIMITED
        ("copy", "<i4"),  # place of the row among those that are changed; -1: it isn't
        ("green", "<i4"),  # place of its green list in Changes.bits; -1: there is none
        ("mask", "<i4"),  # likewise of what may come
        ("delta", "<f4"),  # bonus of green tokens
        ("repetition", "<f4"),
        ("frequency", "<f4"),
        ("presence", "<f4"),
        ("temperature", "<f4"),  # 1 for GREEDY; neither 0 nor infinite
        ("top_k", "<i4"),
        ("top_p", "<f4"),
        ("typical_p", "<f4"),
        ("min_p", "<f4"),
    ]
)
"""One row's wishes, in 32-bit words; neutral values are Sampling's."""

ENTRIES = 128
"""Tokens that one program changes: in Changes each row has a multiple of so many, with ids of -1 at the end."""


class Changes(NamedTuple):
    """What is done to rows before they are drawn from."""

    rows: torch.Tensor
    """int32: those that are changed."""
    bits: torch.Tensor
    """uint8: green lists and masks; bit t % 8 of byte t // 8 is token t's."""
    owners: torch.Tensor
    """int32: the row of each ENTRIES of what follows."""
    ids: torch.Tensor
    """int32: no token twice for a row."""
    counts: torch.Tensor
    """float32: how often the request generated the token; -1 if it doesn't hold it, in its prompt either."""
    bias: torch.Tensor
    """float32: added behind the penalties."""
