"""Start, supervision and end of the children, with small scripts in their place; the supervisor is the real one."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tgi.launcher import supervisor
from tgi.launcher.errors import WebserverCannotStart

# Scripts. Each prints what it does, so that the order can be read.
ENGINE = """
tell("ENGINE %d" % os.getpid())
say(type="loading", done=1, total=2)
say(type="ready")
signal.pause()
"""
ROUTER = """
tell("ROUTER %d" % os.getpid())
say(type="ready")
signal.pause()
"""
WHEN_TOLD = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
tell("WAITING %d" % os.getpid())
say(type="ready")
signal.sigwait([signal.SIGUSR1])
"""
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell("ROUTER %d" % os.getpid())
say(type="ready")
while True: time.sleep(60)
"""


class Launch:
    """A supervisor in a process of its own."""

    def __init__(self, shards: Sequence[str], router: str, grace: float, workers: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher.supervise_fakes", str(grace), str(workers), router, *shards],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.seen = ""

    def until(self, text: str) -> None:
        """Read until a line with ``text`` has come."""
        assert self.process.stdout is not None
        while text not in self.seen:
            line = self.process.stdout.readline()
            assert line, f"{text!r} never came:\n{self.seen}"
            self.seen += line

    def value(self, name: str) -> str:
        """What stands behind ``name`` in the last line that came with it."""
        return [line.split()[1] for line in self.seen.splitlines() if line.startswith(f"{name} ")][-1]

    def end(self, *signals: signal.Signals) -> tuple[int, str, str]:
        """Send signals and wait: exit code, all of standard output, standard error."""
        for number in signals:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        self.seen += out
        return self.process.returncode, self.seen, err


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(
        engine: str | Sequence[str] = ENGINE, router: str = ROUTER, grace: float = 20, workers: int = 1
    ) -> Launch:
        started.append(Launch([engine] if isinstance(engine, str) else engine, router, grace, workers))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def gone(pid: int) -> bool:
    """A process has ended, even if nobody has waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_router_then_engine_and_leaves_nothing(
    launch: Callable[..., Launch], number: signal.Signals
) -> None:
    run = launch()
    run.until("Connected")
    run.until("Try: curl")
    code, out, err = run.end(number)
    assert (code, err) == (0, "")
    assert out.index("router ends") < out.index("Terminating shard") < out.index("engine ends")
    assert f"curl http://127.0.0.1:{run.value('PORT')}/" in out
    assert not Path(run.value("RUN_DIR")).exists()
    assert gone(int(run.value("ENGINE"))) and gone(int(run.value("ROUTER")))


def test_a_signal_while_loading_ends_all(launch: Callable[..., Launch]) -> None:
    run = launch(engine='tell("ENGINE 1"); time.sleep(60)')
    run.until("ENGINE")
    run.until("ROUTER")
    code, out, _ = run.end(signal.SIGTERM)
    assert code == 0 and "Connected" not in out and "router ends" in out


def test_settings_are_private(launch: Callable[..., Launch]) -> None:
    run = launch()
    run.until("Connected")
    folder = Path(run.value("RUN_DIR"))
    settings = folder / "settings.json"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    assert "the-secret" in settings.read_text()
    for child in ("ENGINE", "ROUTER"):
        arguments = Path(f"/proc/{run.value(child)}/cmdline").read_text()
        assert str(settings) in arguments and "the-secret" not in arguments


