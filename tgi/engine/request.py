"""One request inside the engine: a list of token ids that grows, and how far the cache has caught up with it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tgi.core.messages import FinishReason, Submit
from tgi.engine.thinking import Thoughts

if TYPE_CHECKING:
    from llguidance import LLMatcher

_RENEWABLE = "grammar: lexer error", "grammar: Parser Error: token"
"""What llguidance says when a lexer is full: as it makes a mask, and as it follows a token that the mask allowed."""


@dataclass(slots=True, eq=False)
class Request:
    """Everything but ``submit`` and ``tokens`` can be rebuilt from them."""

    router: int
    """Connection that submitted it."""
    submit: Submit
    tokens: list[int] = field(init=False)
    """Prompt and generated ids."""
    told: int = field(init=False)
    """Leading tokens that the router knows, or doesn't ask about. A token that a grammar forces is told with the step
    that makes its log-probability known, as a prompt's are to who asks for them."""
    finish: FinishReason | None = field(init=False)
    """Why nothing can follow its tokens; it ends when all of them are told."""
    turn: tuple[int, float, int] = (0, 0.0, 0)
    """(priority, time of arrival, number): the scheduler serves lower ones first."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    planned: int = 0
    """The same once the steps under way are done; the scheduler lets it catch up with ``goal``."""
    released: int = 0
    """How often it has given its blocks back. What a step yields that was planned before means nothing then."""
    blocks: "list[array[int]]" = field(default_factory=list)
    """For each kind of layer its pages in order; none while it waits. Kernels read the memory as it is."""
    firsts: list[int] = field(default_factory=list)
    """For each kind of layer how many of them it has given up, from the beginning: those mean nothing any more."""
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of ``tokens``, as far as they were needed."""
    published: int = 0
    """Leading blocks that were offered to the prefix index."""
    started: float = 0.0
    cached: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    done: bool = False
    matcher: "LLMatcher | None" = None
    """How far the generated tokens have come in the grammar, if there is one."""
    thoughts: Thoughts | None = None
    """How far they have come in their reasoning, if there is a budget for it."""
    renewed: int = 0
    """Tokens that it had when it last needed a new matcher."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """The runtime's own notes on the request; see ``Work.scratch``."""

    def __post_init__(self) -> None:
        self.tokens = list(self.submit.token_ids)
        self.told = len(self.tokens)
        if self.submit.prompt_logprobs and self.submit.scored < self.submit.prompt_length - 1:
            self.told = self.submit.scored + 1  # the first has no log-probability
        self.finish = self._end()

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.submit.prompt_length

    @property
    def goal(self) -> int:
        """Tokens to compute: all, but for a generated one that nothing follows. A token that a step under way draws is
        one of them, though nobody knows it yet."""
        drawn = self.finish is None and self.planned >= len(self.tokens)
        generated = self.generated + drawn
        last = generated > 0 and (self.finish is not None or generated >= self.submit.max_new_tokens)
        return len(self.tokens) + drawn - last

    @property
    def broken(self) -> str | None:
        """How its grammar has failed, if it has: its mask and its last tokens then mean nothing."""
        if self.matcher is None or not self.matcher.is_error():
            return None
        from tgi.core.grammar import failure

        return f"grammar: {failure(self.matcher)}"

    def extend(self, drawn: Sequence[int]) -> None:
        """Append what was drawn, and the tokens about which there is no choice then, as far as there is room.

        The grammar may break with it.
        """
        for token in drawn:
            self._append(token)
        if self.matcher is None and self.thoughts is None:
            return
        while self.finish is None and (forced := self._forced()):
            for token in forced:
                self._append(token)
                if self.finish is not None:
                    break

    def follow(self, matcher: "LLMatcher | None", thoughts: Thoughts | None = None) -> None:
        """Take on what watches over the reply, at its beginning, and lead it to where the request is.

        What was forced is forced again, run by run, so that a run of which a part was told goes on as it would have.
        """
        self.matcher, self.thoughts = matcher, thoughts
        prompt = self.submit.prompt_length
        given = self.tokens[prompt:]
        del self.tokens[prompt:]
        self.finish = self._end()
        while self.generated < len(given):
            rest = given[self.generated :]
            run = self._forced()
            if not run or run[: len(rest)] != rest[: len(run)]:
                run = rest[:1]
            for token in run:
                self._append(token)
                if self.finish is not None and self.generated >= len(given):
                    break
        self.extend([])

    def renews(self, failure: str) -> bool:
        """Whether a new matcher may help, which is then due.

        The requests of one grammar share what its lexer has learnt, and the lexer's bounds: one that asks too much
        breaks the matchers of all. With a lexer of its own a request goes on, unless it hasn't since the last time.
        """
        if not failure.startswith(_RENEWABLE) or len(self.tokens) <= self.renewed:
            return False
        self.renewed = len(self.tokens)
        return True

    def _forced(self) -> list[int]:
        if self.matcher is not None and (run := self.matcher.compute_ff_tokens()):
            return run
        return self.thoughts.forced(self.generated) if self.thoughts is not None else []

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        if self.matcher is not None:
            self.matcher.consume_token(token)
        if self.thoughts is not None:
            self.thoughts.see(token)
        self.finish = self._end()

    def _end(self) -> FinishReason | None:
        """Why nothing can follow the tokens there are, if so. An end token in the last place counts as one."""
        submit, tokens = self.submit, self.tokens
        generated = len(tokens) - submit.prompt_length
        if generated > 0 and tokens[-1] in submit.stop_token_ids:
            return "eos_token"
        if self.matcher is not None and self.matcher.is_stopped():
            return "eos_token"
        return "length" if generated >= submit.max_new_tokens else None
