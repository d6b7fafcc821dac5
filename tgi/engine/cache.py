"""Which blocks a request holds: a table for each kind of layer, told apart by how far back a token sees."""

import time
from array import array
from collections.abc import Iterable, Sequence

from tgi.core.config import BLOCK_SIZE, KVPool
from tgi.engine.blocks import BlockHasher, BlockPool
from tgi.engine.request import Request


class BlockCache:
    """One pool of blocks for each kind of layer; the first sees farthest.

    Of a prefix a layer with a window needs the end only. So a request takes blocks for what it computes next, and gives
    up those that nobody behind it sees; they stay findable until they are needed.
    """

    def __init__(
        self, pools: Sequence[KVPool], step_tokens: int, *, prefix_caching: bool = True, secret: bytes | None = None
    ) -> None:
        """``step_tokens``: the most of a request that can be under way."""
        self.sizes = list(pools)
        self._step_tokens = step_tokens
        self._prefix_caching = prefix_caching
        self._hasher = BlockHasher(secret)
        self.clear()

    def clear(self) -> None:
        """Start empty; nobody may hold anything."""
        self.pools = [BlockPool(pool.blocks, pool.window) for pool in self.sizes]

    @property
    def held_tokens(self) -> int:
        """Of the layers that see farthest; shared blocks count once."""
        return (self.pools[0].size - self.pools[0].free) * BLOCK_SIZE

    def declines(self, tokens: int) -> str | None:
        """Why a request that grows to so many tokens could never run; None if it can."""
        for pool in self.pools:
            need = _blocks_for(tokens)
            if pool.window is not None:
                need = min(need, _blocks_for(pool.window + self._step_tokens) + 1)
            if need > pool.size:
                return f"{tokens} tokens don't fit into the cache of {pool.size * BLOCK_SIZE} tokens"
        return None

    def admit(self, request: Request, budget: int) -> bool:
        """Give a waiting request its cached prefix and the blocks of all its tokens, or where there is a window of the
        next ``budget`` ones; False if there are too few."""
        hashes: list[bytes] = []
        if self._prefix_caching and request.submit.pooling != "mean":  # which is made of every token's hidden state
            self._hasher.extend(request.hashes, request.tokens, request.submit.cache_salt)
            # What is to be told needs the logits before it, and at least one token must be computed.
            hashes = request.hashes[: (min(request.told, request.goal) - 1) // BLOCK_SIZE]
        count = self._reach(hashes)
        computed, end = count * BLOCK_SIZE, len(request.tokens)
        firsts = [pool.first(computed) for pool in self.pools]
        found = [pool.find(hashes[first:count]) for pool, first in zip(self.pools, firsts, strict=True)]
        needs = [
            _blocks_for(end if pool.window is None else min(end, computed + budget)) - count for pool in self.pools
        ]
        for pool, blocks, need in zip(self.pools, found, needs, strict=True):
            if need > pool.free_without(blocks):
                return False
        for pool, blocks in zip(self.pools, found, strict=True):
            pool.claim(blocks)
        request.blocks = [
            array("i", [0] * first + blocks + pool.take(need))
            for pool, first, blocks, need in zip(self.pools, firsts, found, needs, strict=True)
        ]
        request.firsts = firsts
        request.published = count
        request.computed = request.planned = computed
        if not request.started:
            request.started = time.monotonic()
            request.cached = min(computed, request.submit.prompt_length)
        return True

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make the request's blocks cover ``tokens``; False if a pool is short of blocks."""
        for at, (pool, blocks) in enumerate(zip(self.pools, request.blocks, strict=True)):
            if pool.window is not None and (first := pool.first(request.computed)) > request.firsts[at]:
                pool.release(blocks[request.firsts[at] : first])
                request.firsts[at] = first
            need = _blocks_for(tokens) - len(blocks)
            if need > pool.free:
                return False
            if need > 0:
                blocks.extend(pool.take(need))
        return True

    def publish(self, request: Request) -> None:
        """Make the blocks that this step has filled findable."""
        full = request.computed // BLOCK_SIZE
        if self._prefix_caching and full > request.published:
            self._hasher.extend(request.hashes, request.tokens, request.submit.cache_salt)
            for pool, blocks in zip(self.pools, request.blocks, strict=True):
                for at in range(request.published, full):
                    pool.publish(blocks[at], request.hashes[at])
            request.published = full

    def release(self, request: Request) -> None:
        """Take all from a request."""
        for pool, blocks, first in zip(self.pools, request.blocks, request.firsts, strict=False):
            pool.release(blocks[first:])
        request.blocks, request.firsts = [], []
        request.scratch.clear()  # it may be as large as the blocks
        request.published = request.computed = request.planned = 0
        request.released += 1

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError if blocks leak or are held twice."""
        holders = [request for request in requests if request.blocks]
        for at, pool in enumerate(self.pools):
            pool.check_integrity([request.blocks[at][request.firsts[at] :] for request in holders])

    def _reach(self, hashes: Sequence[bytes]) -> int:
        """Blocks of the longest prefix behind which all kinds of layers can go on."""
        count = len(hashes)
        while (least := min(pool.reach(hashes[:count]) for pool in self.pools)) < count:
            count = least
        return count


def _blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
