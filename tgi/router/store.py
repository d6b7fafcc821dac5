"""Responses that clients asked to keep: in memory, bounded, gone with the process. Knows bytes, not what they say."""

from collections import OrderedDict
from typing import NamedTuple

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20


class Stored(NamedTuple):
    response: bytes
    """JSON, as the client got it."""
    context: bytes
    """JSON: the items that it answers."""


class ResponseStore:
    """By id. What hasn't been asked for in the longest time makes room."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, id: str, stored: Stored) -> None:
        """``id`` is new. What is larger than the store isn't kept."""
        if _size(stored) > self._max_bytes:
            return
        self._stored[id] = stored
        self._bytes += _size(stored)
        while len(self._stored) > self._max_responses or self._bytes > self._max_bytes:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> Stored | None:
        if id in self._stored:
            self._stored.move_to_end(id)
        return self._stored.get(id)

    def delete(self, id: str) -> bool:
        """Whether it was there."""
        stored = self._stored.pop(id, None)
        if stored is not None:
            self._bytes -= _size(stored)
        return stored is not None


def _size(stored: Stored) -> int:
    return len(stored.response) + len(stored.context)
