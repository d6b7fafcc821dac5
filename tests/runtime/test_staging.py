"""Numbers on their way to the device lie where others of the same sizes did."""

import pytest
import torch

from tests.parity.conftest import DEVICES
from tgi.runtime.staging import Staging


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_sizes_are_in_the_same_places(device: str) -> None:
    staging = Staging(torch.device(device), 64)
    before = staging.put([[1, 2, 3], [4] * 5, [6, 7]])
    assert [part.tolist() for part in before[:2]] == [[1, 2, 3], [4] * 5]
    assert before[2][:2].tolist() == [6, 7]
    after = staging.put([[9, 8, 7], [0] * 5, range(20)])
    assert [part.data_ptr() for part in after] == [part.data_ptr() for part in before]
    assert before[0].tolist() == [9, 8, 7] and before[2][:20].tolist() == [*range(20)]
    assert all(part.data_ptr() % 16 == 0 for part in after)


def test_it_grows_for_what_has_no_room() -> None:
    staging = Staging(torch.device("cpu"), 16)
    small = staging.put([[1], [2]])
    assert staging.holds([[1], [2] * 12]) and not staging.holds([[1], [2] * 13])
    large = staging.put([[3] * 20, [4] * 20])
    assert large[0].tolist() == [3] * 20 and large[1][:20].tolist() == [4] * 20
    assert small[0].tolist() == [1], "what reads the old place sees no news"
