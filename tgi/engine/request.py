"""One request inside the engine: a list of token ids that grows, and how far the cache has caught up with it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tgi.core.messages import FinishReason, Submit, Token

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True, eq=False)
class Request:
    """Everything but ``submit`` and ``tokens`` can be rebuilt from them."""

    router: int
    """Connection that submitted it."""
    submit: Submit
    tokens: list[int]
    """Prompt and generated ids."""
    turn: tuple[int, int] = (0, 0)
    """(priority, order of arrival): the scheduler serves lower ones first."""
    computed: int = 0
    """Tokens whose keys and values are in the cache; the scheduler lets it catch up with ``len(tokens)``."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of ``tokens``, as far as they were needed."""
    published: int = 0
    """Leading blocks that were offered to the prefix index."""
    started: float = 0.0
    cached: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    scored: int = 1
    """Prompt tokens whose log-probability was sent; the first has none."""
    done: bool = False
    matcher: "LLMatcher | None" = None
    """How far the generated tokens have come in the grammar, if there is one."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """The runtime's own notes on the request; see ``Work.scratch``."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.submit.prompt_length

    def follow(self, token: Token | None) -> str | None:
        """Let the grammar, if there is one, see the next token. Returns what has gone wrong with it."""
        if self.matcher is None:
            return None
        from tgi.core.grammar import failure

        if token is not None:
            self.matcher.consume_token(token.id)
        error = failure(self.matcher)
        return None if error is None else f"grammar: {error}"

    def finish_reason(self) -> FinishReason | None:
        """Why the request ends with the tokens it has, if it does. An end token in the last place counts as one."""
        if self.generated and self.tokens[-1] in self.submit.stop_token_ids:
            return "eos_token"
        if self.matcher is not None and self.matcher.is_stopped():
            return "eos_token"  # nothing can follow
        return "length" if self.generated >= self.submit.max_new_tokens else None
