"""Every instruction set that this machine has, one after the other."""

from collections.abc import Iterator

import pytest

from tgi.kernels.library import Library, library

LIBRARY = library()

native = pytest.mark.skipif(LIBRARY is None, reason="there is no native library here")


@pytest.fixture(params=LIBRARY.isas if LIBRARY else [None])
def kernels(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library, set to an instruction set."""
    assert LIBRARY is not None
    LIBRARY.choose(request.param)
    yield LIBRARY
    LIBRARY.choose(LIBRARY.isas[-1])
