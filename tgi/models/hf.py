"""The tail: any causal language model of transformers, or of its own repository's code, that has no row of ours.

The module is transformers'. Its linear layers are ours where its tensor-parallel plan names them, and so is its
attention if that comes to the same result. Otherwise it keeps a cache of its own for each request.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tgi.attention.base import Attend, AttnSpec
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.kernels.library import Library
from tgi.layers.checkpoint import Checkpoint
from tgi.layers.linear import ColumnLinear, RowLinear
from tgi.models import hook
from tgi.models.config import TailConfig
from tgi.models.hook import Declines, Hook, Trial
from tgi.parallel import Group

_COLUMNS = {"colwise": 1, "colwise_rep": 1, "colwise_gather_output": 1, "packed_colwise": 2}
"""Strings of a tensor-parallel plan for layers whose outputs are split → blocks of outputs."""
_ROWS = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
"""Those for layers whose inputs are split."""
_MOVING = ("dynamic", "longrope")
"""Types of rotary embedding whose frequencies depend on the positions they are asked for."""
_SMALL = 1 / 32
"""Share of the weights that may be held in float32 though the memory was planned for less."""
_TRIAL = 12
"""Tokens of the sequences that a model is tried with."""


def load(
    files: ModelFiles,
    config: TailConfig,
    dtype: torch.dtype,
    device: torch.device,
    reach: int,
    *,
    library: Library | None,
    quantize: str | None,
    trust_remote_code: bool,
    progress: Callable[[int, int], None],
) -> "Paged | Caching":
    """``reach``: the longest request; the others as for a Checkpoint.

    Raises StartupError; before any weight is read if transformers doesn't know the model.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = f"config.json: architectures: {config.shape.architecture!r} (model_type {config.model_type!r})"
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) == config.shape.architecture
    if not known and not config.remote:
        version = transformers.__version__
        raise StartupError(f"{name} is not implemented, and no causal language model of transformers {version}")
    if not known and not trust_remote_code:
        raise StartupError(f"{name} is code of the model's repository, which runs with `--trust-remote-code` alone")
    if files.adapter:
        raise StartupError(f"{name}: no adapter can be merged into a model that only transformers knows")
    try:
        with torch.inference_mode():
            module = _read(files, dtype, trust_remote_code=not known).to(device)
            parameters = _Parameters(module, progress)
            _fix_rope(module, reach)
            sequences = torch.randint(config.shape.vocab, (2, _TRIAL), generator=torch.Generator()).to(device)
            with _float32(module):
                model = _choose(module, sequences, max(reach, _TRIAL))
            _check_width(model, config)
            checkpoint = Checkpoint(parameters, dtype, device, Group(), library, quantize)
            linears = _take_linears(module, checkpoint)
            model.description = f"{type(module).__name__} of transformers; {linears}; {model.description}"
            model.compute = checkpoint.compute
            model.run(sequences)  # what doesn't go with our layers fails now
            parameters.finish()
            return model
    except StartupError:
        raise
    except Exception as error:  # by code that isn't ours
        raise StartupError(f"{name}: transformers can't run it: {type(error).__name__}: {error}") from error


def _read(files: ModelFiles, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """The module with its weights, on CPU; every tensor must have found its place."""
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    folder = Path(files.weights[0]).parent
    module, told = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
    )
    for kind, what in (("missing_keys", "is missing"), ("unexpected_keys", "is not used by this architecture")):
        if keys := told[kind]:
            raise StartupError(f"{folder}: tensor {min(keys)} {what} ({len(keys)} in all)")
    return module


def _check_width(model: "Paged | Caching", config: TailConfig) -> None:
    """StartupError if the cache would take more memory than was planned by the config's sizes."""
    planned = config.shape.layers * config.shape.kv_heads * config.shape.head_dim
    if (width := sum(spec.kv_heads * spec.head_dim for spec in model.specs)) > planned:
        raise StartupError(
            f"{config.shape.architecture} keeps keys of {width} numbers per token, its config.json implies {planned}"
        )


def _fix_rope(module: PreTrainedModel, reach: int) -> None:
    """Types of rotary embedding that look at the positions of a batch choose by the longest request, once."""
    last = torch.full((1, 1), reach - 1, device=module.device)
    for rope in cast(Iterator[Any], module.modules()):
        kinds = getattr(rope, "rope_type", None)
        if kinds in _MOVING:
            rope(last.float(), last)
            rope.rope_type = "default"
        elif isinstance(kinds, dict):
            for layers in [layers for layers, kind in kinds.items() if kind in _MOVING]:
                rope(last.float(), last, layer_type=layers)
                kinds[layers] = "default"


