import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fake_engine import FakeEngine
from tgi.core.board import Board
from tgi.core.errors import CRASH, GENERATION, UNAVAILABLE, RequestError
from tgi.core.messages import (
    FRAME,
    MAX_FRAME,
    Delta,
    Hello,
    Pong,
    PromptToken,
    Sampling,
    Step,
    StepStats,
    Submit,
    Token,
    frame,
)
from tgi.router.client import EngineClient, Ticket, _take_frames

Scenario = Callable[[EngineClient, FakeEngine], Awaitable[None]]


class Observed:
    """What a client told of its engine."""

    def __init__(self) -> None:
        self.stats: list[StepStats] = []
        self.gaps: list[float] = []
        self.grown = Counter[int]()
        self.breaks: list[bool] = []
        self.restarts = 0

    def stepped(self, stats: StepStats) -> None:
        self.stats.append(stats)

    def spoke(self, tokens: int, requests: int) -> None:
        self.grown[tokens] += requests

    def waited(self, seconds: float, requests: int) -> None:
        self.gaps += [seconds] * requests

    def broke(self, epoch: int, *, prefills: bool) -> None:
        self.breaks.append(prefills)

    def restarted(self, epoch: int) -> None:
        self.restarts += 1


def play(folder: Path, scenario: Scenario, **options: Any) -> tuple[FakeEngine, Observed]:
    """Run a scenario against a connected client and a fake engine made with ``options``."""
    observed = Observed()

    async def main() -> None:
        client = EngineClient(folder / "engine.sock", observed, longest_step=0)
        running = asyncio.create_task(client.run())
        assert await client.admits(10)
        try:
            await asyncio.wait_for(scenario(client, engine), 20)
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    with FakeEngine(folder / "engine.sock", **options) as engine:
        asyncio.run(main())
    return engine, observed


