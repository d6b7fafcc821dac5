"""What router, engine and launcher say to each other: tagged MessagePack arrays over Unix sockets and pipes.

A frame is a 4-byte little-endian length and the encoded message. Token ids travel, never text; times are
``time.monotonic()`` seconds, which processes of one machine share.

What each step makes many of is not tracked by the garbage collector (``gc=False``): it can't be part of a cycle.
"""

import struct
from typing import Literal

import msgspec

FRAME = struct.Struct("<I")
MAX_FRAME = 1 << 28

FinishReason = Literal["length", "eos_token"]
"""Why the engine stopped. Stop strings are found by the router, which sees text."""


class Thinking(msgspec.Struct, array_like=True, frozen=True):
    """How long a reply may reason."""

    budget: int
    """Generated tokens after which reasoning that goes on is closed."""
    opens: str
    """A reply that doesn't begin with this doesn't reason; "": it begins within its reasoning."""
    closes: str


class Sampling(msgspec.Struct, array_like=True, frozen=True):
    """How the next token is chosen. Defaults are neutral; neutral values cost nothing."""

    greedy: bool = True
    seed: int = 0
    """64 bits; a draw is a pure function of (seed, position)."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are removed."""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    """None of the ``stop_token_ids`` before so many tokens."""
    watermark: tuple[float, float] | None = None
    """(gamma, delta): share of green tokens and their bonus."""
    grammar: str = ""
    """What the tokens must spell, as llguidance reads it; "" for anything."""
    end_token_ids: list[int] = []
    """The model's own end tokens, which a grammar allows where it may end; sent only with one."""
    thinking: Thinking | None = None
    top_n_tokens: int = 0
    """Also of each prompt token, where ``prompt_logprobs`` asks for those."""

    @property
    def limits(self) -> bool:
        """Whether some tokens may not be drawn because others are likelier."""
        return self.top_k > 0 or self.top_p != 1.0 or self.typical_p != 1.0 or self.min_p != 0.0

    @property
    def remembers(self) -> bool:
        """Whether tokens that the request holds already are penalized."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


Pooling = Literal["mean", "last"]
"""How the hidden states of a prompt become one vector."""


class Submit(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Run this request. One that another engine has begun carries behind its prompt the ids generated so far."""

    id: int
    token_ids: list[int]
    prompt_length: int
    max_new_tokens: int
    """0: only the prompt is computed."""
    stop_token_ids: list[int]
    sampling: Sampling
    arrived: float
    prompt_logprobs: bool = False
    cache_salt: bytes = b""
    """Blocks are shared only between requests of equal salt."""
    priority: int = 0
    """Requests of a lower value run first."""
    pooling: Pooling | None = None
    """Ask for the prompt's embedding; ``max_new_tokens`` is then 0."""
    scored: int = 0
    """Log-probabilities of the prompt's tokens that have come already, where ``prompt_logprobs`` asks for them."""


class Cancel(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The client is gone or the router has seen enough; unknown ids are ignored."""

    id: int


class Ping(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Asks the step loop, not the socket, whether it is alive."""

    nonce: int


ToEngine = Submit | Cancel | Ping


class Token(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One generated token with the model's own log-probability (before penalties and warpers)."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []
    """The ``top_n_tokens`` most likely (id, logprob), best first."""


class PromptToken(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The log-probability of one prompt token, and the most likely (id, logprob) in its place, best first."""

    logprob: float
    top: list[tuple[int, float]] = []


class Delta(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one step added to one request; applied only if ``index`` equals the number of tokens known so far."""

    id: int
    index: int
    tokens: list[Token]
    finish: FinishReason | None = None
    started: float = 0.0
    """When the request was first scheduled."""
    cached: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    prompt: list[PromptToken] = []
    """The next prompt tokens, in order, if the request asked for ``prompt_logprobs``; the first of them has none."""
    embedding: list[float] = []
    """With ``finish``, if the request asked for ``pooling``: the pooled last hidden states, not normalized."""


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """This request, and no other, ends with an error."""

    id: int
    message: str


class StepStats(msgspec.Struct, array_like=True, frozen=True):
    """One step in numbers, for the metrics. Without rows: nothing ran, and this is how things stand now."""

    prefill_rows: int = 0
    decode_rows: int = 0
    duration: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    running: int = 0
    batch_tokens: int = 0
    """Tokens of KV cache that the running requests hold."""
    admitted: int = 0
    planning: float = 0.0
    """Seconds that it took to form the batch; ``forward`` begins behind them."""
    preempted: int = 0
    """Requests that had to give up their cache."""
    masks: float = 0.0
    """Seconds, of those of ``sample``, in which the step waited for grammars."""
    forced: int = 0
    """Tokens about which there was no choice, sent without having been drawn."""


class Implementation(msgspec.Struct, frozen=True):
    """What serves the model, in words for the operator."""

    model: str
    """Which code, and why."""
    forward: str
    """How a step is run."""
    attention: list[str]
    """Backends of its layers; none if the model has a cache of its own."""


class Hello(msgspec.Struct, tag=11, array_like=True, frozen=True):
    """First message on a connection: the engine has loaded and serves."""

    epoch: int
    """Another for each start of the engine."""
    implementation: Implementation | None = None


class Step(msgspec.Struct, tag=12, array_like=True, frozen=True):
    """All that one step has for one router."""

    deltas: list[Delta] = []
    faults: list[Fault] = []
    stats: StepStats | None = None
    """Each step's numbers go to one router, so that sums over routers are right."""


class Pong(msgspec.Struct, tag=13, array_like=True, frozen=True):
    """The step loop answers a Ping."""

    nonce: int


ToRouter = Hello | Step | Pong


class Loading(msgspec.Struct, tag="loading", frozen=True):
    """Child → launcher, one JSON line on the status pipe: bytes of weights loaded so far."""

    done: int
    total: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Child → launcher: it serves."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Child → launcher: it can't go on, and why, in words for the operator."""

    message: str


Status = Loading | Ready | Failed

_encoder = msgspec.msgpack.Encoder()


def frame(message: ToEngine | ToRouter) -> bytes:
    """Length-prefixed MessagePack of one message."""
    body = _encoder.encode(message)
    return FRAME.pack(len(body)) + body
