"""llguidance as the router's trials and the engine both use it: one tokenizer, one set of bounds, so that what the one
accepted the other can run. Imported only where a grammar has arrived; knows no request.
"""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""llguidance's own bounds, but for the memory of one grammar: a state has 1 to 2 kB."""


class GrammarError(Exception):
    """llguidance can't do this; the text says why, in one line."""


def load_tokenizer(path: Path, vocab_size: int | None, end_ids: Sequence[int]) -> LLTokenizer:
    """Read tokenizer.json. ``vocab_size``: the width of the model's logits; None for the tokenizer's own size.

    ``end_ids``: the tokens that a grammar allows where it may end. Without any, llguidance guesses one.
    """
    text = path.read_text(encoding="utf-8")
    ends = [id for id in end_ids if vocab_size is None or 0 <= id < vocab_size] or None
    try:
        if vocab_size is None:
            return LLTokenizer(text, eos_token=ends)
        try:
            return LLTokenizer(text, n_vocab=vocab_size, eos_token=ends)
        except ValueError:  # some models have fewer logits than their tokenizer has tokens
            return LLTokenizer(text, eos_token=ends)
    except ValueError as error:
        raise GrammarError(f"this model's tokenizer can't be used with grammars: {error}") from None


def start(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher before the first token. llguidance's matchers never raise: they keep their error, see ``check``."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
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
