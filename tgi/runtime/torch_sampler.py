"""The next token of every row, by torch, where there are no kernels. It defines what those must do.

All rows run together: watermark, penalties, mask, warpers, draw; each costs the rows that use it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tgi.core.messages import Sampling
from tgi.core.plan import Masks, Work
from tgi.core.watermark import green
from tgi.runtime.drawn import Drawn, on_device, tops

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""SplitMix64's constants."""
_CANDIDATES = 1024
"""Top-p looks at this many of the most likely tokens before it sorts the whole vocabulary."""
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""Extreme settings stop here: infinities and divisions by zero would make a row's numbers no numbers."""
_BUCKET = 256
"""The draw first chooses a bucket of this many tokens, then the token in it."""
_OF_BYTES = torch.where((torch.arange(256)[:, None] >> torch.arange(8) & 1).bool(), 0.0, float("-inf"))
"""What the eight bits of each byte of a mask add to eight logits: [256, 8]."""


def draw(logits: torch.Tensor, works: Sequence[Work], masks: Masks | None = None) -> Drawn:
    """One token for each row, of which there is at least one. logits: float32 [rows, vocabulary]; works: one a row;
    masks: of those that have one."""
    samplings = [work.submit.sampling for work in works]
    raw = logits
    norms = raw.logsumexp(-1)
    changed = [(row, work) for row, work in enumerate(works) if _changes(work)]
    if changed:
        logits = logits.clone()
        for row, work in changed:
            _change(logits[row], work)
    if masks is not None:
        logits = _mask(logits, masks)
    ids = logits.argmax(-1)
    if drawn := [row for row, s in enumerate(samplings) if not s.greedy]:
        rows = on_device(drawn, logits.device)
        warped = _warp(logits[rows], [samplings[row] for row in drawn])
        keys = [_key(samplings[row].seed, len(works[row].tokens)) for row in drawn]
        ids[rows] = _draw(warped, on_device(keys, logits.device))
    logprobs = raw.gather(1, ids[:, None]).squeeze(1) - norms
    said = torch.stack((torch.where(norms.isfinite(), ids, -1).int(), logprobs.view(torch.int32)))
    return Drawn(ids, said, tops(raw, norms, [s.top_n_tokens for s in samplings]))


def _key(seed: int, position: int) -> int:
    """The 64 bits, as a signed number, from which all that decides the token at ``position`` follows."""
    x = seed & _MASK
    for step in (0, position):
        x = (x + (step + 1) * _GOLDEN) & _MASK
        x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
        x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
        x ^= x >> 31
    return _signed(x)


def _signed(x: int) -> int:
    return x - (x >> 63 << 64)