@pytest.mark.parametrize("own", [None, "77"])
def test_waiting_threads_leave_the_processors_soon_unless_the_operator_says(
    launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    else:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    started = launch(engine='tell("SPINS " + os.environ["GOMP_SPINCOUNT"])\n' + ENGINE)
    started.until("Connected: ready")
    assert started.value("SPINS") == (own or "2000")
    started.end(signal.SIGTERM)


def test_the_router_gets_the_listening_socket(launch: Callable[..., Launch]) -> None:
    run = launch(
        router="""
say(type="ready")
connection, _ = socket.socket(fileno=int(arguments["--listen-fd"])).accept()
connection.sendall(b"hello")
connection.close()
signal.pause()
"""
    )
    run.until("Connected")
    with socket.create_connection(("127.0.0.1", int(run.value("PORT"))), timeout=10) as client:
        assert client.recv(5) == b"hello"
    assert run.end(signal.SIGTERM)[0] == 0


def test_new_connections_are_refused_while_the_router_drains(launch: Callable[..., Launch]) -> None:
    run = launch(
        router="""
def drain(*_):
    os.close(int(arguments["--listen-fd"]))
    tell("draining")
    time.sleep(60)
signal.signal(signal.SIGTERM, drain)
say(type="ready")
signal.pause()
"""
    )
    run.until("Connected")
    run.process.send_signal(signal.SIGTERM)
    run.until("draining")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(run.value("PORT"))), timeout=10)
    assert run.end(signal.SIGTERM)[0] == 0


