"""From a generation's token ids to its text: detokenise, and find stop strings. Knows no HTTP.

The text of a generation is by definition what these classes yield, so that a stream and its whole always agree.
"""

from collections.abc import Sequence
from encodings.utf_8 import IncrementalDecoder
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
        self._detokenizer = Detokenizer(
            tokenizer,
            generation.token_ids,
            skip_special_tokens=generation.skip_special_tokens,
            shown=generation.shown,
            spelled=bool(generation.sampling.grammar),
        )
        self._stops = Stops(generation.stop, keep=generation.keep_stop) if generation.stop else None
        self._hidden_ends = frozenset(() if generation.keep_stop else generation.stop_token_ids)
        self._early = generation.sampling.min_tokens
        """How many tokens are yet to come before a stop string may be complete."""

    def push(self, token_id: int, *, last: bool) -> Growth:
        """``last``: the generation ends with this token. Not to be called after that, nor after a stop string.

        A token that the generation stops at is a stop string of its own: its text stays only with ``keep_stop``. No
        stop string ends an answer within its first ``min_tokens`` tokens, as no such token does.
        """
        may_end = self._early <= 0
        self._early -= 1
        hidden = last and token_id in self._hidden_ends
        said = "" if hidden else self._detokenizer.push(token_id)
        if self._stops is None:
            if last:
                said += self._detokenizer.flush()
            return Growth(said, said, None)
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

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        shown: frozenset[int] = frozenset(),
        spelled: bool = False,
    ) -> None:
        """``shown``: special tokens that aren't skipped. ``spelled``: by a grammar, to which every space counts."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - tokenizer.shown_ids - shown if skip_special_tokens else frozenset()
        self._utf8 = IncrementalDecoder(errors="replace")
        # A generation continues its prompt's text, so a leading space stays. Special tokens are no text, whether they
        # are shown or not: both views of one generation have the same spaces.
        self._first = not spelled and all(id in tokenizer.special_ids for id in prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; "" while a character is incomplete."""
        if not (self._first or self._utf8.buffer) and (text := self._tokenizer.text(token_id)) is not None:
            return text  # as decoded below, and ten times as fast
        if token_id in self._tokenizer.special_ids:
            return "" if token_id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token_id))
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
        # Of several that are complete at once the longest is asked first.
        self._stops = [_Stop(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._beginnings = frozenset(stop[0] for stop in stops)
        self._keep = keep
        self._start = ""
        """The longest end of the text so far that a stop string may begin with; with ``keep`` it has been emitted."""

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """The text that is now safe to emit, and the stop string that ended it, if any. Not to be called after that.

        Without ``may_end`` stop strings that are complete in this text don't count; those that begin in it do.
        """
        if not self._start and self._beginnings.isdisjoint(text):
            return text, None
        seen, emitted = self._start + text, len(self._start) if self._keep else 0
        for end, char in enumerate(text, len(self._start) + 1):
            complete = [stop.text for stop in self._stops if stop.follow(char)]
            if complete and may_end:
                self._start = ""
                return seen[emitted : end if self._keep else end - len(complete[0])], complete[0]
        begin = len(seen) - max(stop.length for stop in self._stops)
        self._start = seen[begin:]
        return seen[emitted : None if self._keep else begin], None

    def flush(self) -> str:
        """The text still held when the generation ends without a stop string."""
        held, self._start = self._start, ""
        return "" if self._keep else held


class _Stop:
    """How much of one stop string the text ends with; in constant time for a character, whatever the two are.

    D. E. Knuth, J. H. Morris, V. R. Pratt: Fast pattern matching in strings (1977).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        """The longest part of ``text`` from its beginning, but not all of it, that the text so far ends with."""
        self._shorter: list[int] = []
        """Length - 1 → the next shorter one that the text so far ends with, too; as far as it was needed yet."""

    def follow(self, char: str) -> bool:
        """Whether the whole string is complete with this character."""
        self.length = self._longer(self.length, char)
        if self.length > len(self._shorter):
            self._shorter.append(self._longer(self._shorter[-1], char) if self._shorter else 0)
        if self.length < len(self.text):
            return False
        self.length = self._shorter[-1]
        return True

    def _longer(self, length: int, char: str) -> int:
        while length and self.text[length] != char:
            length = self._shorter[length - 1]
        return length + (self.text[length] == char)
