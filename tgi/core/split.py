"""Who of several ranks has which part of a model. Plain arithmetic: the launcher plans by it, layers slice by it."""

_GRAIN = 128
"""Numbers that lie in one block of a quantized matrix, at most: a border between ranks cuts none where it can."""


def shard(size: int, rank: int, ranks: int) -> range:
    """A rank's run of an axis of ``size``. Runs are as even as whole blocks allow."""
    grain = _GRAIN
    while grain > 1 and (size % grain or size // grain < ranks):
        grain //= 2
    blocks = _run(size // grain, rank, ranks)
    return range(blocks.start * grain, blocks.stop * grain)


def heads(queries: int, keys: int, rank: int, ranks: int) -> tuple[range, list[int]]:
    """A rank's query heads, and the kv heads that they share in equal numbers.

    With as many kv heads as ranks or more, each rank has its own and all queries of theirs. Else queries are divided
    evenly, and ranks have copies of their kv heads; one for each query where they would share unequally. ValueError if
    a rank would have none.
    """
    sharing = queries // keys
    if queries < ranks:
        raise ValueError(f"{ranks} ranks can't share {queries} heads")
    if keys >= ranks:
        own = _run(keys, rank, ranks)
        return range(own.start * sharing, own.stop * sharing), [*own]
    run = _run(queries, rank, ranks)
    theirs = [query // sharing for query in run]
    distinct = [*dict.fromkeys(theirs)]
    equal = all(theirs.count(key) * len(distinct) == len(theirs) for key in distinct)
    return run, distinct if equal else theirs


def _run(count: int, rank: int, ranks: int) -> range:
    return range(count * rank // ranks, count * (rank + 1) // ranks)
