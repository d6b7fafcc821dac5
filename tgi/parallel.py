"""The ranks that hold one model together: who has which part, and what they make of each other's results."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import distributed

from tgi.core import split
from tgi.core.errors import StartupError

log = logging.getLogger(__name__)


class Exchange(Protocol):
    """How ranks reach each other. All call the same, in the same order, with tensors of the same rows."""

    def begin(self) -> None:
        """A step begins."""

    def total(self, x: torch.Tensor, into: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        """Sum of every rank's ``x`` [rows, size], in its place; or ``factor`` times that added to ``into``. The same to
        the bit on all ranks."""

    def joined(self, x: torch.Tensor, widths: Sequence[int], *, first_only: bool = False) -> torch.Tensor:
        """Every rank's ``x`` side by side on the last axis; ``widths`` of the ranks. ``first_only``: only rank 0 needs
        it."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the ranks of one model. Layers slice by it at load and call it in their forward."""

    rank: int = 0
    size: int = 1
    exchange: Exchange | None = None
    """With the others, if there are any."""

    def shard(self, size: int) -> slice:
        """This rank's run of an axis of ``size``."""
        own = split.shard(size, self.rank, self.size)
        return slice(own.start, own.stop)

    def widths(self, size: int) -> list[int]:
        """Of every rank's run."""
        return [len(split.shard(size, rank, self.size)) for rank in range(self.size)]

    def heads(self, queries: int, keys: int, rank: int | None = None) -> tuple[range, list[int]]:
        """As in split: of a rank, this one by itself."""
        return split.heads(queries, keys, self.rank if rank is None else rank, self.size)

    def begin(self) -> None:
        """A step begins, on every rank."""
        if self.exchange is not None:
            self.exchange.begin()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's ``x``, in place."""
        return x if self.exchange is None else self.exchange.total(x)

    def add(self, into: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        """Add ``factor`` times the sum of every rank's ``x`` to ``into``."""
        if self.exchange is None:
            into.add_(x, alpha=factor)
        else:
            self.exchange.total(x, into, factor)

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Every rank's ``x`` side by side on the last axis; ``widths`` of the ranks."""
        return x if self.exchange is None else self.exchange.joined(x, widths)

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The same for rank 0; others get anything."""
        return x if self.exchange is None else self.exchange.joined(x, widths, first_only=True)


class Collective:
    """Through torch.distributed: between GPUs their maker's library (NCCL), between CPUs without our kernels gloo."""

    def __init__(
        self, rank: int, ranks: int, device: torch.device, master: tuple[str, int], *, fixed: bool = False
    ) -> None:
        """``master``: address and port where rank 0 waits for the others. ``fixed``: sums are made in the order of
        ranks, whatever their size, which NCCL's and torch's are not. Raises StartupError."""
        address = f"tcp://{master[0]}:{master[1]}"
        gpu = device.type != "cpu"
        try:
            if gpu:
                torch.get_device_module(device).set_device(device)
            backend = distributed.get_default_backend_for_device(device)
            distributed.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise StartupError(
                f"the ranks can't meet at {address} (`--master-addr`, `--master-port`): {reason}"
            ) from None
        self._ranks = ranks
        self._fixed = fixed
        self._peers = SymmetricMemory.of(device) if gpu and not fixed else None

    def begin(self) -> None: ...

    def total(self, x: torch.Tensor, into: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        if self._fixed:
            parts = [torch.empty_like(x) for _ in range(self._ranks)]
            distributed.all_gather(parts, x)
            whole = parts[0].float()
            for part in parts[1:]:
                whole += part
            x.copy_(whole)
        elif self._peers is None or not self._peers.sum(x):
            distributed.all_reduce(x)
        return x if into is None else into.add_(x, alpha=factor)

    def joined(self, x: torch.Tensor, widths: Sequence[int], *, first_only: bool = False) -> torch.Tensor:
        # All send as many numbers as the widest.
        own = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        parts = [torch.empty_like(own) for _ in widths]
        distributed.all_gather(parts, own)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


class SymmetricMemory:
    """Memory that GPUs of one machine read of each other: a sum of few numbers is one kernel then. torch's module for
    it is in alpha state, so that whatever goes wrong at the start leaves all to NCCL."""

    MOST = 8 << 20
    """Bytes; NCCL is better with more."""
    _ONE_SHOT = 256 << 10
    """Bytes; with more, that each GPU reads all of all others costs more than that sums are told in a second turn."""

    def __init__(self, buffer: torch.Tensor, group: str, *, multicast: bool) -> None:
        """``buffer``: uint8 [MOST], known to all. ``multicast``: the switch between the GPUs can add."""
        self._buffer = buffer
        self._group = group
        self._multicast = multicast

    @classmethod
    def of(cls, device: torch.device) -> "SymmetricMemory | None":
        """Of all ranks, which call this together."""
        try:
            from torch.distributed import _symmetric_memory as memory

            group = distributed.group.WORLD
            assert group is not None
            buffer = memory.empty(cls.MOST, dtype=torch.uint8, device=device)
            handle = memory.rendezvous(buffer, group.group_name)
            return cls(buffer, group.group_name, multicast=handle.multicast_ptr != 0)
        except (ImportError, AttributeError, RuntimeError) as error:
            log.info("NCCL makes all sums over ranks: %s", error)
            return None

    def sum(self, x: torch.Tensor) -> bool:
        """Put the sum of every rank's ``x`` in its place. False: it isn't one for this way."""
        if x.nbytes > self.MOST or x.nbytes % 16:
            return False
        shared, operations = self._buffer[: x.nbytes].view(x.dtype).view_as(x), torch.ops.symm_mem
        shared.copy_(x)
        if self._multicast:
            operations.multimem_all_reduce_(shared, "sum", self._group)
        elif x.nbytes > self._ONE_SHOT:
            operations.two_shot_all_reduce_(shared, "sum", self._group)
        else:
            shared = operations.one_shot_all_reduce(shared, "sum", self._group)
        x.copy_(shared)
        return True