class _Tail:
    """What both ways of serving share."""

    library = None
    """Its forward is more than our kernels and can't be recorded."""
    head = None

    def __init__(self, module: PreTrainedModel, vocab: int, description: str) -> None:
        self.vocab_size = vocab
        self.compute = torch.float32
        self.description = description
        """What serves the model."""
        self._module = module
        self._decoder = _decoder(module)
        self._outputs: type[Any] = tuple

    def _decode(self, token_ids: torch.Tensor, **options: Any) -> Any:
        """int64 [tokens] → what the decoder puts out, hidden states [1, tokens, hidden] first."""
        outputs = self._decoder(input_ids=token_ids[None], **options)
        self._outputs = type(outputs)
        return outputs

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → float32 [rows, vocab]: the module's own forward, its decoder's part of which is done."""
        done = (hidden[None],) if self._outputs is tuple else self._outputs(last_hidden_state=hidden[None])
        self._decoder.forward = lambda *_args, **_kwargs: done
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            scores: torch.Tensor = self._module(input_ids=ids, use_cache=False)[0][0]
        finally:
            del self._decoder.forward
        return scores.float()


def _decoder(module: PreTrainedModel) -> nn.Module:
    """The part that makes hidden states of tokens."""
    embedding = module.get_input_embeddings()
    for part in (module.get_decoder(), *module.children()):
        if part is not module and part is not embedding and any(inner is embedding for inner in part.modules()):
            return cast(nn.Module, part)
    raise StartupError(f"{type(module).__name__} has no decoder apart from its head")


class Paged(_Tail):
    """Attention is ours, and so is the cache."""

    static = False  # what transformers' module does beside its operations isn't known

    def __init__(self, module: PreTrainedModel, vocab: int, reach: int) -> None:
        super().__init__(module, vocab, "paged attention")
        self._hook = Hook(reach)
        self.specs = self._hook.specs
        if "position_ids" not in inspect.signature(self._decoder.forward).parameters:
            raise Declines("it takes no positions")

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """int64 [tokens], int64 [tokens] → [tokens, hidden]. The token axis is flat: all requests of a step."""
        with self._hook.attending(attend, self.compute):
            hidden: torch.Tensor = self._decode(token_ids, position_ids=positions[None], use_cache=False)[0][0]
        return hidden

    def run(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits of two sequences [2, tokens], computed as a server would: in chunks, side by side. Learns what
        attention is asked, the first time. Raises Declines."""
        length = sequences.shape[1]
        half = length // 2
        trial = Trial(self.specs)
        logits: list[list[torch.Tensor]] = [[], []]
        for step in ([(0, 0, half)], [(0, half, length), (1, 0, half)], [(1, half, length)]):
            trial.chunks = [(sequence, end - start) for sequence, start, end in step]
            ids = torch.cat([sequences[sequence, start:end] for sequence, start, end in step])
            positions = torch.cat([torch.arange(start, end, device=ids.device) for _, start, end in step])
            rows = self.logits(self.forward(ids, positions, trial))
            self._hook.learnt()
            for sequence, count in trial.chunks:
                logits[sequence].append(rows[:count])
                rows = rows[count:]
        return torch.stack([torch.cat(parts) for parts in logits])


@dataclass(frozen=True, slots=True)
class Kept:
    """A cache of transformers' own, and how many tokens of its request are in it."""

    cache: Any
    tokens: int


