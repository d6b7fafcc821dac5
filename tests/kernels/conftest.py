"""Every instruction set that this machine has, one after the other; and what kernels for GPUs take."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tgi.kernels.library import Library, library

if TYPE_CHECKING:
    from tests.kernels.compiled import Figures

LIBRARY = library()

native = pytest.mark.skipif(LIBRARY is None, reason="there is no native library here")


@pytest.fixture(params=LIBRARY.isas if LIBRARY else [None])
def kernels(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library, set to an instruction set."""
    assert LIBRARY is not None
    LIBRARY.choose(request.param)
    yield LIBRARY
    LIBRARY.choose(LIBRARY.isas[-1])


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest) -> "Figures":
    from tests.kernels.compiled import Figures  # wants Triton

    return Figures(Path(__file__).with_name("resources.json"), record=request.config.getoption("--record"))
