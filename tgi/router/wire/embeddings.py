"""The wire of /v1/embeddings, as OpenAI has it. Types only: ``validate`` judges the values."""

from typing import Generic, Literal, TypeVar

from msgspec import Struct

from tgi.core.messages import Pooling
from tgi.router.wire.base import I32, U32


class EmbeddingsRequest(Struct, frozen=True, kw_only=True):
    input: str | list[str | U32 | list[U32]]
    """One text, several texts, one prompt of token ids, or several of those."""
    model: str | None = None
    """Any name is accepted: one model is served."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: U32 | None = None
    """Only the model's own size: vectors of language models can't be cut."""
    user: str | None = None
    pooling: Pooling | None = None
    """Ours: the mean of all tokens' last hidden states, unless told otherwise, or the last token's."""
    truncate_prompt_tokens: U32 | None = None
    """Other servers', as all that follows: keep so many tokens from the end of each input."""
    add_special_tokens: bool | None = None
    priority: I32 | None = None
    cache_salt: str | None = None


class Embedding(Struct, frozen=True, kw_only=True, tag_field="object", tag="embedding"):
    index: int
    embedding: list[float] | bytes
    """Of length 1. As base64: little-endian float32."""


class EmbeddingsUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


Item = TypeVar("Item")


class Embeddings(Struct, Generic[Item], frozen=True, kw_only=True, tag_field="object", tag="list"):
    """``Item`` is Embedding, or what it was encoded to."""

    data: list[Item]
    model: str
    usage: EmbeddingsUsage
