"""What the sampler's tests share."""

import pytest

from tgi.kernels.library import library
from tgi.runtime.sampler import Sampler


@pytest.fixture(params=["torch", "kernel"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "torch":
        return Sampler(None)
    if library() is None:
        pytest.skip("no kernels here")
    return Sampler(library())
