"""The loader: every tensor once, none forgotten, and clear words for every way a checkpoint can be broken."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from tests.parity.conftest import load, logits, tokens, write_reference
from tests.parity.test_more import VARIANTS
from tests.tiny import write_model
from tests.tiny_gguf import write_gguf
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.launcher.gguf import import_gguf
from tgi.models.registry import load_model

Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama")


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the one file of weights after ``change`` has had its way with the tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split(folder: Path) -> None:
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    save_file(dict(tensors[::2]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[1::2]), folder / "model-00002-of-00002.safetensors")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(StartupError) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value)


def test_several_files_are_one_checkpoint(folder: Path):
    whole = logits(load(folder), tokens(9))
    split(folder)
    assert torch.equal(logits(load(folder), tokens(9)), whole)


def test_a_stack_of_fewer_experts_than_the_config_has(tmp_path: Path):
    family, config = VARIANTS["granite-moe"]
    folder = write_reference(tmp_path, family, **config)
    load(folder)
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    edit(folder, lambda t: t.update({name: t[name][:5]}))
    refused(folder, name, "12 matrices")


def test_derived_tensors_are_ignored(folder: Path):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    load(folder)


def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path: Path):
    folder = write_model(tmp_path, "llama", tie_word_embeddings=True)
    tied = logits(load(folder), tokens(9))
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert torch.equal(logits(load(folder), tokens(9)), tied)


def pickled(folder: Path, *, archive: bool = True, files: int = 1) -> list[Path]:
    """Replace the safetensors by ``files`` of torch.save's."""
    tensors = sorted(load_torch(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    paths = [folder / f"pytorch_model-{n + 1:05}-of-{files:05}.bin" for n in range(files)]
    for number, path in enumerate(paths):
        torch.save(dict(tensors[number::files]), path, _use_new_zipfile_serialization=archive)
    return paths


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_torch_s_own_files(folder: Path, archive: bool, files: int):
    expected = logits(load(folder), tokens(9))
    pickled(folder, archive=archive, files=files)
    assert torch.equal(logits(load(folder), tokens(9)), expected)


def test_tied_tensors_of_one_file_are_one(tmp_path: Path):
    folder = write_model(tmp_path, "llama", tie_word_embeddings=True)
    expected = logits(load(folder), tokens(9))
    (path,) = pickled(folder)
    state = torch.load(path)
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, path)
    assert torch.equal(logits(load(folder), tokens(9)), expected)


def test_masks_are_ignored_whatever_their_type(folder: Path):
    expected = logits(load(folder), tokens(9))
    mask = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_torch(load_torch(folder / "model.safetensors") | mask, folder / "model.safetensors")
    assert torch.equal(logits(load(folder), tokens(9)), expected)
    (path,) = pickled(folder)
    torch.save(torch.load(path) | mask, path)
    assert torch.equal(logits(load(folder), tokens(9)), expected)


def test_a_program_among_the_weights_is_refused(folder: Path, tmp_path: Path):
    class Program:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    (path,) = pickled(folder)
    torch.save(torch.load(path) | {"x": Program()}, path)
    refused(folder, path.name, "posix.system")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_file_of_torch_s(folder: Path, length: int):
    (path,) = pickled(folder)
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, path.name, "not a readable file of torch.save's")


@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf"])
def test_every_format_gives_the_same_model(tmp_path: Path, form: str, stored: torch.dtype, served: torch.dtype):
    folder = write_model(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    if form == "gguf":
        path = write_gguf(folder, {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[stored])
    tensors = load_torch(folder / "model.safetensors")
    # A GGUF file keeps vectors as they are.
    save_torch(
        {n: t.to(stored) if t.dim() > 1 or form != "gguf" else t for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    expected = logits(load(folder, dtype=served), tokens(9))
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(path)])
    if form == "bin":
        files = msgspec.structs.replace(files, weights=[str(path) for path in pickled(folder)])
    elif form == "gguf":
        files = msgspec.structs.replace(files, folder=str(import_gguf(path, tmp_path)))
    ours = load_model(files, served, torch.device("cpu"), progress=lambda done, total: None)
    assert torch.equal(logits(ours, tokens(9)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(folder: Path, dtype: torch.dtype):
    halves = {n: torch.from_numpy(t).to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    save_torch(halves, folder / "model.safetensors")
    narrow = logits(load(folder), tokens(9))
    save_torch({n: t.float() for n, t in halves.items()}, folder / "model.safetensors")
    assert torch.equal(logits(load(folder), tokens(9)), narrow)


def test_a_model_in_half_precision_runs(folder: Path):
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    narrow = load_model(files, torch.bfloat16, torch.device("cpu"), progress=lambda done, total: None)
    assert (logits(narrow, tokens(9)) - logits(load(folder), tokens(9))).abs().mean() < 0.1


def test_progress_counts_bytes_to_the_end(folder: Path):
    steps: list[tuple[int, int]] = []
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(folder / "model.safetensors")])
    load_model(files, torch.float32, torch.device("cpu"), progress=lambda done, total: steps.append((done, total)))
    size = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1] == (size, size)


Rows = dict[str, dict[str, object]]


def missing(rows: Rows) -> None:
    del rows["model.layers.1.mlp.up_proj.weight"]


def of_the_wrong_shape(rows: Rows) -> None:
    rows["model.norm.weight"]["shape"] = (65,)


def surplus(rows: Rows) -> None:
    rows["model.layers.0.self_attn.q_proj.bias"] = {"shape": (64,)}


@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, ("model.layers.1.mlp.up_proj.weight", "missing")),
        (of_the_wrong_shape, ("model.norm.weight", "(65,)", "(64,)")),
        (surplus, ("model.layers.0.self_attn.q_proj.bias", "not used")),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(
    folder: Path, tmp_path: Path, form: str, change: Callable[[Rows], None], words: tuple[str, ...]
):
    path = folder / "model.safetensors"
    if form == "gguf":
        path = write_gguf(folder)
        index = import_gguf(path, tmp_path) / "gguf_index.json"
        rows = json.loads(index.read_bytes())
        spare = rows["model.norm.weight"]
        change(rows)
        index.write_text(json.dumps({name: spare | row for name, row in rows.items()}))
        place = index.parent
    else:
        tensors = load_torch(path)
        rows = {name: {"shape": tuple(tensor.shape)} for name, tensor in tensors.items()}
        change(rows)
        found = {name: tensors.get(name, torch.ones(0)) for name in rows}
        changed = {n: t if t.shape == rows[n]["shape"] else torch.ones(rows[n]["shape"]) for n, t in found.items()}
        save_torch(changed, path)
        if form == "bin":
            (path,) = pickled(folder)
        place = folder
    files = ModelFiles(model_id="tiny", folder=str(place), weights=[str(path)])
    with pytest.raises(StartupError) as caught:
        load_model(files, torch.float32, torch.device("cpu"), progress=lambda done, total: None)
    for word in (path.name, *words):
        assert word in str(caught.value)


def test_a_tensor_in_two_files(folder: Path):
    split(folder)
    save_file({"model.norm.weight": np.ones(64, np.float32)}, folder / "more.safetensors")
    refused(folder, "more.safetensors", "model.norm.weight", "also in")


def test_numbers_that_need_scales(folder: Path):
    edit(folder, lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}))
    refused(folder, "model.safetensors", "model.norm.weight", "I8")


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_file(folder: Path, length: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, "model.safetensors", "not a readable safetensors file")


def test_a_file_that_is_something_else(folder: Path):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "model.safetensors", "not a readable safetensors file")


def test_no_files_at_all(folder: Path):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.embed_tokens.weight", "missing")
