"""The router's end of the engine's socket, and the truth about every request. Knows token ids, never text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tgi.core.messages import Delta, Sampling, StepStats, Submit


class Ticket:
    submit: Submit
    output_ids: list[int]
    submitted: float
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Delta:
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class EngineClient:
    def __init__(self, socket: Path, on_stats: Callable[[StepStats], None]) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        raise NotImplementedError

    async def wait_connected(self, timeout: float) -> bool:
        raise NotImplementedError

    async def healthy(self, timeout: float = 5.0) -> bool:
        raise NotImplementedError

    @property
    def queued(self) -> int:
        raise NotImplementedError

    @property
    def open(self) -> int:
        raise NotImplementedError

    def submit(
        self,
        *,
        token_ids: list[int],
        max_new_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        prompt_logprobs: bool = False,
        cache_salt: bytes = b"",
    ) -> Ticket:
        raise NotImplementedError
