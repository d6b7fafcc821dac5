"""Draws up the memory ledger before anything is loaded, and derives from it every limit that the operator left open.

Knows the model's sizes and the machine's memory; loads nothing and imports no torch.
"""

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi.core.config import BLOCK_SIZE, GATHERED_TOKENS, SCORED_ROWS, KVPool, Limits, ModelFiles
from tgi.core.errors import StartupError
from tgi.core.headers import Header, read_headers, read_model
from tgi.core.model_config import Experts, ModelShape
from tgi.core.numbers import PLAIN
from tgi.kernels.library import DTYPES
from tgi.kernels.triton import CAPABILITY
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.flags import Options, check
from tgi.launcher.machine import Machine
from tgi.launcher.progress import size
from tgi.launcher.sharding import check_master, choose_ranks, fullest
from tgi.models.config import DecoderConfig, TailConfig
from tgi.models.registry import check as read_family
from tgi.quantization.formats.base import Held, Scheme

log = logging.getLogger(__name__)

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number."""

_QUANTIZED = {
    "int8": 1.125,
    "int4": 0.625,
    **dict.fromkeys(("fp8", "bitsandbytes"), 1.03),
    **dict.fromkeys(("bitsandbytes-nf4", "bitsandbytes-fp4"), 0.75),
}
"""What weights can be rounded to at load: bytes of one number with its share of a scale, in the smallest groups."""
_HEADS = {"int8": 1.125, "int4": 1.125}
"""The same of the vocabulary's matrices, which the others leave alone."""
_GGUF = {
    **dict.fromkeys(("Q4_0", "Q4_1"), 0.625),
    "Q4_K": 0.75,
    **dict.fromkeys(("Q8_0", "Q5_0", "Q5_1"), 1.125),
    **dict.fromkeys(("Q5_K", "Q6_K"), 1.25),
}
"""The same for ggml's types; the others are dequantized."""

PREFILL = {"gpu": 4096, "cpu": 512}
"""Default tokens of a step: a GPU needs many to be busy; a CPU is busy with few, and longer steps delay decodes."""

_PROGRAMS = 512 << 20
"""Bytes of engine, router and launcher beside everything that is counted."""
_SLACK = {"gpu": 0.05, "cpu": 0.02}
"""Share of the memory left alone: allocators round up and fragment."""
_CPU_CACHE_SHARE = 0.5
"""Share of what is left that the KV cache takes on CPU by itself: the machine has other programs, and every page of the
cache is used in the long run."""
_SLOWEST = {"gpu": 1e12, "cpu": 2e9}
"""Operations a second that every machine reaches that is worth serving on: a hundredth of a usual one's."""
_GRACE = 60.0
"""Seconds for all that a step does besides: a disk that wakes up, a neighbour that takes the processors."""
_GRAPH = 16 << 20
"""Bytes of a captured graph, beside the memory that all graphs share."""
_FLASHINFER = 136 << 20
"""Bytes that FlashInfer works in, for each kind of layer."""
_FIXED = 8
"""Parts of each context with `--deterministic`: kernels/triton/attention.py's, which imports Triton."""
_PARTS = 4096
"""Programs, at most, into which attention is split for so few requests that the device wouldn't be full otherwise."""
_SAMPLING_BYTES = 40
"""Bytes per logit at the worst: scores, penalized and warped copies, a sort with its indices."""


def choose_dtype(dtype: str, machine: Machine, raw: Mapping[str, Any]) -> str:
    """Resolve ``auto``: bfloat16; float16 on a GPU if the checkpoint is; float32 on a CPU without our kernels."""
    if dtype != "auto":
        return dtype
    if machine.device == "cpu":
        return "bfloat16" if machine.native else "float32"
    return "float16" if raw.get("dtype", raw.get("torch_dtype")) == "float16" else "bfloat16"