def _exponential(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Draws of the unit exponential distribution, a pure function of (key, counter).

    SplitMix64 (Steele, Lea & Flood 2014) as a counter-based generator. keys: int64 [rows]; counters: int64, [n] or
    [rows, n]; returns float64 [rows, n].
    """
    x = keys[:, None] + counters * _signed(_GOLDEN)  # int64 wraps as unsigned numbers do
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return -(((x >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53).log()


def _changes(work: Work) -> bool:
    """Whether the request's wishes touch the logits before they are warped, greedy or not."""
    s = work.submit.sampling
    return s.watermark is not None or _penalizes(s) or _may_not_stop(work)


def _change(row: torch.Tensor, work: Work) -> None:
    """Change one row of logits in place."""
    sampling = work.submit.sampling
    if sampling.watermark is not None:
        gamma, delta = sampling.watermark
        row.add_(torch.from_numpy(green(work.tokens[-1], len(row), gamma)).to(row.device), alpha=delta)
    if _penalizes(sampling):
        _History.of(work, row.device).apply(row, sampling)
    if _may_not_stop(work):
        # A model's files can name end tokens that it doesn't have.
        row[[token for token in work.submit.stop_token_ids if 0 <= token < len(row)]] = float("-inf")


def _mask(logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    """New logits, of which the rows that have a mask keep what it allows."""
    device = logits.device
    # Bytes travel, and each is looked up as eight numbers: a tenth of the time of bools and masked_fill.
    bytes_ = torch.from_numpy(masks.bits).to(device, non_blocking=True)
    bias = torch.nn.functional.embedding(bytes_.int(), _OF_BYTES.to(device)).flatten(1)[:, : logits.shape[1]]
    return logits.index_add(0, on_device(masks.rows, device), bias)


def _may_not_stop(work: Work) -> bool:
    """Whether ``min_tokens`` still keeps the stop tokens away: a matter of the position alone. The mask of a grammar
    sees to it by itself: it may leave nothing but to stop."""
    submit, sampling = work.submit, work.submit.sampling
    if not submit.stop_token_ids or sampling.grammar:
        return False
    return len(work.tokens) - submit.prompt_length < sampling.min_tokens


def _penalizes(s: Sampling) -> bool:
    return s.remembers or bool(s.logit_bias)


class _History:
    """Which ids a request holds and how often it generated each, kept up to date token by token.

    Lives in the request's scratch; built from its ids whenever it isn't there.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._device = device
        self._seen = 0
        self._places: dict[int, int] = {}
        self._ids = torch.empty(0, dtype=torch.int64, device=device)
        self._counts = torch.empty(0, dtype=torch.float32, device=device)
        bias = work.submit.sampling.logit_bias
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    @classmethod
    def of(cls, work: Work, device: torch.device) -> "_History":
        history = work.scratch.get("history")
        if history is None:
            history = work.scratch["history"] = cls(work, device)
        assert isinstance(history, cls)
        history._catch_up(work)
        return history

    def apply(self, row: torch.Tensor, s: Sampling) -> None:
        """Change one row of logits in place.

        Repetition penalty (Keskar et al. 2019) over prompt and generated ids, once per distinct id; frequency and
        presence penalties by OpenAI's formula over generated ids; bias added as given.
        """
        ids = self._ids[: len(self._places)]
        counts = self._counts[: len(self._places)]
        values = row[ids]
        if s.repetition_penalty != 1.0:
            values = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
            values = values.clamp(-_LARGEST, _LARGEST)
        if s.frequency_penalty != 0.0 or s.presence_penalty != 0.0:
            values = values - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
        row[ids] = values
        if s.logit_bias:
            row[self._bias_ids] += self._bias

    def _catch_up(self, work: Work) -> None:
        places = self._places
        known = len(places)
        fresh = work.tokens[self._seen :]
        for token in fresh:
            places.setdefault(token, len(places))
        if len(places) > len(self._ids):
            room = max(256, 2 * len(places))
            self._ids = _grown(self._ids, room)
            self._counts = _grown(self._counts, room)
        if len(places) > known:
            new = list(places)[known:]
            self._ids[known : len(places)] = torch.tensor(new, device=self._device)
        if generated := work.tokens[max(self._seen, work.submit.prompt_length) :]:
            at = torch.tensor([places[token] for token in generated], device=self._device)
            self._counts.index_add_(0, at, torch.ones(len(generated), device=self._device))
        self._seen = len(work.tokens)


def _grown(tensor: torch.Tensor, size: int) -> torch.Tensor:
    grown = tensor.new_zeros(size)
    grown[: len(tensor)] = tensor
    return grown


@dataclass(frozen=True, slots=True)
class _Warper:
    """One field of Sampling that removes tokens: its neutral value and what it does to the rows that use it."""

    field: str
    neutral: float
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _warp(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Temperature, then the warpers in TGI's order, min-p last; removed tokens are -inf. logits: [rows, vocabulary]."""
    temperatures = on_device([s.temperature for s in samplings], logits.device).clamp(_SMALLEST, _LARGEST)
    # The largest becomes 0, so that no temperature, however small, makes infinities of two tokens.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    for warper in _WARPERS:
        values = [getattr(s, warper.field) for s in samplings]
        if users := [row for row, value in enumerate(values) if value != warper.neutral]:
            rows = on_device(users, logits.device)
            bounds = on_device([values[row] for row in users], logits.device)
            logits[rows] = warper.apply(logits[rows], bounds)
    return logits


def _top_k(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Keep the k largest of each row, and ties with the last. k: int64 [rows]."""
    k = k.clamp(max=logits.shape[1])
    best = logits.topk(int(k.max())).values
    return logits.masked_fill(logits < best.gather(1, k[:, None] - 1), float("-inf"))


def _top_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keep the most likely tokens until their mass reaches p. p: [rows]."""
    count = min(_CANDIDATES, logits.shape[1])
    norm = logits.logsumexp(-1, keepdim=True)
    while True:
        best = logits.topk(count).values
        probs = (best - norm).exp()
        mass = probs.cumsum(-1)
        if count == logits.shape[1] or bool((mass[:, -1] >= p).all()):
            break
        count = logits.shape[1]
    kept = (mass - probs < p[:, None]).sum(-1).clamp(min=1)
    return logits.masked_fill(logits < best.gather(1, kept[:, None] - 1), float("-inf"))


def _typical_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022): keep tokens of information closest to the entropy. p: [rows]."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(-1)
    mass = logprobs.gather(1, order).exp().cumsum(-1)
    # Up to and including the token whose mass reaches p.
    last = (mass < p[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return logits.masked_fill((-logprobs - entropy).abs() > distance.gather(1, last), float("-inf"))


def _min_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Remove tokens less likely than p times the likeliest (Nguyen et al. 2024). p: [rows]."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log()[:, None], float("-inf"))


_WARPERS = (
    _Warper("top_k", 0, _top_k),
    _Warper("top_p", 1.0, _top_p),
    _Warper("typical_p", 1.0, _typical_p),
    _Warper("min_p", 0.0, _min_p),
)


def _draw(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """One token per row by exponential races: argmax of p / E, first between buckets of tokens, then inside the winner.

    A race comes out otherwise only if its two best are closer than the rounding of the logits: batches round a little
    differently, and inverting the distribution function would let that shift the token at every boundary. Two races
    need a few hundred random numbers instead of one for each token. keys: int64 [rows].
    """
    rows, size = logits.shape
    probs = logits.softmax(-1)
    if padding := -size % _BUCKET:
        probs = torch.nn.functional.pad(probs, (0, padding))
    probs = probs.view(rows, -1, _BUCKET)
    buckets = torch.arange(probs.shape[1], device=logits.device)
    bucket = (probs.sum(-1) / _exponential(keys, -1 - buckets)).argmax(-1, keepdim=True)
    inside = probs.gather(1, bucket[:, :, None].expand(-1, -1, _BUCKET)).squeeze(1)
    tokens = bucket * _BUCKET + torch.arange(_BUCKET, device=logits.device)
    place = (inside / _exponential(keys, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, place).squeeze(1)
