"""A budget of reasoning: when it is used up, the tokens that close the reasoning come next. Knows tokens as bytes."""

from collections.abc import Callable

from tgi.core.messages import Thinking


class Thoughts:
    """Follows one reply, token by token, for as long as it reasons."""

    def __init__(
        self, thinking: Thinking, token_bytes: Callable[[int], bytes], encode: Callable[[str], list[int]]
    ) -> None:
        """``token_bytes``: the text of a token; ``encode``: the tokens of a text that goes on with another."""
        self._budget = thinking.budget
        self._opens, self._closes = thinking.opens.encode(), thinking.closes
        self._token_bytes = token_bytes
        self._encode = encode
        self._tail = b""
        """As much of the text as may still become a mark."""
        self._over = False

    def see(self, token: int) -> None:
        if self._over:
            return
        self._tail += self._token_bytes(token)
        if self._opens:
            text = self._tail.lstrip()
            if not text.startswith(self._opens):
                self._over = not self._opens.startswith(text)
                return
            self._tail, self._opens = text.removeprefix(self._opens), b""
        closes = self._closes.encode()
        self._over = closes in self._tail
        self._tail = self._tail[max(0, len(self._tail) - len(closes)) :]

    def forced(self, generated: int) -> list[int]:
        """What must come next, ``generated`` tokens having come: nothing, or what the closing mark still lacks."""
        if self._over or self._opens or generated < self._budget:
            return []
        self._over = True
        begun = range(len(self._closes) - 1, -1, -1)
        at = next(at for at in begun if self._tail.endswith(self._closes[:at].encode()))
        return self._encode(self._closes[at:])
