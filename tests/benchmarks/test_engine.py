"""Medians of steps."""

import pytest

from engine import Step, middle


def test_the_middle_of_steps_is_taken_part_by_part() -> None:
    steps = [Step({"forward": f, "sample": s}, {"linear": f / 2}) for f, s in ((3.0, 0.1), (1.0, 0.3), (2.0, 0.2))]
    assert middle(steps) == Step({"forward": 2.0, "sample": 0.2}, {"linear": 1.0})
    assert middle(steps).whole == pytest.approx(2.2)


def test_no_steps_are_told_apart_from_steps_of_no_time() -> None:
    with pytest.raises(ValueError, match="more new tokens"):
        middle([])
