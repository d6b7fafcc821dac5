"""A runner without a model: its "keys and values" are the ids themselves, and it checks every one that it reads.

The next token is a hash of everything before it, so that any mistake in scheduling, sharing or eviction shows up
either as a wrong cache entry at once or as a different text at the end. So are log-probabilities.
"""

from collections.abc import Sequence
from hashlib import blake2b

from tgi.core.config import BLOCK_SIZE, KVPool
from tgi.core.messages import Token
from tgi.core.plan import Masks, Sampled, Work

VOCABULARY = 50


def digest(tokens: Sequence[int]) -> int:
    return int.from_bytes(blake2b(b"".join(id.to_bytes(4) for id in tokens), digest_size=4).digest(), "little")


def next_token(tokens: Sequence[int]) -> int:
    return digest(tokens) % VOCABULARY


def logprob(tokens: Sequence[int]) -> float:
    """Of the last of these tokens, behind the others."""
    return -digest(tokens[::-1]) / 2**32


def text_of(prompt: Sequence[int], new: int, stops: Sequence[int] = ()) -> list[int]:
    """What a request must generate, whatever happens around it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class Launched(list[Work]):
    """A step that was launched."""

    @property
    def works(self) -> "Launched":
        return self


class FakeRunner:
    vocab_size = VOCABULARY

    def __init__(self, pools: Sequence[KVPool], *, ahead: bool = False) -> None:
        self.pools = pools
        self.ahead = ahead
        self.cells: list[list[tuple[int, ...] | None]] = [[None] * (pool.blocks * BLOCK_SIZE) for pool in pools]
        self.computed = 0
        self.scored = 0

    def launch(self, works: Sequence[Work]) -> "Launched":
        for at in range(len(self.pools)):
            self._compute(at, works)
        self.computed += sum(work.length for work in works)
        return Launched(works)

    def _compute(self, at: int, works: Sequence[Work]) -> None:
        """What one kind of layer does."""
        cells, window = self.cells[at], self.pools[at].window
        written: set[int] = set()
        for work in works:
            assert work.length > 0
            assert len(work.blocks[at]) * BLOCK_SIZE >= work.start + work.length
            for position in range(work.start, work.start + work.length):
                cell = self._cell(work, at, position)
                assert cell not in written, "two chunks write one cell"
                written.add(cell)
                cells[cell] = self._ids(work)[: position + 1]
        for work in works:
            first = 0 if window is None else max(work.start - window + 1, 0)
            for position in range(first, work.start + work.length):
                assert cells[self._cell(work, at, position)] == self._ids(work)[: position + 1], "wrong cache entry"

    @staticmethod
    def _ids(work: Work) -> tuple[int, ...]:
        """Those to compute, and all before. The last may be one that the step before has drawn, and only it knows."""
        known = work.start + work.length <= len(work.tokens)
        return tuple(work.tokens if known else [*work.tokens, work.scratch["drawn"]])

    def sample(self, works: Sequence[Work], masks: Masks | None = None) -> list[Sampled]:
        """works: as they are by then."""
        return [self.sampled(work, next_token(work.tokens)) for work in works]

    def draw(self, launched: Sequence[Work], works: Sequence[Work], masks: Masks | None) -> list[Sampled]:
        return self.sample(works, masks)

    def collect(self, drawing: list[Sampled]) -> list[Sampled]:
        return drawing

    def capture(self) -> bool:
        return False

    def sampled(self, work: Work, drawn: int) -> Sampled:
        """All that a work yields, if that is what it draws."""
        assert work.start < work.told or work.told == len(work.tokens), "a token to tell has lost its logits"
        assert not work.samples or work.start + work.length == len(work.tokens), "drawn behind an unknown token"
        self.scored += len(work.scored)
        ids = [work.tokens[position] for position in work.scored]
        known = [Token(id, logprob(work.tokens[: at + 1])) for at, id in zip(work.scored, ids, strict=True)]
        if not work.samples:
            return Sampled(known, self._pooled(work))
        work.scratch["drawn"] = drawn
        return Sampled([*known, Token(drawn, logprob([*work.tokens, drawn]))], self._pooled(work))

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
    def _cell(work: Work, at: int, position: int) -> int:
        return work.blocks[at][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
