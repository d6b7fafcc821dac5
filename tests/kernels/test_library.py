"""Built where there is a compiler; without it, or on a processor that lacks what it needs, torch does the work."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.conftest import LIBRARY, native
from tests.tiny import write_model
from tgi.kernels import library as module
from tgi.kernels.build import build
from tgi.kernels.library import Library

ARM_COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As after an installation without a compiler."""
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "libtgi_kernels.so")
    module._load.cache_clear()
    yield
    module._load.cache_clear()


def test_without_it_torch_does_the_work_and_one_line_says_so(
    without: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.parity.conftest import Engine, tokens
    from tgi.core.messages import Sampling, Submit

    with caplog.at_level(logging.WARNING):
        engine = Engine(write_model(tmp_path, "llama"))
        ids = tokens(9).tolist()
        engine.run(Submit(1, ids, len(ids), 5, [], Sampling(), 0.0))
    assert len(engine.text(1)) == 5
    assert engine.model.library is None
    assert caplog.text.count("No native kernels") == 1


def test_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        build(tmp_path / "library.so", compiler="false")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    with pytest.raises(OSError, match="sparc"):
        build(tmp_path / "library.so", machine="sparc")


def test_something_else_than_the_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"no library")
    with pytest.raises(OSError, match=r"library\.so"):
        Library(str(tmp_path / "library.so"))


@native
def test_it_shares_torch_s_threads() -> None:
    """One OpenMP runtime is loaded, not two with a pool each."""
    script = (
        "import torch\nfrom tgi.kernels.library import library\nlibrary()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@native
def test_the_best_instruction_set_is_chosen() -> None:
    assert LIBRARY is not None
    assert LIBRARY.isa == LIBRARY.isas[-1]
    with pytest.raises(ValueError, match="sse2"):
        LIBRARY.choose("sse2")


@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason="no compiler for aarch64")
def test_it_compiles_for_arm(tmp_path: Path) -> None:
    build(tmp_path / "library.so", compiler=ARM_COMPILER, machine="aarch64")
    assert (tmp_path / "library.so").stat().st_size > 100_000