class Caching(_Tail):
    """Keys and values, or whatever else the module keeps of a request, are in a cache of transformers' own."""

    specs: Sequence[AttnSpec] = ()

    @torch.inference_mode()
    def advance(self, token_ids: torch.Tensor, start: int, kept: Kept | None) -> tuple[torch.Tensor, Kept | None]:
        """int64 [tokens], all of one request, and what was kept of it → [tokens - start, hidden] of those from
        ``start`` on, and what to keep. What was handed in is used up; if it isn't of ``start`` tokens, or None, all
        tokens are computed again."""
        if kept is None or kept.tokens != start:
            kept = Kept(None, 0)
        outputs = self._decode(token_ids[kept.tokens :], past_key_values=kept.cache, use_cache=True)
        cache = getattr(outputs, "past_key_values", None)
        hidden: torch.Tensor = outputs[0][0, start - kept.tokens :]
        return hidden, None if cache is None else Kept(cache, len(token_ids))

    def run(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits of two sequences [2, tokens], computed in steps of many tokens and of one."""
        length = sequences.shape[1]
        logits: list[list[torch.Tensor]] = []
        for sequence in sequences:
            kept, start = None, 0
            logits.append([])
            for end in (length // 2, length // 2 + 1, length):
                hidden, kept = self.advance(sequence[:end], start, kept)
                logits[-1].append(self.logits(hidden))
                start = end
        return torch.stack([torch.cat(parts) for parts in logits])


def _choose(module: PreTrainedModel, sequences: torch.Tensor, reach: int) -> Paged | Caching:
    """Our attention if it makes the logits that the module makes by itself of two ``sequences``, else its own cache."""
    expected = module(input_ids=sequences, use_cache=False)[0]
    vocab, own = expected.shape[-1], module.config._attn_implementation
    try:
        paged = Paged(module, vocab, reach)
        module.set_attn_implementation(hook.NAME)
        _compare(paged.run(sequences), expected)
        return paged
    except Exception as error:  # Declines, or what code that isn't ours raises
        reason = str(error) if isinstance(error, Declines) else f"{type(error).__name__}: {error}"
    module.set_attn_implementation(own)
    caching = Caching(module, vocab, f"a cache of its own for each request, since {reason}")
    try:
        _compare(caching.run(sequences), expected)
    except Declines as error:
        raise StartupError(f"{type(module).__name__} can't be computed part by part: {error}") from None
    return caching


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises Declines if logits differ by more than rounding."""
    difference = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not difference < 1e-2:
        raise Declines(f"its logits change by {difference:.0%}")


@contextmanager
def _float32(module: nn.Module) -> Iterator[None]:
    """Let ``module`` compute in float32 whatever its weights are, with one block of it at a time held so."""
    blocks = [block for blocks in module.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
    inner = {id(tensor) for block in blocks for tensor in _narrow(block)}
    kept: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(block: nn.Module, *_args: object) -> None:
        kept[block] = [
            (tensor, tensor.data) for tensor in _narrow(block) if block is not module or id(tensor) not in inner
        ]
        for tensor, data in kept[block]:
            tensor.data = data.float()

    def restore(block: nn.Module, *_args: object) -> None:
        for tensor, data in kept.pop(block, []):
            tensor.data = data

    hooks = [block.register_forward_pre_hook(widen) for block in blocks]
    hooks += [block.register_forward_hook(restore, always_call=True) for block in blocks]
    widen(module)
    try:
        yield
    finally:
        restore(module)
        for handle in hooks:
            handle.remove()


def _narrow(module: nn.Module) -> list[torch.Tensor]:
    """Its floating-point tensors of fewer than 32 bits."""
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.itemsize < 4]


class _Parameters:
    """A module's own parameters, as layers take them."""

    def __init__(self, module: nn.Module, progress: Callable[[int, int], None]) -> None:
        self._module = module
        self._progress = progress
        self._total = sum(tensor.nbytes for tensor in module.parameters())
        self._done = 0

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._module.get_parameter(name)
        assert tensor.shape == shape
        self._done += tensor.nbytes
        self._progress(self._done, self._total)
        return tensor

    def finish(self) -> None:
        """What no layer takes stays in the module."""
        self._progress(self._total, self._total)

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        raise AssertionError("a module's parameters are in no pack")

    def rows(self, name: str, shape: tuple[int, ...], *, stored: bool, transposed: bool = False) -> torch.Tensor:
        matrix = self.take(name, shape)
        return matrix.T if transposed else matrix

    def factor(self, name: str) -> float | None:
        raise AssertionError("a module's attention asks for its own tensors")


class _Linear(nn.Module):
    """A layer of ours in the place of one of torch's."""

    def __init__(self, layer: ColumnLinear | RowLinear, compute: torch.dtype, shape: tuple[int, int]) -> None:
        super().__init__()
        self._layer = layer
        self._compute = compute
        self.weight = torch.empty(shape, dtype=compute, device="meta")
        """For who asks its dtype or shape; nothing can be computed with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self._compute).contiguous()
        return self._layer(rows).to(x.dtype).contiguous().view(*x.shape[:-1], -1)


def _take_linears(module: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """Make those linear layers ours that the tensor-parallel plan names. Returns what became of them, in words."""
    plan = module.tp_plan or {}
    count = sum(tensor.numel() for tensor in module.parameters())
    head = module.get_output_embeddings()
    ours = others = 0
    for name, linear in [*module.named_modules()]:
        if type(linear) is not nn.Linear:
            continue
        style = plan.get(re.sub(r"\b\d+\b", "*", name))
        outs, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
        wanted = checkpoint.vocabulary if linear is head else checkpoint
        layer: ColumnLinear | RowLinear
        if style in _COLUMNS:
            blocks = _COLUMNS[style]
            layer = ColumnLinear.load(wanted, {name: (outs // blocks,) * blocks}, columns, bias=bias)
        elif style in _ROWS:
            layer = RowLinear.load(wanted, name, outs, columns, bias=bias)
        else:
            others += 1
            continue
        module.set_submodule(name, _Linear(layer, checkpoint.compute, (outs, columns)))
        ours += linear is not head
    if checkpoint.quantize is not None and not ours:
        raise StartupError(
            f"`--quantize {checkpoint.quantize}`: {type(module).__name__} has no tensor-parallel plan that names its "
            "linear layers"
        )
    _widen(module, checkpoint, count)
    return f"{ours} of {ours + others} linear layers are ours"


def _widen(module: PreTrainedModel, checkpoint: Checkpoint, count: int) -> None:
    """Let activations be what our layers compute, if what is left of ``count`` parameters is small enough for it."""
    embedding = module.get_input_embeddings()
    rest = [tensor for tensor in _narrow(module) if tensor is not embedding.weight]
    if checkpoint.compute != torch.float32 or sum(tensor.numel() for tensor in rest) > _SMALL * count:
        return
    for tensor in rest:
        tensor.data = tensor.data.float()
    embedding.register_forward_hook(lambda _module, _args, rows: rows.float())
