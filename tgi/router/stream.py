"""From a generation's token ids to its text: detokenise, and find stop strings. Knows no HTTP.

The text of a generation is by definition what these classes yield, so that a stream and its whole always agree.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from tgi.router.tokenizer import Tokenizer
from tgi.router.validate import Generation


class Growth(NamedTuple):
    """What one token does to the answer."""

    token: str
    """What the token says behind those before it; characters that it only begins come with the token that ends them."""
    text: str
    """What the answer grows by: less, while a stop string may be under way, or more, when it turns out to be none."""
    stop: str | None
    """The stop string that has ended the answer."""


class Transcript:
    """The text of one generation, token by token."""

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self._generation = generation
        self._detokenizer = Detokenizer(
            tokenizer, generation.token_ids, skip_special_tokens=generation.skip_special_tokens
        )
        self._stops = Stops(generation.stop, keep=generation.keep_stop)
        self._tokens = 0

    def push(self, token_id: int, *, last: bool) -> Growth:
        """``last``: the generation ends with this token. Not to be called after that, nor after a stop string.

        A token that the generation stops at is a stop string of its own: its text stays only with ``keep_stop``. No
        stop string ends an answer within its first ``min_tokens`` tokens, as no such token does.
        """
        generation = self._generation
        self._tokens += 1
        hidden = last and not generation.keep_stop and token_id in generation.stop_token_ids
        said = "" if hidden else self._detokenizer.push(token_id)
        may_end = self._tokens > generation.sampling.min_tokens
        text, stop = self._stops.push(said, may_end=may_end)
        if last and stop is None:
            rest = self._detokenizer.flush()
            more, stop = self._stops.push(rest, may_end=may_end)
            said += rest
            text += more if stop is not None else more + self._stops.flush()
        return Growth(said, text, stop)


class Detokenizer:
    """Turns one generation's tokens into text, each as soon as it is certain. Constant time a token.

    The bytes of each token go through an incremental UTF-8 decoder. So it yields what decoding all tokens at once
    yields, but for one thing: SentencePiece's byte fallback gives up a whole run of bytes for one that is wrong, and
    here the whole characters of the run survive.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # A generation continues its prompt's text, so a leading space stays. Special tokens are no text, whether they
        # are shown or not: both views of one generation have the same spaces.
        self._first = all(id in tokenizer.special_ids for id in prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; "" while a character is incomplete."""
        if token_id in self._tokenizer.special_ids:
            return "" if self._skip else self._utf8.decode(self._tokenizer.token_bytes(token_id))
        first, self._first = self._first, False
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, first=first))

    def flush(self) -> str:
        """What an end within a character leaves: U+FFFD, or "" where nothing is held."""
        return self._utf8.decode(b"", final=True)


class Stops:
    """Ends a text at the first stop string, wherever in it and in whichever pieces that arrives.

    The stop string that is complete first wins, of several complete at the same character the longest: the outcome
    depends on the text alone, never on how it was cut, and no further token is needed to decide it.

    ``keep``: the stop string stays at the text's end. Nothing is then ever held back and each token's event carries
    its own text, cut where the stop string ends. Without it the text that might be the beginning of a stop string is
    held back, and comes out with the token that shows that it isn't one, or from ``flush`` if there is no such token;
    the events of the tokens between have an empty text.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        if not all(stops):
            raise ValueError("a stop string can't be empty")
        self._stops = tuple(stops)
        self._keep = keep
        self._start = ""
        """The longest end of the text so far that a stop string may begin with; with ``keep`` it has been emitted."""

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """The text that is now safe to emit, and the stop string that ended it, if any. Not to be called after that.

        Without ``may_end`` stop strings that are complete in this text don't count; those that begin in it do.
        """
        if not self._stops:
            return text, None
        old, seen = len(self._start), self._start + text
        emitted = old if self._keep else 0
        found = ((seen.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stops) if may_end else ()
        matches = [(at + len(stop), -len(stop), stop) for at, stop in found if at >= 0]
        if matches:
            end, _, stop = min(matches)
            self._start = ""
            return seen[emitted : end if self._keep else end - len(stop)], stop
        self._start = self._open_end(seen)
        return seen[emitted : None if self._keep else len(seen) - len(self._start)], None

    def flush(self) -> str:
        """The text still held when the generation ends without a stop string."""
        held, self._start = self._start, ""
        return "" if self._keep else held

    def _open_end(self, text: str) -> str:
        begin = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                begin = min(begin, at)
        return text[begin:]
