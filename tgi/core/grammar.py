"""llguidance as the router's trials and the engine both use it: one tokenizer, one set of bounds, so that what the one
accepted the other can run. Imported only where a grammar has arrived; knows no request.
"""

from collections.abc import Callable, Sequence
from typing import cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from tgi.core.vocabulary import Vocabulary

LIMITS = LLParserLimits(max_lexer_states=16_000, step_max_items=5_000, verbose_errors=False)
"""llguidance's own bounds, but for the memory of one lexer, whose states have 1 kB each, and for the time of one mask:
``e: e e`` takes 10 ms for so many items and 70 ms for twice as many."""

SCHEMA_LIMITS = LLParserLimits(max_lexer_states=16_000, step_max_items=20_000, verbose_errors=False)
"""Schemas aren't ambiguous in that way: one of 500 optional fields looks at more than 5000 items in less than 1 ms."""


class GrammarError(Exception):
    """llguidance can't do this; the text says why, in one line."""


def load_tokenizer(vocabulary: Vocabulary, width: int, end_ids: Sequence[int]) -> LLTokenizer:
    """The tokens that grammars are about. ``width``: of the model's logits, which can be more or fewer than there are
    tokens. ``end_ids``: the tokens that a grammar allows where it may end.

    From then on the vocabulary reads special tokens in texts as plain text.
    """
    ends = [id for id in end_ids if 0 <= id < width]
    if not ends:
        raise GrammarError("this model has no end token, which grammars need")
    vocabulary.backend.encode_special_tokens = True
    encoder = _Encoder(vocabulary, width)
    tokenizer = LLTokenizer(cast("TokenizerWrapper", encoder), eos_token=ends)
    encoder.fallback = tokenizer.greedy_tokenize
    return tokenizer


def spells_all(tokenizer: LLTokenizer) -> bool:
    """Whether every text has tokens, but for control characters and characters that Unicode has yet to assign: some
    models lack their bytes."""
    usual = b"\t\n\r" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0xC0)) + bytes(range(0xC2, 0xF1)) + b"\xf3"
    return all(tokenizer.decode_bytes(tokenizer.tokenize_bytes(bytes([byte]))) == bytes([byte]) for byte in usual)


class _Encoder:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 0
    """One must be named; the tokenizer's own replace it."""

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        self._special = special = vocabulary.special_ids
        tokens = [vocabulary.token_bytes(id) for id in range(min(width, vocabulary.size))]
        # No text has the byte 0xFF: llguidance marks special tokens with it.
        tokens = [b"" if token[:1] == b"\xff" and id not in special else token for id, token in enumerate(tokens)]
        self.tokens = tokens + [b""] * (width - len(tokens))
        self.special_token_ids = sorted(id for id in special if id < width)
        self.fallback: Callable[[str], list[int]] | None = None
        self._backend = vocabulary.backend
        self._leads = [(lead, self._encode(lead)) for lead in ("", "\n", "a")]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that continues another, as the model would write them: without the space that some put in
        front of all text, and without what others do to it."""
        assert self.fallback is not None
        for lead, before in self._leads:
            ids = self._encode(lead + text)
            rest = ids[len(before) :]
            if ids[: len(before)] == before and self._spelling(rest) == text.encode():
                return rest
        return self.fallback(text)

    def _spelling(self, ids: list[int]) -> bytes | None:
        if any(id in self._special or id >= len(self.tokens) for id in ids):
            return None
        return b"".join(map(self.tokens.__getitem__, ids))

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def start(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher before the first token. llguidance's matchers never raise: they keep their error, see ``check``."""
    limits = LIMITS if '"lark_grammar"' in grammar else SCHEMA_LIMITS
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise GrammarError if the matcher has failed."""
    if (error := failure(matcher)) is not None:
        raise GrammarError(error)


def failure(matcher: LLMatcher) -> str | None:
    """How the matcher has failed, in one line, if it has."""
    if not matcher.is_error():
        return None
    error = matcher.get_error().replace("<non-verbose/>", "").replace("NoExtensionBias", "no text satisfies it")
    return " ".join(error.split())