def choose_quantize(options: Options, files: ModelFiles, scheme: Scheme | None, machine: Machine) -> str | None:
    """As in Settings. What is quantized stays so; a GGUF file unless another number format is asked for."""
    names = () if scheme is None else scheme.names
    if options.quantize == "eetq" and scheme is None:
        # What EETQ makes of weights as they are loaded: int8.
        options = dataclasses.replace(options, quantize="int8")
    if options.quantize not in (None, *_QUANTIZED, *names):
        found = "not quantized" if scheme is None else f"quantized by {scheme.method}"
        raise ArgumentValidation(f"`--quantize {options.quantize}`: the weights of {files.model_id} are {found}")
    multiplied = machine.triton or (machine.native and options.dtype != "float16")
    if scheme is not None and options.quantize in (None, *names):
        return "stored" if multiplied else None
    if options.quantize is None:
        gguf = files.weights[0].endswith(".gguf")
        return "stored" if gguf and multiplied and options.dtype == "auto" else None
    if not machine.native and not machine.triton:
        raise ArgumentValidation(
            f"`--quantize {options.quantize}` needs the native kernels, which run on CPU, or Triton with a C compiler "
            f"and a GPU of compute capability {CAPABILITY}"
        )
    if not multiplied:
        raise ArgumentValidation(f"`--quantize {options.quantize}` goes with `--dtype` bfloat16 or float32")
    return options.quantize


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine may do and hold."""

    ranks: int
    """Processes that hold the model together. Bytes are of the one that has most."""
    limits: Limits
    pools: list[KVPool]
    dtype: str
    quantize: str | None
    graphs: list[int]
    """Numbers of requests for which decode steps are captured."""
    memory: int
    """Bytes the engine may use in all."""
    longest_step: float
    """Seconds; see Settings."""
    ledger: dict[str, int]
    """Name → bytes, in the order they are taken."""

    def table(self) -> str:
        rows = [(name, size(count)) for name, count in self.ledger.items()]
        wide, right = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"  {name:<{wide}}  {count:>{right}}" for name, count in rows)


def choose_graphs(options: Options, machine: Machine, batch_size: int, *, tail: bool) -> list[int]:
    """Numbers of requests for which decode steps are captured, in their order: as asked, or in steps by which no batch
    grows by more than a third."""
    asked = options.cuda_graphs
    sizes = sorted({size for size in asked or () if 0 < size <= batch_size})
    able = machine.device == "cuda" and machine.triton and not tail and options.attention != "flashinfer"
    if asked is None and able:
        sizes = [1, 2]
        while sizes[-1] < batch_size:
            step = 1 << max((sizes[-1] // 3).bit_length() - 1, 1)
            sizes.append(min(sizes[-1] + step, batch_size))
        return [size for size in sizes if size <= batch_size]
    if sizes and not able and machine.device != "cpu":
        raise ArgumentValidation(
            "`--cuda-graphs` needs a model that has a row here, Triton, and attention by our own kernels"
        )
    # On a CPU a step of any size is one recorded program.
    return sizes if able else []


def _check_attention(options: Options, machine: Machine) -> None:
    if options.attention == "flashinfer" and machine.device != "cuda":
        raise ArgumentValidation(f"`--attention flashinfer` runs on NVIDIA's GPUs, not on {machine.name}")


def _check_deterministic(options: Options, machine: Machine, *, native: bool, tail: bool) -> None:
    if not options.deterministic or (not tail and (native or machine.triton) and options.attention != "flashinfer"):
        return
    raise ArgumentValidation(
        "`--deterministic` needs our own kernels for all that a model does: a model that has a row here, on a CPU in "
        "float32 or bfloat16, or on a GPU with Triton and without `--attention flashinfer`"
    )


def fit(options: Options, files: ModelFiles, machine: Machine) -> Plan:
    """The plan for this model on this machine. ArgumentValidation names the flag to change if it doesn't fit."""
    raw = read_model(files)
    config = read_family(
        raw,
        rope_scaling=options.rope_scaling,
        rope_factor=options.rope_factor,
        trust_remote_code=options.trust_remote_code,
    )
    headers = read_headers(files)
    if isinstance(config, DecoderConfig):
        headers = config.used(headers)
    held = {} if config.scheme is None else config.scheme.held(headers)
    if isinstance(config, DecoderConfig) and not files.weights[0].endswith(".gguf"):
        _check_kinds(headers, held, config.scheme)
    shape = config.shape
    ranks = choose_ranks(options, len(machine.gpus) if machine.kind == "gpu" else None)
    machine = machine.part(ranks)
    tail = isinstance(config, TailConfig)
    if tail and ranks > 1:
        raise ArgumentValidation(f"`--num-shard {ranks}`: {shape.architecture} has no row here, and runs on one device")
    share = fullest(shape, config.experts, config.qk_norm, ranks)
    dtype = choose_dtype(options.dtype, machine, raw)
    quantize = choose_quantize(options, files, config.scheme, machine)
    batch_size = options.max_batch_size or options.max_concurrent_requests
    prefill = options.max_batch_prefill_tokens or min(PREFILL[machine.kind], shape.max_position_embeddings)
    budget = _budget(machine, options.cuda_memory_fraction)
    slack = _SLACK[machine.kind] if options.tgi_wiggle_room is None else 1 - options.tgi_wiggle_room
    native = machine.native and dtype in DTYPES
    if options.kv_cache_dtype == "int8" and not native:
        raise ArgumentValidation("`--kv-cache-dtype int8` needs the native kernels, which run on CPU")
    # In bytes our own kernels have a scale for each token and head.
    cached = WIDTH[dtype] if options.kv_cache_dtype is None else 1 + 4 / shape.head_dim * native
    if ranks > 1 and not native:
        check_master(options)
    graphs = choose_graphs(options, machine, batch_size, tail=tail)
    _check_attention(options, machine)
    _check_deterministic(options, machine, native=native, tail=tail)
    # What has no row is read by transformers before it is rounded, and its embedding stays beside a packed head.
    rounded = None if tail else quantize
    compute = WIDTH["float32" if native else dtype]
    whole = _Bill(shape, config.experts, config.scheme, WIDTH[dtype], compute, cached, native)
    bill = dataclasses.replace(whole, shape=share.shape, experts=share.experts)
    weights = whole.weights(headers, held, rounded, copies=tail or (machine.device == "cpu" and not native))
    rows = min(SCORED_ROWS if machine.device == "cpu" else max(batch_size, SCORED_ROWS), prefill)
    attention = bill.gathered(GATHERED_TOKENS)
    if machine.triton:
        attention = bill.parts(batch_size * (_FIXED if options.deterministic else 1))
    if options.attention == "flashinfer":
        attention += _FLASHINFER * len({*config.windows})
    ledger = {
        "weights": int(weights * share.weights) + share.copied * WIDTH[dtype],
        f"activations of {prefill} tokens": bill.activations(prefill),
        f"logits of {rows} rows": rows * shape.vocab * _SAMPLING_BYTES,
        "attention": attention,
        **({f"graphs of {len(graphs)} sizes": bill.activations(graphs[-1]) + len(graphs) * _GRAPH} if graphs else {}),
        "programs": _PROGRAMS,
        "slack": int(slack * budget),
    }

    # A request of n tokens needs room in the cache and in attention's buffers.
    # While a GPU computes a step, the next one's blocks are held, too.
    cache = _Cache.of(config.windows, bill, batch_size, prefill if machine.device == "cpu" else 2 * prefill)
    context = 0 if machine.triton else bill.context(prefill)
    longest = cache.tokens(budget - sum(ledger.values()), context)
    if longest <= 0:
        raise ArgumentValidation(
            f"{files.model_id} doesn't fit: {_sum(ledger)} make {size(sum(ledger.values()))}, but {machine.name} has "
            f"{size(budget)} for it within `--cuda-memory-fraction` {options.cuda_memory_fraction:g}. Choose a smaller "
            "model, or lower `--max-batch-prefill-tokens` or `--max-batch-size`."
        )
    total = _total_tokens(options, files, shape, longest)
    ledger["attention"] += total * context
    room = cache.tokens(budget - sum(ledger.values()))
    capacity = _cache_tokens(options, total, room, machine.device)
    ledger[f"KV cache of {capacity} tokens"] = cache.bytes(capacity)

    inputs = total - 1 if options.max_input_tokens is None else options.max_input_tokens
    if options.max_batch_prefill_tokens is None:
        prefill = min(prefill, capacity)
    check(
        dataclasses.replace(
            options,
            max_input_tokens=inputs,
            max_total_tokens=total,
            max_batch_prefill_tokens=prefill,
            max_batch_total_tokens=capacity,
        )
    )
    limits = Limits(
        max_concurrent_requests=options.max_concurrent_requests,
        max_best_of=options.max_best_of,
        max_stop_sequences=options.max_stop_sequences,
        max_top_n_tokens=options.max_top_n_tokens,
        max_input_tokens=inputs,
        max_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_total_tokens=capacity,
        max_batch_size=batch_size,
        max_client_batch_size=options.max_client_batch_size,
        validation_workers=options.validation_workers,
        payload_limit=options.payload_limit,
    )
    pairs = 2 * shape.layers * shape.heads * shape.head_dim * total  # queries with keys, and with values
    operations = 2.0 * prefill * (elements(files, config.scheme) + pairs)
    longest_step = _GRACE + operations / _SLOWEST[machine.kind]
    return Plan(ranks, limits, cache.pools(capacity), dtype, quantize, graphs, budget, longest_step, ledger)


