"""A recorded program does what the same calls do one by one, in memory that is used again and again."""

import pytest
import torch

from tests.kernels.conftest import native
from tgi.kernels.library import Library
from tgi.kernels.linear import linear
from tgi.kernels.ops import Finish
from tgi.kernels.panels import Panels, pack
from tgi.kernels.program import NotRecordable, Program, empty
from tgi.kernels.rows import rms_norm

pytestmark = native


def layers(count: int) -> list[tuple[Panels, Panels, torch.Tensor]]:
    torch.manual_seed(0)
    return [(pack(torch.randn(96, 64) / 8), pack(torch.randn(64, 48) / 8), torch.randn(64)) for _ in range(count)]


def forward(kernels: Library, x: torch.Tensor, weights: list[tuple[Panels, Panels, torch.Tensor]]) -> torch.Tensor:
    for up, down, norm in weights:
        hidden = linear(kernels, up, rms_norm(kernels, x, norm, 1e-6), finish=Finish.GATE)
        linear(kernels, down, hidden, out=x, finish=Finish.ADD)
    return rms_norm(kernels, x, norm, 1e-6)


@torch.inference_mode()
def test_it_does_what_was_recorded_for_any_number_of_rows(kernels: Library) -> None:
    weights = layers(5)
    x = torch.zeros(40, 64)
    program = Program(kernels, 40)
    result = program.record(lambda: forward(kernels, x, weights))
    for rows in (40, 1, 7, 40):
        fresh = torch.randn(rows, 64)
        x[:rows] = fresh
        program.run(rows)
        assert torch.equal(result[:rows], forward(kernels, fresh.clone(), weights))


@torch.inference_mode()
def test_memory_is_lent_again(kernels: Library) -> None:
    program = Program(kernels, 10)
    places = set()

    def record() -> torch.Tensor:
        for _ in range(5):
            first = empty(10, 100)
            part = first[:, 16:]
            del first  # the view still holds its memory
            second = empty(10, 100)
            assert second.data_ptr() != part.data_ptr() - 64
            places.update((part.data_ptr() - 64, second.data_ptr()))
        return second

    program.record(record)
    assert len(places) <= 3, "two are held at a time, and while the second is made anew, a third"


def test_other_work_can_not_be_recorded(kernels: Library) -> None:
    ones, rows = torch.ones(4, 4), torch.tensor([0, 2])
    with pytest.raises(NotRecordable, match="add"):
        Program(kernels, 4).record(lambda: ones + 1)
    for copies in (lambda: ones[rows], lambda: ones[:, [1, 2]], lambda: ones.flatten()):
        with pytest.raises(NotRecordable):
            Program(kernels, 4).record(copies)
    assert Program(kernels, 4).record(lambda: ones[1:, None]).shape == (3, 1, 4)
    assert (torch.ones(2) + 1).sum() == 4, "recording has ended"
    assert torch.equal(rms_norm(kernels, torch.ones(2, 4), torch.ones(4), 0.0), torch.ones(2, 4))
