"""What the scheduler hands to the runner for one chunk, and what it gets back. Data only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgi.core.messages import PromptToken, Submit, Token


@dataclass(frozen=True, slots=True)
class Work:
    """Compute ``length`` tokens of a request from position ``start``; all before it is in the cache."""

    submit: Submit
    tokens: Sequence[int]
    """All ids of the request, prompt and generated; not to be changed."""
    start: int
    length: int
    blocks: Sequence[int]
    """Pages of the request in order."""
    scratch: dict[str, Any]
    """Belongs to the request and dies with it: what the runtime remembers of it, always possible to rebuild."""

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the request, so that it yields the next token, if any is wanted."""
        return self.start + self.length == len(self.tokens) and self.submit.max_new_tokens > 0


Masks = Mapping[int, Any]
"""Index of a work that has a grammar → numpy bool [vocabulary]: the tokens that may come next, at least one."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the device made of one chunk."""

    token: Token | None = None
    """None if the work doesn't sample."""
    prompt: Sequence[PromptToken] = ()
    """The prompt tokens at ``start + 1 …``, if the request asked for ``prompt_logprobs``."""
    embedding: Sequence[float] = ()
    """Of the whole prompt, once the chunk reaches its end, if the request asked for ``pooling``."""
    error: str | None = None
    """The request can't go on; others can."""