def _budget(machine: Machine, fraction: float) -> int:
    """Bytes the server may take: the fraction is of the GPU's memory, less what others hold, or of the free memory."""
    if machine.device == "cpu":
        return int(fraction * machine.available)
    return int(fraction * machine.total) - (machine.total - machine.available)


@dataclass(frozen=True, slots=True)
class _Bill:
    """Bytes that a model of this shape takes, with numbers of ``width`` bytes, activations of ``compute`` bytes, keys
    and values of ``cached`` bytes."""

    shape: ModelShape
    experts: Experts | None
    scheme: Scheme | None
    width: int
    compute: int
    cached: float
    native: bool
    """Our own kernels keep the values of latent keys once more, as they read them."""

    def weights(
        self, headers: Mapping[str, Header], held: Mapping[str, Held], quantize: str | None, *, copies: bool
    ) -> int:
        """``held``: what some tensors have of quantized matrices. ``copies``: a tied head is a packed copy of the
        embedding."""
        vocab = self.shape.vocab * self.shape.hidden
        # Without our own kernels an embedding is plain whatever becomes of the rest.
        if quantize == "stored" and self.scheme is None:
            stored = int(sum(math.prod(each.shape) * _GGUF.get(each.kind, 4) for each in headers.values()))
            return stored + (0 if self.native else vocab * self.width)
        plain = _plain(headers, held)
        if quantize == "stored":
            kept = sum(each.numbers * (each.width or self.width) for each in held.values())
            return int(plain * self.width + kept)
        numbers = plain + sum(each.numbers for each in held.values())
        if quantize is not None:
            head = _HEADS.get(quantize, self.width)
            heads = [head if self.native else self.width] + ([] if self.shape.tied else [head])
            return int((numbers - len(heads) * vocab) * _QUANTIZED[quantize] + sum(heads) * vocab)
        return (numbers + (vocab if copies and self.shape.tied else 0)) * self.width

    def activations(self, tokens: int) -> int:
        """A step at the widest place of a layer: residual, its norm, and either attention, the MLP, or experts."""
        shape, experts = self.shape, self.experts
        widest = max(2 * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim, 3 * shape.intermediate)
        if experts is not None:
            pair = 2 * shape.hidden + 3 * experts.intermediate
            widest = max(widest, experts.routing.per_token * pair, 3 * experts.shared_intermediate)
        return tokens * (3 * shape.hidden + widest) * self.compute

    def kept(self, tokens: int) -> int:
        """Keys and values of one layer in the cache."""
        return int(self._kept(tokens) * self.cached)

    def gathered(self, tokens: int) -> int:
        """The same as attention reads them: once more in its own numbers, if no kernel of ours converts them."""
        converted = 0 if self.native or self.cached == self.compute else self.compute
        return int(self._kept(tokens) * (self.cached + converted))

    def _kept(self, tokens: int) -> int:
        shape = self.shape
        values = shape.latent * self.native if shape.latent else shape.head_dim
        return tokens * shape.kv_heads * (shape.head_dim + values)

    def parts(self, requests: int) -> int:
        """What Triton's attention keeps of the parts into which it splits the contexts of single tokens: of each query
        head a sum, its weight, and the largest score. There are as many parts as programs, or a few per processor; a
        fixed number of each request is as if there were so many more."""
        shape = self.shape
        shared = shape.heads // shape.kv_heads
        return (requests * shape.kv_heads + _PARTS) * shared * ((shape.latent or shape.head_dim) + 2) * 4

    def context(self, chunk: int) -> int:
        """Attention of a chunk of one request, per token of the request: its keys and values gathered, the same once
        more for every query head, and the chunk's mask with the two it is made from."""
        heads = 2 * self.shape.heads * self.shape.head_dim
        return self.gathered(1) + heads * self.compute + chunk * (self.compute + 2)


