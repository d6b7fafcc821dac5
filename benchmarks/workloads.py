"""What servers are asked: prompts that none of them has seen, and the loads that are made of these. Knows no server.

All prompts follow from a seed, so that every server gets the same ones. Sizes are in tokens of the model's tokenizer.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from client import Answer, BenchmarkError, quantile, run, summary

_NOUNS = """
apple river stone cloud paper window garden letter summer winter music table market bridge engine forest
silver copper island harbor lantern mirror ladder button candle carpet basket bottle kitchen village mountain
teacher doctor sailor farmer painter student captain question answer promise secret journey problem reason
moment morning evening year street corner office station library school theatre museum castle tower valley
desert ocean meadow
""".split()
_VERBS = (
    "finds carries paints forgets follows repairs admires describes borrows measures watches hides opens builds".split()
)
_ADJECTIVES = (
    "old quiet bright narrow gentle heavy curious distant honest sudden yellow careful broken famous simple".split()
)
_REQUESTS = [
    "What should I know about a {a} {n} before I buy one for my {m}?",
    "Tell me a short story in which a {m} {v} a {a} {n}.",
    "How would you explain a {n} to a {m} who has never seen one?",
    "My {m} lost a {a} {n} yesterday. What would you say to cheer them up?",
    "Give me three reasons why a {m} {v} the {n} near the {o}.",
]
_QUESTIONS = "Who|What|Where|When|Why|How often|Which of them|For whom|With what|Since when".split("|")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the loads are."""

    prompt: int = 128
    new: int = 128
    waves: int = 2
    """Requests per stream; one at 32 streams, which takes long enough."""
    conversations: int = 200
    conversation: int = 64
    """New tokens of each."""
    document: int = 6000
    questions: int = 10
    answer: int = 32
    prefill: int = 4000
    arrivals: int = 64


FULL = Sizes()
QUICK = Sizes(
    prompt=32,
    new=16,
    waves=1,
    conversations=8,
    conversation=8,
    document=300,
    questions=3,
    answer=4,
    prefill=400,
    arrivals=96,
)


class Prompts:
    """Texts of given lengths. The same seed and calls give the same texts."""

    def __init__(self, tokenizer: Path, seed: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._chance = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Of ``tokens`` tokens, give or take one where cutting lets words be spelled otherwise."""
        words: list[str] = []
        while True:
            words += (self._sentence() for _ in range(1 + tokens // 12))
            ids = self._tokenizer.encode(" ".join(words), add_special_tokens=False).ids
            if len(ids) >= tokens:
                text: str = self._tokenizer.decode(ids[:tokens])
                return text

    def conversation(self) -> str:
        """The beginning of one: some 40 tokens."""
        pick = self._chance.choice
        request = pick(_REQUESTS).format(
            a=pick(_ADJECTIVES), n=pick(_NOUNS), m=pick(_NOUNS), o=pick(_NOUNS), v=pick(_VERBS)
        )
        return f"{pick(_NOUNS).capitalize()} {self._chance.randrange(10**6)}. {self._sentence()} {request}"

    def length(self, low: int, high: int) -> int:
        return self._chance.randint(low, high)

    def _sentence(self) -> str:
        a, b, c, d, e, f = map(self._chance.choice, (_ADJECTIVES, _NOUNS, _VERBS, _NOUNS, _VERBS, _NOUNS))
        return f"The {a} {b} {c} a {d} and {e} the {f}."


Figures = dict[str, float]


async def decode(url: str, prompts: Prompts, sizes: Sizes, streams: int) -> Figures:
    waves = sizes.waves if streams < 32 else 1
    return summary(await run(url, [(prompts.text(sizes.prompt), sizes.new) for _ in range(streams * waves)], streams))


async def small(url: str, prompts: Prompts, sizes: Sizes) -> Figures:
    """Many short conversations, a hundred at once; then the same again."""
    requests = [(prompts.conversation(), sizes.conversation) for _ in range(sizes.conversations)]
    return await _twice(url, requests, 100)


async def long(url: str, prompts: Prompts, sizes: Sizes) -> Figures:
    """Questions about one long document, all at once; then the same again."""
    document = prompts.text(sizes.document)
    requests = [
        (f"{document}\n\nQuestion: {_QUESTIONS[i % len(_QUESTIONS)]} in the text above?\nAnswer:", sizes.answer)
        for i in range(sizes.questions)
    ]
    return await _twice(url, requests, sizes.questions)


async def _twice(url: str, requests: list[tuple[str, int]], streams: int) -> Figures:
    first, second = [summary(await run(url, requests, streams)) for _ in range(2)]
    return {f"first_{key}": value for key, value in first.items()} | {
        f"second_{key}": value for key, value in second.items()
    }


async def prefill(url: str, prompts: Prompts, sizes: Sizes) -> Figures:
    [answer] = await run(url, [(prompts.text(sizes.prefill), 2)], 1)
    return summary([answer]) | {"prefill_tokens_s": (answer.prompt_tokens - answer.cached_tokens) / answer.first}


async def arrivals(url: str, prompts: Prompts, sizes: Sizes) -> Figures:
    """32 streams at any time, of different lengths, so that new prompts keep arriving among those that decode."""
    requests = [
        (prompts.text(sizes.prompt), prompts.length(sizes.new // 4, sizes.new * 3 // 4)) for _ in range(sizes.arrivals)
    ]
    return steady(await run(url, requests, 32), 32)


def steady(answers: list[Answer], streams: int) -> Figures:
    """Gaps between tokens while all streams were busy: from the last of their first prompts on to the last arrival."""
    by_begin = sorted(answers, key=lambda answer: answer.begin)
    begin, end = max(answer.stamps[0] for answer in by_begin[:streams]), by_begin[-1].begin
    gaps = [b - a for answer in answers for a, b in pairwise(answer.stamps) if a >= begin and b <= end]
    if not gaps:
        raise BenchmarkError(f"{len(answers)} requests are too few: there was no time at which {streams} were decoding")
    p50, p99 = quantile(gaps, 0.5), quantile(gaps, 0.99)
    return summary(answers) | {"itl_p50_ms": 1e3 * p50, "itl_p99_ms": 1e3 * p99, "itl_p99_by_p50": p99 / p50}


@dataclass(frozen=True, slots=True)
class Workload:
    title: str
    run: Callable[[str, Prompts, Sizes], Awaitable[Figures]]


def _streams(count: int) -> Callable[[str, Prompts, Sizes], Awaitable[Figures]]:
    return lambda url, prompts, sizes: decode(url, prompts, sizes, count)


WORKLOADS = {
    "W1": Workload("1 stream", _streams(1)),
    "W2": Workload("8 streams", _streams(8)),
    "W3": Workload("32 streams", _streams(32)),
    "W4": Workload("small: 200 conversations", small),
    "W5": Workload("long: a 6,000-token document, 10 questions", long),
    "W6": Workload("prefill of 4,000 tokens", prefill),
    "W7": Workload("32 streams, prompts arriving", arrivals),
}
