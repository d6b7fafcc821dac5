"""How many ranks, and what each has."""

import json
import socket
from pathlib import Path

import pytest

from tests.launcher.test_fit import CPU, GPU, model
from tgi.core.errors import StartupError
from tgi.core.split import heads, shard
from tgi.launcher.errors import ArgumentValidation, NotEnoughCUDADevices
from tgi.launcher.fit import fit
from tgi.launcher.flags import Options
from tgi.launcher.sharding import check_master, choose_ranks


@pytest.mark.parametrize(
    ("options", "devices", "ranks"),
    [
        (Options(), None, 1),
        (Options(), 4, 1),
        (Options(cuda_visible_devices="0,1"), 2, 2),
        (Options(nvidia_visible_devices="all"), 4, 4),
        (Options(nvidia_visible_devices="void"), 4, 1),
        (Options(nvidia_visible_devices="all"), None, 1),
        (Options(sharded=True), 4, 4),
        (Options(sharded=False, cuda_visible_devices="0,1"), 2, 1),
        (Options(sharded=False, num_shard=2), 2, 2),
        (Options(num_shard=3), None, 3),
        (Options(num_shard=2), 4, 2),
    ],
)
def test_derivation(options: Options, devices: int | None, ranks: int) -> None:
    assert choose_ranks(options, devices) == ranks


@pytest.mark.parametrize(
    ("options", "devices", "kind", "text"),
    [
        (Options(num_shard=0), None, ArgumentValidation, "`num_shard` cannot be < 1"),
        (Options(sharded=True, num_shard=1), 4, ArgumentValidation, "`sharded` is true but `num_shard` <= 1"),
        (Options(sharded=True), 1, NotEnoughCUDADevices, "`sharded` is true but only found 1 CUDA devices"),
        (Options(sharded=True), None, NotEnoughCUDADevices, "`sharded` is true but only found 0 CUDA devices"),
        (Options(num_shard=3), 2, NotEnoughCUDADevices, "`num_shard` is 3 but only found 2 CUDA devices"),
    ],
)
def test_refusals_in_the_words_of_tgi(
    options: Options, devices: int | None, kind: type[StartupError], text: str
) -> None:
    with pytest.raises(kind) as error:
        choose_ranks(options, devices)
    assert str(error.value) == text


def test_a_meeting_point_that_cant_be_had() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentValidation, match=f"`--master-port` {port}: the ranks can't meet there"):
            check_master(Options(master_addr="127.0.0.1", master_port=port))
    for address in ("203.0.113.1", "no such host"):
        with pytest.raises(ArgumentValidation, match=r"`--master-addr` .*: the ranks can't meet there"):
            check_master(Options(master_addr=address))


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("size", [1, 5, 96, 1536, 49152, 49155])
def test_runs_cover_an_axis_once(size: int, ranks: int) -> None:
    assert [at for rank in range(ranks) for at in shard(size, rank, ranks)] == list(range(size))


@pytest.mark.parametrize(("queries", "keys"), [(9, 3), (4, 2), (8, 8), (6, 1), (32, 8)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_queries_keep_their_keys(queries: int, keys: int, ranks: int) -> None:
    seen = []
    for rank in range(ranks):
        own, theirs = heads(queries, keys, rank, ranks)
        assert own and len(own) % len(theirs) == 0
        sharing = len(own) // len(theirs)
        assert [theirs[at // sharing] for at in range(len(own))] == [query // (queries // keys) for query in own]
        seen += own
    assert seen == list(range(queries))


def test_a_plan_is_of_each_rank(tmp_path: Path) -> None:
    files = model(tmp_path)
    one, two = (fit(Options(num_shard=ranks), files, CPU) for ranks in (1, 2))
    assert (one.ranks, two.ranks) == (1, 2) and two.memory == one.memory // 2
    assert 0.5 <= two.ledger["weights"] / one.ledger["weights"] < 0.6


def test_what_cant_be_split(tmp_path: Path) -> None:
    files = model(tmp_path)
    config = json.loads((Path(files.folder) / "config.json").read_bytes())
    with pytest.raises(
        ArgumentValidation, match=f"`--num-shard 99`: 99 ranks can't share {config['num_attention_heads']}"
    ):
        fit(Options(num_shard=99), files, CPU)
    with pytest.raises(NotEnoughCUDADevices):
        fit(Options(num_shard=2), files, GPU)
