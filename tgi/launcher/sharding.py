"""How many ranks hold a model, and what the fullest of them has of it. Derivations and errors are TGI's."""

import socket
from collections import Counter
from dataclasses import dataclass, replace

from tgi.core.model_config import Experts, ModelShape, QkNorm
from tgi.core.split import heads, shard
from tgi.launcher.errors import ArgumentValidation, NotEnoughCUDADevices
from tgi.launcher.flags import Options


def choose_ranks(options: Options, devices: int | None) -> int:
    """``devices``: GPUs that may be used; None: the model runs on a CPU, which any number of ranks may share."""
    count = options.num_shard
    if count is not None and count < 1:
        raise ArgumentValidation("`num_shard` cannot be < 1")
    if options.sharded:
        if count is None and (devices or 0) < 2:
            raise NotEnoughCUDADevices(f"`sharded` is true but only found {devices or 0} CUDA devices")
        if count == 1:
            raise ArgumentValidation("`sharded` is true but `num_shard` <= 1")
    if count is None:
        named = options.cuda_visible_devices or options.nvidia_visible_devices not in (None, "", "void", "none")
        return devices if devices and (options.sharded or (named and options.sharded is None)) else 1
    if devices is not None and count > devices:
        raise NotEnoughCUDADevices(f"`num_shard` is {count} but only found {devices} CUDA devices")
    return count


def check_master(options: Options) -> None:
    """Whether the ranks can meet at ``--master-addr`` and ``--master-port``."""
    place = f"`--master-addr` {options.master_addr} `--master-port` {options.master_port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.master_addr, options.master_port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentValidation(f"{place}: the ranks can't meet there: {reason}") from None


@dataclass(frozen=True, slots=True)
class Share:
    """What the fullest rank has."""

    shape: ModelShape
    experts: Experts | None
    weights: float
    """Share of all weights."""
    copied: int
    """Numbers of weights that it has besides, since other ranks have them too."""


def fullest(shape: ModelShape, experts: Experts | None, norm: QkNorm | None, ranks: int) -> Share:
    """Raises ArgumentValidation if the model can't be split so."""

    def most(size: int) -> int:
        return max(len(shard(size, rank, ranks)) for rank in range(ranks))

    try:
        held = [heads(shape.heads, shape.kv_heads, rank, ranks) for rank in range(ranks)]
    except ValueError as error:
        raise ArgumentValidation(f"`--num-shard {ranks}`: {error}") from None
    copies = Counter(key for _, own in held for key in own).values()
    if norm is not None and norm.weights == "whole" and len(set(copies)) > 1:
        raise ArgumentValidation(
            f"`--num-shard {ranks}`: {shape.kv_heads} kv heads are normed as one, and ranks would have "
            f"{min(copies)} to {max(copies)} copies of them"
        )
    queries, keys = max(len(own) for own, _ in held), max(len(own) for _, own in held)
    part = replace(shape, heads=queries, kv_heads=keys, intermediate=most(shape.intermediate))
    copied = 2 * shape.layers * shape.hidden * shape.head_dim * max(keys - shape.kv_heads // ranks, 0)
    fractions = [queries / shape.heads, part.intermediate / shape.intermediate, most(shape.vocab) / shape.vocab]
    if experts is not None:
        inner = most(experts.intermediate)
        copied += 2 * shape.layers * shape.hidden * experts.count  # routers, in float32
        fractions.append(inner / experts.intermediate)
        experts = replace(experts, intermediate=inner, shared_intermediate=most(experts.shared_intermediate))
    if shape.latent:
        copied += 2 * shape.layers * shape.hidden * shape.head_dim  # what makes latent keys and queries
    return Share(part, experts, max(fractions), copied)
