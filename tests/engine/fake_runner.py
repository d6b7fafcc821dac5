"""A runner without a model: its "keys and values" are the ids themselves, and it checks every one that it reads.

The next token is a hash of everything before it, so that any mistake in scheduling, sharing or eviction shows up
either as a wrong cache entry at once or as a different text at the end.
"""

from collections.abc import Sequence
from hashlib import blake2b

from tgi.core.config import BLOCK_SIZE
from tgi.core.messages import PromptToken, Token
from tgi.core.plan import Sampled, Work

VOCABULARY = 50


def next_token(tokens: Sequence[int]) -> int:
    return int.from_bytes(blake2b(bytes(tokens), digest_size=4).digest(), "little") % VOCABULARY


def text_of(prompt: Sequence[int], new: int, stops: Sequence[int] = ()) -> list[int]:
    """What a request must generate, whatever happens around it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    vocab_size = VOCABULARY

    def __init__(self, blocks: int) -> None:
        self.cells: list[tuple[int, ...] | None] = [None] * (blocks * BLOCK_SIZE)
        self.computed = 0

    def launch(self, works: Sequence[Work]) -> Sequence[Work]:
        written: set[int] = set()
        for work in works:
            assert work.length > 0
            assert len(work.blocks) * BLOCK_SIZE >= work.start + work.length
            for position in range(work.start, work.start + work.length):
                cell = self._cell(work, position)
                assert cell not in written, "two chunks write one cell"
                written.add(cell)
                self.cells[cell] = tuple(work.tokens[: position + 1])
            self.computed += work.length
        for work in works:
            for position in range(work.start + work.length):
                assert self.cells[self._cell(work, position)] == tuple(work.tokens[: position + 1]), "wrong cache entry"
        return works

    def sample(self, launched: Sequence[Work]) -> list[Sampled]:
        return [
            Sampled(
                Token(next_token(work.tokens), -1.0) if work.samples else None, self._scores(work), self._pooled(work)
            )
            for work in launched
        ]

    @staticmethod
    def _scores(work: Work) -> list[PromptToken]:
        if not work.submit.prompt_logprobs:
            return []
        last = min(work.start + work.length, work.submit.prompt_length - 1)
        return [PromptToken(float(-work.tokens[at + 1])) for at in range(work.start, last)]

    @staticmethod
    def _pooled(work: Work) -> list[float]:
        """What is pooled: the last id, or all ids, each of which must have been computed for this request."""
        if work.submit.pooling is None:
            return []
        chunk = list(work.tokens[work.start : work.start + work.length])
        work.scratch["pooled"] = chunk if work.start == 0 else work.scratch.get("pooled", []) + chunk
        if work.start + work.length < work.submit.prompt_length:
            return []
        return [float(id) for id in (chunk[-1:] if work.submit.pooling == "last" else work.scratch["pooled"])]

    @staticmethod
    def _cell(work: Work, position: int) -> int:
        return work.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