CAUSES = [
    ('say(type="failed", message="config.json: hidden_act is odd"); time.sleep(60)', "config.json: hidden_act is odd"),
    ('say(type="failed", message="no memory"); sys.exit(1)', "no memory"),
    ('sys.stderr.write("Traceback\\nImportError: no libfoo\\n"); sys.exit(3)', "status 3: ImportError: no libfoo"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, as the kernel does when memory runs out"),
    ("os.abort()", "killed by SIGABRT"),
    ("signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(60)", "it hung in a step; where, stands above"),
    ('os.write(status, b"[not a status]\\n"); time.sleep(60)', "can't be read"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped by SIGSTOP"),
]


@pytest.mark.parametrize(("script", "cause"), CAUSES)
def test_an_engine_that_can_not_start_ends_all(launch: Callable[..., Launch], script: str, cause: str) -> None:
    run = launch(engine=script)
    code, out, err = run.end()
    assert code == 1
    assert last_line(err).startswith("Error: ShardCannotStart: ") and cause in last_line(err)
    assert "Restarting" not in out and out.count("Shard 0 crashed: ") == 1
    assert not Path(run.value("RUN_DIR")).exists()


@pytest.mark.parametrize(("script", "cause"), CAUSES)
def test_an_engine_that_has_served_is_started_again(launch: Callable[..., Launch], script: str, cause: str) -> None:
    run = launch(engine=f"{WHEN_TOLD}\nif turn == 0:\n    {script}\nsignal.pause()")
    run.until("Connected")
    first, router = run.value("WAITING"), run.value("ROUTER")
    os.kill(int(first), signal.SIGUSR1)
    run.until("The engine serves again")
    assert run.seen.index(cause) < run.seen.index("Restarting the engine\n")
    assert run.seen.count("Shard 0 crashed: ") == 1
    assert gone(int(first)) and run.value("WAITING") != first
    assert run.value("ROUTER") == router and not gone(int(router))
    os.kill(int(run.value("WAITING")), signal.SIGUSR1)
    code, _, _ = run.end(signal.SIGTERM)
    assert code == 0
    assert gone(int(run.value("WAITING")))


RANKS = [f'tell("RANK{rank} %d" % os.getpid()); say(type="ready")\nwhile True: signal.pause()' for rank in range(3)]


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_one_shard_is_that_of_all(launch: Callable[..., Launch], rank: int, number: signal.Signals) -> None:
    run = launch(engine=RANKS)
    run.until("Connected")
    before = [int(run.value(f"RANK{rank}")) for rank in range(3)]
    begin = time.monotonic()
    os.kill(before[rank], number)
    run.until("Restarting the engine\n")
    assert all(map(gone, before))
    assert time.monotonic() - begin < 1
    run.until("The engine serves again")
    assert f"Shard {rank} crashed: " in run.seen and run.seen.count("crashed: ") == 1
    after = [int(run.value(f"RANK{rank}")) for rank in range(3)]
    assert not set(before) & set(after)
    assert run.end(signal.SIGTERM)[0] == 0
    assert all(map(gone, after))


def test_nothing_of_a_lost_engine_stays_open(launch: Callable[..., Launch]) -> None:
    run = launch()
    run.until("Connected")
    descriptors = Path(f"/proc/{run.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    os.kill(int(run.value("ENGINE")), signal.SIGKILL)
    run.until("The engine serves again")
    assert len(list(descriptors.iterdir())) == before


def test_an_engine_that_is_lost_again_soon_waits_longer_each_time(launch: Callable[..., Launch]) -> None:
    run = launch(engine="say(type='ready'); time.sleep(0.05 if turn < 3 else 60); sys.exit(turn)")
    run.until("Restarting the engine\n")
    begin = time.monotonic()
    run.until("Restarting the engine in 0.5 s")
    run.until("Restarting the engine in 1 s")
    assert time.monotonic() - begin > 0.5
    run.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert run.end()[0] == 0
    assert time.monotonic() - begin < 1  # a signal is heard while nothing runs


def test_an_engine_that_fails_to_start_again_and_again_ends_the_service(launch: Callable[..., Launch]) -> None:
    run = launch(engine=f"if turn: say(type='failed', message='no device %d' % turn); time.sleep(60)\n{WHEN_TOLD}")
    run.until("Connected")
    os.kill(int(run.value("WAITING")), signal.SIGUSR1)
    code, out, err = run.end()
    assert code == 1
    assert last_line(err) == "Error: ShardCannotStart: no device 3"
    assert out.count("Restarting the engine") == 3
    assert "router ends" in out
    assert not Path(run.value("RUN_DIR")).exists()


def test_what_a_lost_engine_has_started_ends_with_it(launch: Callable[..., Launch]) -> None:
    run = launch(engine=f"if not turn and not os.fork(): tell('CHILD %d' % os.getpid()); time.sleep(60)\n{ENGINE}")
    run.until("Connected")
    run.until("CHILD")
    child = int(run.value("CHILD"))
    os.kill(int(run.value("ENGINE")), signal.SIGKILL)
    run.until("The engine serves again")
    assert gone(child)


def test_an_engine_that_is_lost_while_the_router_drains_is_not_started_again(launch: Callable[..., Launch]) -> None:
    run = launch(router=STUBBORN, engine=RANKS[:2], grace=1)
    run.until("Connected")
    run.process.send_signal(signal.SIGTERM)
    run.until("Waiting for webserver")
    os.kill(int(run.value("RANK1")), signal.SIGKILL)
    run.until("Shard 1 crashed")
    code, out, _ = run.end()
    assert code == 0 and "Restarting" not in out and out.count("crashed: ") == 1
    assert gone(int(run.value("RANK0")))


def test_a_router_that_can_not_start_ends_all(launch: Callable[..., Launch]) -> None:
    code, out, err = launch(router="sys.exit(4)").end()
    assert code == 1
    assert last_line(err) == "Error: WebserverCannotStart: exited with status 4"
    assert "Restarting" not in out


GREETER = """
tell("ROUTER%s %d" % (arguments.get("--worker", ""), os.getpid()))
say(type="ready")
while True:
    connection, _ = socket.socket(fileno=os.dup(int(arguments["--listen-fd"]))).accept()
    if connection.recv(5) == b"crash":
        sys.exit(4)
    connection.sendall(b"hello")
    connection.close()
"""


def test_a_router_that_has_served_is_started_again_and_serves_who_waits(launch: Callable[..., Launch]) -> None:
    run = launch(router=GREETER)
    run.until("Connected")
    engine, router, address = run.value("ENGINE"), run.value("ROUTER"), ("127.0.0.1", int(run.value("PORT")))
    with socket.create_connection(address, 10) as bad, socket.create_connection(address, 10) as waiting:
        bad.sendall(b"crash")
        waiting.sendall(b"x")
        assert waiting.recv(5) == b"hello"
    run.until("The webserver serves again")
    assert "Webserver Crashed: exited with status 4" in run.seen
    assert gone(int(router)) and not gone(int(run.value("ROUTER"))) and not gone(int(engine))
    assert run.end(signal.SIGTERM)[0] == 0
    assert "ENGINE" not in run.seen[run.seen.index("Restarting the webserver") :]


def test_a_router_that_fails_to_start_again_and_again_ends_the_service(launch: Callable[..., Launch]) -> None:
    script = "if os.path.exists(folder + '/begun'): sys.exit(5)\nopen(folder + '/begun', 'w').close()\n"
    run = launch(router=script + WHEN_TOLD)
    run.until("Connected")
    os.kill(int(run.value("WAITING")), signal.SIGUSR1)
    code, out, err = run.end()
    assert (code, last_line(err)) == (1, "Error: WebserverCannotStart: exited with status 5")
    assert out.count("Restarting the webserver") == 3
    assert "engine ends" in out


def test_the_loss_of_one_of_several_routers_is_its_own(launch: Callable[..., Launch]) -> None:
    counts = """
row = 1 << 16
def cells(at): return [os.pread(int(arguments["--memory-fd"]), 1, at * row + 8 * cell) for cell in range(5)]
tell("BEFORE %s" % (b"".join(cells(1)).hex() or "none"))
if arguments["--worker"] == "1": os.pwrite(int(arguments["--memory-fd"]), bytes([1, 0, 0, 0, 0, 0, 0, 0] * 5), row)
"""
    run = launch(router=counts + GREETER, workers=3)
    run.until("Connected")
    first, second, third = (run.value(f"ROUTER{worker}") for worker in range(3))
    os.kill(int(second), signal.SIGKILL)
    run.until("The webserver worker=1 serves again")
    assert "Webserver Crashed worker=1: killed by SIGKILL" in run.seen
    assert run.value("BEFORE") == "0000000001"  # of what it counted only what isn't of the moment
    assert (run.value("ROUTER0"), run.value("ROUTER2")) == (first, third)
    assert not gone(int(first)) and not gone(int(third)) and run.value("ROUTER1") != second
    pids = [int(run.value(f"ROUTER{worker}")) for worker in range(3)]
    code, out, _ = run.end(signal.SIGTERM)
    assert code == 0 and out.count("router ends") == 3 and all(map(gone, pids))
    assert out.rindex("router ends") < out.index("engine ends")


def test_a_stubborn_child_is_killed_when_its_time_is_up(launch: Callable[..., Launch]) -> None:
    run = launch(router=STUBBORN, grace=0.2)
    run.until("Connected")
    code, out, _ = run.end(signal.SIGTERM)
    assert code == 0 and "Killing webserver" in out and "engine ends" in out
    assert gone(int(run.value("ROUTER")))


def test_a_second_signal_ends_the_patience(launch: Callable[..., Launch]) -> None:
    run = launch(router=STUBBORN, grace=3600)
    run.until("Connected")
    run.process.send_signal(signal.SIGTERM)
    run.until("Terminating webserver")
    code, out, _ = run.end(signal.SIGINT)
    assert code == 0 and "Killing webserver" in out


def test_children_die_with_a_killed_launcher(launch: Callable[..., Launch]) -> None:
    run = launch(router=STUBBORN)
    run.until("Connected")
    children = [int(run.value(name)) for name in ("ENGINE", "ROUTER")]
    run.end(signal.SIGKILL)
    while not all(map(gone, children)):
        time.sleep(0.01)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WebserverCannotStart, match=rf"127\.0\.0\.1:{port}: Address already in use.*--port"):
            supervisor.bind("127.0.0.1", port)


@pytest.mark.parametrize("name", ["host.invalid", "a..b", "a" * 100])
def test_a_name_that_is_no_address_is_refused(name: str) -> None:
    with pytest.raises(WebserverCannotStart, match=f"--hostname` {re.escape(name)}"):
        supervisor.bind(name, 0)


def test_names_and_ipv6_are_addresses() -> None:
    with supervisor.bind("localhost", 0) as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
