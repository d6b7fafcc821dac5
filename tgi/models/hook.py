"""Our attention in transformers' registry: what each layer asks is learnt from one forward, then every call of it is
an ``Attend``. Knows no model by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from tgi.attention.base import Attend, AttnSpec, Turn
from tgi.layers import attention

NAME = "tgi"

_PLAIN = frozenset(
    """scaling softcap sliding_window dropout is_causal position_ids use_cache output_attentions output_hidden_states
    output_router_logits return_dict s_aux""".split()
)
"""What attention may be asked: understood, said by the mask too, or of no meaning here."""


class Declines(Exception):
    """Why a model can't be served by our attention."""


class Hook:
    """One model's layers of attention, in the order in which they first attend."""

    def __init__(self, reach: int) -> None:
        """``reach``: the longest request."""
        self.specs: list[AttnSpec] = []
        self._turns: list[attention.Turn] = []
        self._reach = reach
        self._compute = torch.float32
        self._layers: dict[nn.Module, int] = {}
        self._windows: list[tuple[torch.Tensor, int | None]] = []
        """Masks of the forward that is learnt from."""
        self._learns = True
        self._attend: Attend | None = None

    @contextmanager
    def attending(self, attend: Attend, compute: torch.dtype) -> Iterator[None]:
        """Serve the attention of the model's forward in this context. ``compute``: what ``attend`` is given."""
        global _hook
        assert _hook is None
        _hook, self._attend, self._compute = self, attend, compute
        try:
            yield
        finally:
            _hook, self._attend = None, None

    def learnt(self) -> None:
        """The first forward is over. Raises Declines if nothing attended."""
        if not self.specs:
            raise Declines("its attention doesn't ask transformers' registry")
        self._learns = False
        self._windows.clear()

    def mask(self, asked: Mapping[str, Any]) -> torch.Tensor | None:
        """None once it is known: attention needs no tensor for it."""
        if not self._learns:
            return None
        if asked.get("use_vmap"):
            raise Declines("its mask is a function of its own")
        mask = torch.empty(1, 1, 1, 1)  # to be known again, not to be read
        self._windows.append((mask, _window(asked["mask_function"], self._reach)))
        return mask

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """[1, heads, tokens, dim]; k, v: the kv heads likewise → [1, tokens, heads, dim of v]."""
        assert self._attend is not None
        if self._learns:
            self._learn(module, q, k, v, mask, options)
        layer = self._layers[module]
        turn, (dim, wide) = replace(self._turns[layer], sinks=options.get("s_aux")), (q.shape[-1], v.shape[-1])
        if wide < dim:
            v = pad(v, (0, dim - wide))
        packed = torch.cat([heads[0].transpose(0, 1) for heads in (q, k, v)], 1)
        out = self._attend(layer, packed.flatten(1).to(self._compute), turn)
        return out.view(1, len(out), -1, dim)[..., :wide].to(q.dtype)

    def _learn(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        if module in self._layers:
            raise Declines("a layer attends twice in one forward")
        if unknown := sorted(key for key, value in options.items() if value is not None and key not in _PLAIN):
            raise Declines(f"its attention takes {unknown[0]}")
        if options.get("is_causal") is False:
            raise Declines("its attention looks ahead")
        known = [window for made, window in self._windows if made is mask]
        if not known:
            raise Declines("it masks by itself")
        (_, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
        if k.shape != (1, kv_heads, tokens, dim) or v.shape[:3] != k.shape[:3] or v.shape[3] > dim or heads % kv_heads:
            raise Declines(f"its heads have the shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        scale = options.get("scaling")
        self._layers[module] = len(self.specs)
        self._turns.append(attention.Turn(heads, kv_heads, None, None))
        self.specs.append(
            AttnSpec(
                heads,
                kv_heads,
                dim,
                dim**-0.5 if scale is None else scale,
                known[0],
                options.get("softcap"),
                sinks=options.get("s_aux") is not None,
            )
        )


_hook: Hook | None = None
"""Whose forward runs."""


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    assert _hook is not None
    return _hook.attend(module, query, key, value, attention_mask, options), None


def _mask(**asked: Any) -> torch.Tensor | None:
    assert _hook is not None
    return _hook.mask(asked)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _window(sees: Callable[..., torch.Tensor], reach: int) -> int | None:
    """What AttnSpec calls the window of a mask: whether the query at a position sees a key is asked at the last
    position, and where a window of that size begins or another pattern would show."""

    def seen(query: int) -> torch.Tensor:
        keys = torch.arange(reach)
        return sees(torch.tensor(0), torch.tensor(0), torch.tensor(query), keys).expand(reach)

    size = int(seen(reach - 1).sum())
    for query in {0, 1, size - 1, size, size + 1, reach // 3, reach // 2, reach - 1} & set(range(reach)):
        keys = torch.arange(reach)
        if not torch.equal(seen(query), (keys <= query) & (keys > query - size)):
            raise Declines("its mask is neither causal nor a window")
    return None if size == reach else size


class Trial:
    """The definition of attention, over all keys and values of each sequence: slow, and needs no cache."""

    def __init__(self, specs: Sequence[AttnSpec]) -> None:
        """``specs`` may grow while they are learnt."""
        self._specs = specs
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.chunks: Sequence[tuple[int, int]] = ()
        """(sequence, tokens) in the order of the token axis."""

    def __call__(self, layer: int, qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
        spec = self._specs[layer]
        outs, at = [], 0
        for sequence, count in self.chunks:
            q, k, v = (heads[at : at + count] for heads in turn(qkv))
            at += count
            if (before := self._kept.get((layer, sequence))) is not None:
                k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
            self._kept[layer, sequence] = k, v
            key = torch.arange(len(k), device=q.device)
            query = key[-count:, None]
            hidden = (key > query) | (key <= query - (spec.window or len(k)))
            scores = torch.einsum("qgsd,kgd->gsqk", q.view(count, spec.kv_heads, -1, spec.head_dim), k) * spec.scale
            if spec.softcap is not None:
                scores = (scores / spec.softcap).tanh() * spec.softcap
            scores = scores.masked_fill(hidden, float("-inf"))
            if turn.sinks is not None:
                sinks = turn.sinks.to(scores).view(spec.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
                scores = torch.cat((scores, sinks), -1)
            weights = scores.softmax(-1)[..., : len(k)]
            outs.append(torch.einsum("gsqk,kgd->qgsd", weights, v).flatten(1))
        return torch.cat(outs)