def submit(client: EngineClient, ids: list[int], count: int = 5, **options: Any) -> Ticket:
    options = {"stop_token_ids": [], "sampling": Sampling(), **options}
    return client.submit(token_ids=ids, max_new_tokens=count, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def collect(ticket: Ticket) -> list[Delta]:
    deltas: list[Delta] = []
    await ticket.follow(deltas.append)
    return deltas


def error_of(caught: pytest.ExceptionInfo[RequestError]) -> str:
    assert caught.value.kind is GENERATION
    return caught.value.detail


def test_a_request_runs_to_its_end(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        before = time.monotonic()
        ticket = submit(client, [7, 8, 9], sampling=Sampling(top_n_tokens=2), prompt_logprobs=True, cache_salt=b"x")
        assert client.open == client.queued == 1
        deltas = await collect(ticket)
        assert [token.id for delta in deltas for token in delta.tokens] == ticket.output_ids == [7, 8, 9, 7, 8]
        assert [delta.index for delta in deltas] == [0, 1, 2, 3, 4]
        assert [delta.finish for delta in deltas] == [None] * 4 + ["length"]
        assert [token.logprob for token in deltas[0].prompt] == [-1.0, -2.0]
        assert deltas[0].tokens[0].top == [(7, -1.0), (8, -2.0)]
        assert before <= ticket.submitted <= ticket.started <= ticket.first_token <= ticket.finished
        assert client.open == client.queued == 0
        ticket.cancel()

    engine, observed = play(tmp_path, scenario)
    (sent,) = engine.submits
    assert sent == Submit(
        id=sent.id,
        token_ids=[7, 8, 9],
        prompt_length=3,
        max_new_tokens=5,
        stop_token_ids=[],
        sampling=Sampling(top_n_tokens=2),
        arrived=sent.arrived,
        prompt_logprobs=True,
        cache_salt=b"x",
    )
    assert engine.cancels == []
    assert len(observed.stats) == 5
    assert len(observed.gaps) == 4 and min(observed.gaps) > 0
    assert observed.grown == {1: 5}
    assert observed.breaks == []


def test_many_requests_at_once(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        tickets = [submit(client, [n, n + 1], 10) for n in range(50)]
        for deltas in await asyncio.gather(*map(collect, tickets)):
            assert deltas[-1].finish == "length"
        assert [ticket.output_ids for ticket in tickets] == [[n, n + 1] * 5 for n in range(50)]

    play(tmp_path, scenario, per_step=3)


def test_the_end_token_ends(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        ticket = submit(client, [5, 6, 2, 5], 9, stop_token_ids=[2])
        deltas = await collect(ticket)
        assert deltas[-1].finish == "eos_token"
        assert ticket.output_ids == [5, 6, 2]

    play(tmp_path, scenario)


def test_queued_until_the_engine_begins(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [1]), submit(client, [2])]
        await until(lambda: len(engine.submits) == 2)
        assert (client.queued, client.open) == (2, 2)
        engine.resume()
        await until(lambda: all(ticket.output_ids for ticket in tickets))
        assert client.queued == 0
        await asyncio.gather(*map(collect, tickets))
        assert client.open == 0

    play(tmp_path, scenario)


def test_who_follows_late_misses_nothing(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        late, quick = submit(client, [1], 2000), submit(client, [2], 2000)
        await collect(quick)
        assert late.output_ids == [1] * 2000  # the truth doesn't wait for its follower
        assert len(await collect(late)) == 2000

    play(tmp_path, scenario)


# Cancelling


def test_leaving_the_block_cancels(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        with submit(client, [1], 10**6) as ticket:
            await until(lambda: len(ticket.output_ids) >= 3)
        known = len(ticket.output_ids)
        assert client.open == 0
        await until(lambda: engine.cancels == [ticket.submit.id])
        assert await collect(submit(client, [2]))  # whatever was on its way has arrived before this
        assert len(ticket.output_ids) == known
        assert await collect(ticket) == []
        ticket.cancel()

    engine, _ = play(tmp_path, scenario)
    assert len(engine.cancels) == 1


def test_a_follower_can_cancel(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        ticket = submit(client, [1], 10**6)
        heard: list[Delta] = []

        def hear(delta: Delta) -> None:
            heard.append(delta)
            if len(heard) == 3:
                ticket.cancel()

        await ticket.follow(hear)
        assert len(heard) == len(ticket.output_ids) == 3
        await until(lambda: engine.cancels == [ticket.submit.id])

    play(tmp_path, scenario)


@pytest.mark.parametrize("late", [False, True])
def test_a_follower_that_fails_ends_its_own_request(tmp_path: Path, late: bool) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        bad, good = submit(client, [1], 10**6), submit(client, [2], 300)
        if late:
            await until(lambda: len(bad.output_ids) > 0)

        def hear(delta: Delta) -> None:
            raise ValueError("can't bear it")

        with pytest.raises(ValueError, match="bear"), bad:
            await bad.follow(hear)
        await until(lambda: engine.cancels == [bad.submit.id])
        assert len(await collect(good)) == 300
        assert client.open == 0

    play(tmp_path, scenario)


def test_leaving_the_block_after_the_end_cancels_nothing(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        with submit(client, [1]) as ticket:
            await collect(ticket)
        assert await client.healthy()

    engine, _ = play(tmp_path, scenario)
    assert engine.cancels == []


def test_cancel_wakes_a_waiting_reader(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        ticket = submit(client, [1])
        reading = asyncio.create_task(collect(ticket))
        await until(lambda: len(engine.submits) == 1)
        ticket.cancel()
        assert await reading == []

    play(tmp_path, scenario)


# Faults and losses


def test_a_fault_ends_one_request(tmp_path: Path) -> None:
    def reply(submit: Submit) -> list[int] | str:
        return "no such adapter" if submit.token_ids == [0] else [3, 4]

    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        bad, good = submit(client, [0]), submit(client, [1])
        with pytest.raises(RequestError) as caught:
            await collect(bad)
        assert error_of(caught) == "Server error: no such adapter"
        assert caught.value.message == "Request failed during generation: Server error: no such adapter"
        await collect(good)
        assert good.output_ids == [3, 4]
        assert client.open == 0

    engine, _ = play(tmp_path, scenario, reply=reply)
    assert engine.cancels == []


def test_an_engine_that_is_lost_takes_no_request_with_it(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [n, n + 1], 100, priority=-n) for n in (1, 3, 5)]
        await until(lambda: len(engine.submits) == 3)
        engine.resume()
        await until(lambda: not client.connected)
        assert [len(ticket.output_ids) for ticket in tickets] == [5, 5, 5]
        assert (client.open, client.queued) == (3, 3)
        assert not await client.healthy()
        engine.start()
        for ticket, deltas in zip(tickets, await asyncio.gather(*map(collect, tickets)), strict=True):
            assert [delta.index for delta in deltas] == list(range(100))
            assert ticket.output_ids == [token.id for delta in deltas for token in delta.tokens]
            assert ticket.output_ids == ticket.submit.token_ids * 50
        assert client.open == 0

    engine, observed = play(tmp_path, scenario, die_after=5)
    for first, again in zip(engine.submits[:3], engine.submits[3:], strict=True):
        known = [*first.token_ids, *first.token_ids, *first.token_ids[:1]]
        assert again == msgspec.structs.replace(first, token_ids=first.token_ids + known)
    assert (observed.breaks, observed.restarts) == ([False], 1)
    assert observed.grown == {1: 300}


def test_who_follows_after_the_loss_misses_nothing(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        ticket = submit(client, [1], 100)
        await until(lambda: not client.connected)
        engine.start()
        await until(lambda: len(ticket.output_ids) == 100)
        assert [delta.index for delta in await collect(ticket)] == list(range(100))

    play(tmp_path, scenario, die_after=4)


def test_what_came_of_a_prompt_is_not_asked_for_again(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        ticket = submit(client, [7, 8, 9], 4, prompt_logprobs=True)
        await until(lambda: len(engine.submits) == 1)
        id = ticket.submit.id
        engine.send_raw(frame(Step([Delta(id, 0, [], None, 5.0, 2, [PromptToken(-1.0)])])))
        await until(lambda: len(ticket.prompt) == 1)
        engine.die()
        engine.start()
        engine.resume()
        await collect(ticket)
        assert [token.logprob for token in ticket.prompt] == [-1.0, -2.0]
        assert (ticket.started, ticket.cached) == (5.0, 2)  # what the next engine's cache has isn't what was there

    engine, _ = play(tmp_path, scenario, cached=1)
    assert [sent.scored for sent in engine.submits] == [0, 1]


def test_what_is_cancelled_meanwhile_is_not_handed_over_again(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [n], 100) for n in (1, 2)]
        await until(lambda: len(engine.submits) == 2)
        engine.resume()
        await until(lambda: not client.connected)
        tickets[0].cancel()
        engine.start()
        await collect(tickets[1])
        assert await collect(tickets[0]) == []

    engine, _ = play(tmp_path, scenario, die_after=4)
    assert [sent.token_ids[0] for sent in engine.submits] == [1, 2, 2]
    assert engine.cancels == []


def test_new_requests_wait_for_the_next_engine(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.die()
        await until(lambda: not client.connected)
        tickets = [submit(client, [n]) for n in (1, 2)]
        assert await client.admits(0)
        assert client.queued == 2
        engine.start()
        await asyncio.gather(*map(collect, tickets))

    engine, observed = play(tmp_path, scenario)
    assert [sent.token_ids for sent in engine.submits] == [[1], [2]]
    assert observed.breaks == []


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        monkeypatch.setattr("tgi.router.client.LONGEST_ABSENCE", 0.2)
        ticket = submit(client, [1], 100)
        with pytest.raises(RequestError) as caught:
            await collect(ticket)
        assert caught.value.kind is UNAVAILABLE
        assert client.open == 0
        assert not await client.admits(0.01)
        with pytest.raises(RequestError) as caught:
            submit(client, [1])
        assert error_of(caught) == "Server error: the engine is not running"
        engine.start()
        assert await client.admits(10)
        assert len(await collect(submit(client, [1]))) == 5

    play(tmp_path, scenario, die_after=4)


def test_a_server_that_stops_waits_for_no_engine(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        ticket = submit(client, [1], 100)
        await until(lambda: not client.connected)
        client.drain()
        with pytest.raises(RequestError) as caught:
            await collect(ticket)
        assert error_of(caught) == "Server error: the engine stopped: the server is stopping"
        assert len(ticket.output_ids) == 4
        with pytest.raises(RequestError):
            submit(client, [1])

    play(tmp_path, scenario, die_after=4)


def test_a_server_that_stops_goes_on_with_the_engine_that_is_there(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [1], 3), submit(client, [2], 100)]
        await until(lambda: len(engine.submits) == 2)
        client.drain()
        engine.resume()
        assert len(await collect(tickets[0])) == 3
        with pytest.raises(RequestError) as caught:
            await collect(tickets[1])
        assert error_of(caught) == "Server error: the engine stopped: it closed the connection"
        assert len(tickets[1].output_ids) == 9

    play(tmp_path, scenario, die_after=9)


def test_stopping_the_router_ends_its_requests(tmp_path: Path) -> None:
    tickets: list[Ticket] = []

    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets.append(submit(client, [1]))

    _, observed = play(tmp_path, scenario)
    with pytest.raises(RequestError, match="the router is stopping"):
        asyncio.run(collect(tickets[0]))
    assert observed.breaks == []


def test_an_engine_lost_in_a_prompt(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        ticket = submit(client, [1])
        await until(lambda: bool(engine.submits))
        engine.die()
        await until(lambda: not client.connected)
        ticket.cancel()

    _, observed = play(tmp_path, scenario)
    assert observed.breaks == [True]


# Suspects

POISON = 66


async def error_from(ticket: Ticket) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await collect(ticket)
    return caught.value


@pytest.mark.parametrize("places", [[0], [2], [5], [1, 2], [0, 5]])
def test_who_ends_the_engine_again_alone_ends_with_an_error_and_others_never_notice(
    tmp_path: Path, places: list[int]
) -> None:
    bad: list[int] = []

    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [n, POISON] if n in places else [n], 30) for n in range(6)]
        bad.extend(tickets[place].submit.id for place in places)
        await until(lambda: len(engine.submits) == 6)
        engine.resume()
        for n, ticket in enumerate(tickets):
            if n in places:
                error = await error_from(ticket)
                assert (error.kind, error.status, ticket.output_ids) == (CRASH, 500, [])
            else:
                assert [delta.index for delta in await collect(ticket)] == list(range(30))
                assert ticket.output_ids == [n] * 30
        assert client.open == 0
        assert len(await collect(submit(client, [1]))) == 5

    engine, observed = play(tmp_path, scenario, poison=POISON, delay=0.01)
    every = sorted({sent.id for sent in engine.submits})[:6]
    assert engine.victims == [every, every, *([id] for id in bad)]
    assert observed.restarts == len(engine.victims)


def test_new_requests_wait_while_suspects_run_alone(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        bad = submit(client, [POISON], 30)
        await until(lambda: len(engine.victims) == 2)
        await until(lambda: client.connected)
        late = submit(client, [1], 30)
        assert (await error_from(bad)).kind is CRASH
        assert len(await collect(late)) == 30

    engine, _ = play(tmp_path, scenario, poison=POISON, delay=0.05)
    assert [len(victims) for victims in engine.victims] == [1, 1, 1]


def test_suspects_of_several_routers_run_one_at_a_time(tmp_path: Path) -> None:
    """And who ends the engine in one router harms nobody in another."""

    async def main() -> None:
        clients = [EngineClient(tmp_path / "engine.sock", Observed(), 0, board) for board in boards]
        running = [asyncio.create_task(client.run()) for client in clients]
        assert all([await client.admits(10) for client in clients])
        engine.pause()
        tickets = [submit(client, [n], 30) for n in range(2) for client in clients]
        bad = [submit(client, [POISON], 30) for client in clients[:2]]
        await until(lambda: len(engine.submits) == 8)
        engine.resume()
        async with asyncio.timeout(20):
            for ticket in bad:
                assert (await error_from(ticket)).kind is CRASH
            for ticket in tickets:
                assert len(await collect(ticket)) == 30
        assert all(client.open == 0 for client in clients)
        assert [len(await collect(submit(client, [1]))) for client in clients] == [5] * 3
        for task in running:
            task.cancel()
        await asyncio.wait(running)

    with os.fdopen(os.memfd_create("board"), "wb") as memory:
        boards = [Board(index, 3, memory.fileno()) for index in range(3)]
        with FakeEngine(tmp_path / "engine.sock", poison=POISON, delay=0.02) as engine:
            asyncio.run(main())
        assert [len(victims) for victims in engine.victims] == [8, 8, 1, 1]
        assert [board.suspects.own[0] for board in boards] == [0] * 3


def test_a_suspect_that_is_cancelled_makes_room_for_the_next(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        tickets = [submit(client, [n], 30) for n in range(3)]
        for _ in range(2):
            await until(lambda: all(ticket.sent for ticket in tickets))
            engine.die()
            await until(lambda: not client.connected)
            engine.start()
            await until(lambda: client.connected)
        assert [ticket.sent for ticket in tickets] == [True, False, False]
        tickets[1].cancel()
        tickets[0].cancel()
        engine.resume()
        assert len(await collect(tickets[2])) == 30

    play(tmp_path, scenario)


def test_who_gets_on_between_losses_is_no_suspect(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        tickets = [submit(client, [n], 40) for n in range(3)]
        for known in (5, 10, 15, 20):
            await until(lambda known=known: all(len(ticket.output_ids) >= known for ticket in tickets))  # type: ignore[misc]
            engine.die()
            await until(lambda: not client.connected)
            engine.start()
            await until(lambda: client.connected)
            assert all(ticket.sent and not ticket.suspect for ticket in tickets)
        await asyncio.gather(*map(collect, tickets))
        assert [ticket.output_ids for ticket in tickets] == [[n] * 40 for n in range(3)]

    play(tmp_path, scenario, delay=0.005)


def test_waits_for_an_engine_that_comes_later(tmp_path: Path) -> None:
    async def main() -> None:
        client = EngineClient(tmp_path / "engine.sock", Observed(), 0)
        running = asyncio.create_task(client.run())
        assert not await client.admits(0.01)
        assert not await client.healthy()
        with pytest.raises(RequestError):
            submit(client, [1])
        with FakeEngine(tmp_path / "engine.sock"):
            assert await client.admits(10)
            assert await client.healthy()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert not client.connected

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (FRAME.pack(MAX_FRAME + 1), "it sent a frame of 268435457 bytes"),
        (FRAME.pack(3) + b"abc", "Invalid|Expected"),
        (FRAME.pack(1) + b"\x90", "Expected"),
        (FRAME.pack(2) + b"\x91\x63", "Invalid value 99"),
    ],
)
def test_nonsense_from_the_engine_ends_the_connection(
    tmp_path: Path, data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        ticket = submit(client, [1])
        await until(lambda: len(engine.submits) == 1)
        engine.send_raw(data)
        await until(lambda: len(engine.submits) == 2)
        engine.resume()
        assert len(await collect(ticket)) == 5

    engine, observed = play(tmp_path, scenario)
    assert engine.connections == 2
    assert observed.restarts == 0
    assert re.search(rf"lost the engine \(({reason})", caplog.text)


def test_nothing_counts_before_hello(tmp_path: Path) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(frame(Step()))
            await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(serve, tmp_path / "engine.sock")
        client = EngineClient(tmp_path / "engine.sock", Observed(), 0)
        running = asyncio.create_task(client.run())
        assert not await client.admits(0.2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.close()
        await server.wait_closed()

    asyncio.run(main())


# Health


def test_healthy_asks_the_step_loop(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        assert await client.healthy()
        engine.pause()
        answers = [asyncio.create_task(client.healthy(10)) for _ in range(5)]
        assert not await client.healthy(0.05)
        engine.resume()
        assert await asyncio.gather(*answers) == [True] * 5
        assert await client.healthy()

    engine, _ = play(tmp_path, scenario)
    assert len(engine.received) == 3  # the six calls of the middle shared one ping


def test_a_loop_that_never_answers_is_not_healthy(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        assert not await client.healthy(0.05)
        assert not await client.healthy(0.05)
        assert len(await collect(submit(client, [1]))) == 5

    engine, _ = play(tmp_path, scenario, pong=False)
    assert len(engine.received) == 2


def test_a_long_step_is_not_a_stuck_loop(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        client._longest_step = 0.3
        assert await client.healthy(0.01)
        await asyncio.sleep(0.3)
        assert not await client.healthy(0.01)

    play(tmp_path, scenario, pong=False)


def test_only_the_answer_to_this_ping_counts(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        asking = asyncio.create_task(client.healthy(0.2))
        await until(lambda: len(engine.received) == 1)
        engine.send_raw(frame(Pong(10**9)))
        assert not await asking

    play(tmp_path, scenario, pong=False)


def test_losing_the_engine_answers_a_ping(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        asking = asyncio.create_task(client.healthy(10))
        await until(lambda: len(engine.received) == 1)
        engine.die()
        assert not await asking
        engine.start()
        await until(lambda: client.connected)
        assert not await client.healthy(0.05)

    engine, _ = play(tmp_path, scenario, pong=False)
    assert len(engine.received) == 2


# The parts


def ticket_of(cancelled: list[Ticket]) -> Ticket:
    sampling = Sampling()
    return Ticket(Submit(1, [1], 1, 9, [], sampling, time.monotonic()), cancelled.append)


def delta(index: int, *ids: int, **rest: Any) -> Delta:
    return Delta(1, index, [Token(id, -1.0) for id in ids], **rest)


def test_each_token_counts_once() -> None:
    async def main() -> None:
        ticket = ticket_of([])
        for piece in (delta(0), delta(0, 5, 6), delta(0, 5), delta(1, 6, 7), delta(2, 7), delta(3, finish="length")):
            ticket.apply(piece, 1.0)
        assert ticket.output_ids == [5, 6, 7]
        assert [(piece.index, len(piece.tokens)) for piece in await collect(ticket)] == [(0, 0), (0, 2), (2, 1), (3, 0)]

    asyncio.run(main())


def test_a_gap_is_an_error(tmp_path: Path) -> None:
    async def scenario(client: EngineClient, engine: FakeEngine) -> None:
        engine.pause()
        ticket = submit(client, [1])
        await until(lambda: len(engine.submits) == 1)
        id = ticket.submit.id
        engine.send_raw(frame(Step(deltas=[Delta(id, 0, [Token(4, -1.0)]), Delta(id, 3, [Token(5, -1.0)])])))
        with pytest.raises(RequestError) as caught:
            await collect(ticket)
        assert error_of(caught) == "Server error: tokens 1 to 2 never arrived"
        assert ticket.output_ids == [4]
        assert client.open == 0
        await until(lambda: engine.cancels == [id])
        assert client.connected

    play(tmp_path, scenario)


def test_a_failed_ticket_fails_again() -> None:
    async def main() -> None:
        cancelled: list[Ticket] = []
        ticket = ticket_of(cancelled)
        ticket.fail(RequestError(GENERATION, "gone"))
        ticket.fail(RequestError(GENERATION, "gone twice"))
        for _ in range(2):
            with pytest.raises(RequestError, match=r"gone$"):
                await collect(ticket)
        ticket.cancel()
        ticket.apply(delta(0, 1), 1.0)
        assert ticket.output_ids == []
        assert cancelled == []

    asyncio.run(main())


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 1000])
def test_frames_are_found_however_they_arrive(cut: int) -> None:
    messages = [Hello(n) for n in range(5)] + [Hello(1 << 40)]
    data = b"".join(map(frame, messages))
    received, found = bytearray(), []
    for start in range(0, len(data), cut):
        received += data[start : start + cut]
        found += [msgspec.msgpack.decode(body, type=Hello) for body in _take_frames(received)]
    assert found == messages
    assert not received
