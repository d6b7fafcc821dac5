"""The pool of KV cache pages and the index of what they hold. Knows ids, not tensors and not requests.

A full block is addressed by a keyed 256-bit hash chained over everything before it, so equal hashes mean equal
prefixes and an outsider can neither guess nor collide them. Ownership:

    free (evictable, least recently used first) ── take/claim ──▶ held by 1..n requests ── release ──▶ free
    a published block keeps its hash while it is free, until it is taken for other content
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from tgi.core.config import BLOCK_SIZE


class BlockHasher:
    """Chained hashes of full blocks. One secret per engine: hashes mean nothing outside the process."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = os.urandom(32) if secret is None else secret

    def extend(self, hashes: list[bytes], tokens: Sequence[int], salt: bytes) -> None:
        """Append the hash of every full block of ``tokens`` that ``hashes`` doesn't have yet."""
        for start in range(len(hashes) * BLOCK_SIZE, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            parent = hashes[-1] if hashes else self._digest(salt)
            hashes.append(self._digest(parent + array("I", tokens[start : start + BLOCK_SIZE]).tobytes()))

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=32, key=self._secret).digest()


class BlockPool:
    """Reference counts, hashes and eviction order of ``size`` blocks."""

    def __init__(self, size: int, window: int | None = None) -> None:
        """``window``: a token sees itself and the ``window - 1`` tokens before it; None: all."""
        self.size = size
        self.window = window
        self._references = [0] * size
        self._hashes: list[bytes | None] = [None] * size
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))

    @property
    def free(self) -> int:
        """Blocks that nobody holds, with or without content."""
        return len(self._free)

    def first(self, position: int) -> int:
        """Place of the earliest block that the token at ``position`` sees. Those behind it see no earlier one."""
        return 0 if self.window is None else max(position - self.window + 1, 0) // BLOCK_SIZE

    def reach(self, hashes: Sequence[bytes]) -> int:
        """Blocks of the longest prefix of ``hashes`` behind which a request can go on: what is seen there is known."""
        end = at = len(hashes)
        while at > self.first(end * BLOCK_SIZE):
            at -= 1
            if hashes[at] not in self._by_hash:
                end = at
        return end

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Known blocks; they are not claimed yet."""
        return [self._by_hash[digest] for digest in hashes]

    def free_without(self, blocks: Sequence[int]) -> int:
        """How many blocks would be free if ``blocks`` were claimed."""
        return len(self._free) - sum(self._references[block] == 0 for block in blocks)

    def claim(self, blocks: Sequence[int]) -> None:
        """Share blocks found by ``find``."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def take(self, count: int) -> list[int]:
        """``count`` blocks for new content, evicting the least recently used. The caller has checked ``free``."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if (digest := self._hashes[block]) is not None:
                del self._by_hash[digest]
                self._hashes[block] = None
            self._references[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable. The first of two blocks with equal content stays the known one."""
        if self._hashes[block] is None and digest not in self._by_hash:
            self._hashes[block] = digest
            self._by_hash[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference each. Reused first: blocks without content, then the ends of prefixes."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless references, free list and hashes agree with the block tables of all requests."""
        counted = [0] * self.size
        for table in tables:
            assert len(set(table)) == len(table), "a request holds a block twice"
            for block in table:
                counted[block] += 1
        assert counted == self._references, "reference counts differ from the requests' block tables"
        assert set(self._free) == {b for b, count in enumerate(counted) if count == 0}, "free list is wrong"
        assert self._by_hash == {h: b for b, h in enumerate(self._hashes) if h is not None}, "hash index is wrong"
