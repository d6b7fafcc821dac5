import pytest

from tgi.engine.blocks import BlockHasher, BlockPool


def hashes(tokens: list[int], salt: bytes = b"", secret: bytes = b"s") -> list[bytes]:
    out: list[bytes] = []
    BlockHasher(secret).extend(out, tokens, salt)
    return out


def test_hashes_are_chained_keyed_and_salted():
    tokens = list(range(48))
    first = hashes(tokens)
    assert [len(digest) for digest in first] == [32, 32, 32]
    changed = hashes([99, *tokens[1:]])
    assert not set(first) & set(changed), "a change at the start changes every hash behind it"
    assert hashes([*tokens[:40], 99, *tokens[41:]])[:2] == first[:2]
    assert not set(first) & set(hashes(tokens, salt=b"x"))
    assert not set(first) & set(hashes(tokens, secret=b"t"))


def test_only_full_blocks_are_hashed_and_extending_is_the_same_as_hashing_at_once():
    hasher = BlockHasher(b"s")
    grown: list[bytes] = []
    for end in range(0, 50, 7):
        hasher.extend(grown, list(range(end)), b"")
    assert grown == hashes(list(range(49)))
    assert len(grown) == 3


def test_content_survives_release_until_it_is_evicted_least_recently_used_first():
    pool = BlockPool(4)
    digests = hashes(list(range(64)))
    old, new = pool.take(2), pool.take(2)
    for block, digest in zip(old + new, digests, strict=True):
        pool.publish(block, digest)
    pool.release(old)
    pool.release(new)
    assert pool.find(digests) == old + new
    assert pool.take(1) == old[1:], "the end of the older prefix goes first"
    assert pool.reach(digests) == 1
    assert pool.find(digests[:1]) == old[:1]
    pool.check_integrity([old[1:]])


def test_blocks_without_content_are_taken_before_cached_ones():
    pool = BlockPool(3)
    cached = pool.take(1)
    pool.publish(cached[0], hashes(list(range(16)))[0])
    pool.release(cached)
    empty = pool.take(2)
    pool.release(empty)
    assert cached[0] not in pool.take(2)


def test_a_claimed_block_is_shared_and_can_not_be_evicted():
    pool = BlockPool(2)
    digests = hashes(list(range(16)))
    held = pool.take(1)
    pool.publish(held[0], digests[0])
    pool.claim(pool.find(digests))
    pool.release(held)
    assert pool.free == 1
    assert pool.free_without(held) == 1
    pool.check_integrity([held])


def test_of_two_equal_blocks_the_first_stays_known():
    pool = BlockPool(2)
    (digest,) = hashes(list(range(16)))
    one, two = pool.take(2)
    pool.publish(one, digest)
    pool.publish(two, digest)
    assert pool.find([digest]) == [one]
    pool.check_integrity([[one, two]])


def test_behind_a_window_the_end_of_a_prefix_is_enough():
    pool = BlockPool(5, window=33)
    digests = hashes(list(range(16 * 5)))
    assert [pool.first(position) for position in (0, 32, 47, 48, 80)] == [0, 0, 0, 1, 3]
    blocks = pool.take(5)
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks[:2])
    pool.take(2)
    assert pool.reach(digests[:2]) == 0
    assert pool.reach(digests[:4]) == 4, "block 2 and 3 are all that the token behind them sees"
    assert pool.find(digests[2:4]) == blocks[2:4]
    assert pool.reach([*digests[:4], b"other"]) == 4
    assert pool.reach(digests[:3]) == 0, "token 48 sees block 1"


def test_the_check_finds_a_leak():
    pool = BlockPool(2)
    table = pool.take(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([table * 2])
