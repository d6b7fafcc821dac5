"""Numbers that routers share: a row each, what outlives its writer, and the bound on what all do together."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.router.serving import LIMITS
from tgi.core.board import Board, clear
from tgi.core.errors import OVERLOADED, RequestError
from tgi.core.messages import StepStats
from tgi.router.metrics import Metrics
from tgi.router.pipeline import Permits

COUNT = 3


@pytest.fixture
def memory() -> Iterator[int]:
    with os.fdopen(os.memfd_create("board"), "wb") as file:
        yield file.fileno()


def boards(memory: int) -> list[Board]:
    return [Board(index, COUNT, memory) for index in range(COUNT)]


def value(metrics: Metrics, series: str, queued: int = 0) -> float:
    lines = [line.rpartition(" ") for line in metrics.expose(queued).decode().splitlines()]
    return next(float(value) for name, _, value in lines if name == series)


def test_any_router_tells_the_sums(memory: int) -> None:
    every = [Metrics(LIMITS, board) for board in boards(memory)]
    for number, metrics in enumerate(every, 1):
        metrics.arrived(number)
        metrics.validated(10 * number, 20)
        metrics.waited(0.5 * number, 2)
    every[1].stepped(StepStats(decode_rows=4, running=4, batch_tokens=64))
    for metrics in every:
        assert value(metrics, "tgi_request_count") == 6
        assert value(metrics, "tgi_request_input_length_sum") == 60
        assert value(metrics, 'tgi_request_input_length_bucket{le="20"}') == 2
        assert value(metrics, "tgi_request_inter_token_duration_sum") == 6.0
        assert value(metrics, "tgi_request_inter_token_duration_count") == 6
        assert value(metrics, "tgi_batch_current_size") == 4
        assert value(metrics, "tgi_batch_max_total_tokens") == LIMITS.max_batch_total_tokens
    every[0].stepped(StepStats(decode_rows=1, running=1))  # the engine tells another one now
    assert value(every[2], "tgi_batch_current_size") == 1
    assert value(every[2], 'tgi_batch_inference_count{method="decode"}') == 2


def test_what_all_are_told_counts_once(memory: int) -> None:
    every = [Metrics(LIMITS, board) for board in boards(memory)]
    for epoch in (10, 20):
        for metrics in every:
            metrics.broke(epoch, prefills=False)
        for metrics in every:
            metrics.restarted(epoch + 10)
    assert value(every[0], "tgi_engine_restarts") == 2
    assert value(every[0], 'tgi_batch_inference_failure{method="decode"}') == 2


def test_the_next_router_in_its_place_counts_on(memory: int) -> None:
    first, second, _ = boards(memory)
    metrics = Metrics(LIMITS, second)
    metrics.arrived(5)
    second.queued.own[0] = second.connections.own[0] = 3
    clear(memory, second.index)
    assert first.queued.sums() == first.connections.sums() == [0]
    again = Metrics(LIMITS, Board(second.index, COUNT, memory))
    again.arrived()
    assert value(Metrics(LIMITS, first), "tgi_request_count") == 6


def test_permits_are_of_all_routers_and_end_with_theirs(memory: int) -> None:
    first, second, third = (Permits(4, board) for board in boards(memory))
    with first.take(2), second.take():
        with pytest.raises(RequestError) as caught, third.take(2):
            pass
        assert caught.value.kind is OVERLOADED
        with third.take():
            pass
        clear(memory, 0)
        with third.take(3), pytest.raises(RequestError), second.take():
            pass


def test_routers_never_take_more_permits_than_there_are(memory: int) -> None:
    """Processes race for them."""
    children = []
    for index in range(COUNT):
        if not (child := os.fork()):
            board = Board(index, COUNT, memory)
            permits, most, end = Permits(2, board), 0, time.monotonic() + 0.5
            while time.monotonic() < end:
                try:
                    with permits.take():
                        most = max(most, board.generations.sums()[0])
                except RequestError:
                    pass
            os._exit(most)
        children.append(child)
    assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} == {2}