@dataclass(frozen=True, slots=True)
class _Kind:
    """The layers in which a token sees equally far."""

    window: int | None
    width: int
    """Bytes of a token in the cache."""
    most: float
    """Tokens of which there are never more, in whole blocks."""

    def tokens(self, capacity: int) -> int:
        return int(min(capacity, self.most))


@dataclass(frozen=True, slots=True)
class _Cache:
    """The KV cache: behind a window blocks are given up, so those layers need room for each request's window only."""

    kinds: list[_Kind]
    """The first sees farthest."""

    @classmethod
    def of(cls, windows: Sequence[int | None], bill: _Bill, requests: int, step: int) -> "_Cache":
        """``windows``: of the layers. ``step``: tokens that all ``requests`` may compute at once."""
        layers = Counter(windows)
        kinds: list[_Kind] = []
        for window in sorted(layers, key=lambda window: math.inf if window is None else window, reverse=True):
            most = math.inf
            if kinds and window is not None:
                # A window begins and ends within a block.
                most = _blocks(requests * (window + 2 * BLOCK_SIZE) + step) * BLOCK_SIZE
            kinds.append(_Kind(window, bill.kept(layers[window]), most))
        return cls(kinds)

    def pools(self, capacity: int) -> list[KVPool]:
        """For ``capacity`` tokens in the layers that see farthest."""
        return [KVPool(_blocks(kind.tokens(capacity)), kind.window) for kind in self.kinds]

    def bytes(self, capacity: int) -> int:
        return sum(kind.tokens(capacity) * kind.width for kind in self.kinds)

    def tokens(self, room: float, beside: int = 0) -> int:
        """The capacity, in whole blocks, that ``room`` bytes are enough for, if a token takes ``beside`` besides."""
        growing = sorted(self.kinds, key=lambda kind: kind.most)
        while True:
            capacity = room / (sum(kind.width for kind in growing) + beside)
            if growing[0].most >= capacity:
                return int(capacity // BLOCK_SIZE) * BLOCK_SIZE
            full = growing.pop(0)
            room -= full.most * full.width


def _total_tokens(options: Options, files: ModelFiles, shape: ModelShape, longest: int) -> int:
    """``max_total_tokens``. ``longest``: tokens of a request that the memory has room for."""
    total = options.max_total_tokens
    if total is None:
        capacity = (options.max_batch_total_tokens or longest) // BLOCK_SIZE * BLOCK_SIZE
        return min(shape.max_position_embeddings, _tokenizer_length(files, options), longest, capacity)
    if total > shape.max_position_embeddings:
        raise ArgumentValidation(
            f"`max_total_tokens` must be <= {shape.max_position_embeddings}, what the model was made for. Given: "
            f"{total}. `--rope-scaling` and `--rope-factor` stretch it."
        )
    if total > longest:
        raise ArgumentValidation(
            f"Not enough memory to handle `max_total_tokens={total}`: there is room for requests of {longest} tokens. "
            "Lower `--max-total-tokens`, or raise `--cuda-memory-fraction`."
        )
    return total


def _cache_tokens(options: Options, total: int, room: int, device: str) -> int:
    """Tokens of the KV cache, in whole pages: what the operator says, else what can be used and is there."""
    asked = options.max_batch_total_tokens
    if asked is not None:
        if asked > room:
            raise ArgumentValidation(
                f"`max_batch_total_tokens` must be <= {room}, what the memory has room for. Given: {asked}"
            )
        return asked // BLOCK_SIZE * BLOCK_SIZE
    longest = -(-total // BLOCK_SIZE) * BLOCK_SIZE
    if device == "cpu":
        room = max(int(room * _CPU_CACHE_SHARE), longest)
    return min(room, options.max_concurrent_requests * longest) // BLOCK_SIZE * BLOCK_SIZE


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _sum(ledger: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {size(count)}" for name, count in ledger.items())


def _tokenizer_length(files: ModelFiles, options: Options) -> int:
    """``model_max_length`` of the tokenizer; some write a huge number for none."""
    path = Path(options.tokenizer_config_path or Path(files.folder) / "tokenizer_config.json")
    try:
        length = json.loads(path.read_bytes()).get("model_max_length")
    except FileNotFoundError:
        length = None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path}: {error}") from None
    return int(length) if isinstance(length, int | float) and 1 <= length < 1e9 else 1 << 62


def elements(files: ModelFiles, scheme: Scheme | None = None) -> int:
    """Numbers in all weights. Tensors that are one and the same count once; masks, which are no weights, don't."""
    headers = read_headers(files)
    held = {} if scheme is None else scheme.held(headers)
    return _plain(headers, held) + sum(each.numbers for each in held.values())


def _plain(headers: Mapping[str, Header], held: Mapping[str, Held]) -> int:
    """Numbers in tensors that aren't parts of quantized matrices."""
    plain = {header for name, header in headers.items() if name not in held and header.kind not in ("BOOL", "U8")}
    return sum(math.prod(header.shape) for header in plain)


def _check_kinds(headers: Mapping[str, Header], held: Mapping[str, Held], scheme: Scheme | None) -> None:
    """StartupError for a tensor that is neither plain nor, by its quantization_config, a part of a quantized matrix."""
    rule = "no quantization_config explains" if scheme is None else f"{scheme.method} forbids"
    for name, header in headers.items():
        if header.kind not in PLAIN and name not in held:
            raise StartupError(f"{header.path}: tensor {name} has type {header.kind}, which {rule}")
