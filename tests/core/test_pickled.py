"""State dicts by their pickle alone; programs that are no state dicts are refused and not run."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

from tgi.core.errors import StartupError
from tgi.core.pickled import read_pickled

ARCHIVE = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])


def save(path: Path, state: object, archive: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    return path


@ARCHIVE
def test_names_types_shapes_and_what_is_one_and_the_same(tmp_path: Path, archive: bool) -> None:
    table = torch.randn(6, 4)
    state = {
        "embed": table,
        "head": torch.nn.Parameter(table),
        "part": table[2:],
        "half": table.half().T,
        "wide": table.double(),
        "brain": table[0].bfloat16(),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "scale": torch.tensor(1.0),
    }
    found = read_pickled(save(tmp_path / "a.bin", state, archive))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert [found[name].dtype for name in state] == ["F32", "F32", "F32", "F16", "F64", "BF16", "BOOL", "F32"]
    assert found["embed"] == found["head"] and found["embed"] != found["part"]


@ARCHIVE
def test_a_module_s_state_dict(tmp_path: Path, archive: bool) -> None:
    path = save(tmp_path / "a.bin", torch.nn.Linear(3, 4).state_dict(), archive)
    assert {name: tensor.shape for name, tensor in read_pickled(path).items()} == {"weight": (4, 3), "bias": (4,)}


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@ARCHIVE
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "__builtin__.eval"),
        (getattr, ("", "join"), "__builtin__.getattr"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (torch.nn.Linear, (3, 4), "torch.nn.modules.linear.Linear"),
    ],
)
def test_other_names_are_refused_and_not_run(
    tmp_path: Path, archive: bool, function: Any, arguments: tuple[Any, ...], name: str
) -> None:
    canary = tmp_path / "canary"
    filled = [a.format(canary) if isinstance(a, str) else a for a in arguments]
    path = save(tmp_path / "bad.bin", {"a": torch.ones(2), "b": Call(function, *filled)}, archive)
    with pytest.raises(StartupError) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value) and name in str(caught.value)
    assert not canary.exists()


def test_a_name_with_dots_does_not_lead_further(tmp_path: Path) -> None:
    """Protocol 4 may ask for an attribute of a global."""
    program = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."
    path = tmp_path / "bad.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(StartupError, match=r"bad\.bin: its pickle asks for collections\.OrderedDict\.__init__"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("state", "text"),
    [([torch.ones(2)], "list"), ({"model": {"a": torch.ones(2)}}, "'model'"), ({3: torch.ones(2)}, "3")],
)
def test_what_is_no_dict_of_tensors(tmp_path: Path, state: object, text: str) -> None:
    with pytest.raises(StartupError) as caught:
        read_pickled(save(tmp_path / "odd.bin", state))
    assert "odd.bin" in str(caught.value) and text in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" * 9])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.bin").write_bytes(content)
    with pytest.raises(StartupError, match=r"odd\.bin: not a readable file"):
        read_pickled(tmp_path / "odd.bin")


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(data=strategies.data())
def test_damage_never_ends_in_a_crash(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        program = bytearray(archive.read("archive/data.pkl"))
    # A memo's place is left alone: CPython makes room for whatever is said.
    fixed = {at + 1 for at, code in enumerate(program) if code == pickle.LONG_BINPUT[0]}
    at = data.draw(strategies.sampled_from(sorted(set(range(len(program))) - fixed)))
    program[at] = data.draw(strategies.sampled_from([b for b in range(256) if b != pickle.LONG_BINPUT[0]]))
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(program))
    try:
        read_pickled(path)
    except StartupError as error:
        assert "x.bin" in str(error)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin", {"a": torch.ones(3)})
    code = "import sys; from pathlib import Path; from tgi.core.pickled import read_pickled; "
    code += "read_pickled(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
