"""The wire of TGI's own routes, field by field as TGI has them. Types only: ``validate`` judges the values."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from tgi.core.messages import Implementation
from tgi.router.wire.base import F32, I32, U32, U63, U64, Refusing
from tgi.router.wire.grammar import Grammar


class GenerateParameters(Refusing, frozen=True, kw_only=True):
    """How to generate. Fields of null take the model's way."""

    neutral = {"adapter_id": (None,)}

    best_of: U63 | None = None
    """Generate this many sequences and return the one with the highest mean logprob."""
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    min_p: F32 | None = None
    """Ours, as are the other fields that OpenAI's routes need and TGI lacks."""
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    min_tokens: U32 | None = None
    """No end token and no stop string before so many tokens."""
    ignore_eos: bool = False
    return_full_text: bool | None = None
    stop: list[str] = []
    stop_token_ids: list[U32] = []
    include_stop_str_in_output: bool = True
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    truncate: U63 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    logit_bias: dict[int, F32] | None = None
    grammar: Grammar | None = None
    """What the text must spell."""
    adapter_id: str | None = None
    priority: I32 = 0
    """Requests of a lower value run first."""
    cache_salt: str | None = None
    """Prompts share the prefix cache only with prompts of the same salt."""


class GenerateRequest(Struct, frozen=True, kw_only=True):
    inputs: str
    parameters: GenerateParameters = GenerateParameters(do_sample=True)  # TGI: sampling unless parameters are sent


class CompatGenerateRequest(GenerateRequest, frozen=True, kw_only=True):
    stream: bool = False


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class PrefillToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None


class Token(Struct, frozen=True):
    id: int
    text: str
    logprob: float
    """The model's own, before penalties and warpers."""
    special: bool


class BestOfSequence(Struct, frozen=True, kw_only=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct, frozen=True):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, frozen=True):
    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct, frozen=True):
    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, frozen=True):
    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(Struct, frozen=True, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    device: str
    dtype: str
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    memory: dict[str, int]
    """The memory ledger: name → bytes."""
    implementation: Implementation | None
    """What serves the model and why; null while the engine is not there."""
