"""The environments of the clients in clients.toml: ``python -m tests.serve.clients.environments [--all]`` makes them.

Without ``--all`` the heavy ones are left out.
"""

import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2] / ".venv-clients"


@dataclass(frozen=True, slots=True)
class Client:
    """One row of the table."""

    name: str
    script: str
    requires: Sequence[str]
    no_deps: Sequence[str] = ()
    heavy: bool = False

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        stamp = self.folder / "installed"
        return stamp.is_file() and stamp.read_text() == repr(self)

    def install(self) -> None:
        """Raises CalledProcessError where pip can't."""
        print(f"Making {self.folder}", file=sys.stderr)
        venv.create(self.folder, with_pip=True, clear=True)
        self._pip(*self.requires)
        if self.no_deps:
            self._pip("--no-deps", *self.no_deps)
        (self.folder / "installed").write_text(repr(self))

    def _pip(self, *arguments: str) -> None:
        command = (self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)
        subprocess.run(command, check=True, stdout=sys.stderr)

    def run(self, *arguments: str) -> str:
        """What the client's script prints; AssertionError with what it complained of if it fails."""
        # Without the script's folder on the path: its neighbours have names of packages.
        command = [str(self.python), "-P", str(HERE / self.script), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return run.stdout


def table() -> Iterator[Client]:
    for name, row in tomllib.loads((HERE / "clients.toml").read_text()).items():
        yield Client(name, **row)


if __name__ == "__main__":
    for client in table():
        if not client.installed and ("--all" in sys.argv or not client.heavy):
            client.install()
