"""GGUF files become model folders that mean the same as the originals."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import pytest
import torch
from hypothesis import strategies
from tokenizers import Tokenizer

from tests import small_tokenizers
from tests.parity.conftest import load, logits, tokens
from tests.tiny import FAMILIES, write_model
from tests.tiny_gguf import write_gguf
from tgi.core.config import ModelFiles
from tgi.core.errors import StartupError
from tgi.core.model_config import read_config
from tgi.launcher.gguf import import_gguf
from tgi.launcher.gguf.reader import TYPES, read_gguf
from tgi.models.registry import Model, load_model

TEXTS = [
    "hello world, the cat sat on the dog",
    "  two  spaces\n\nand\ttabs ",
    "größe 你好 \U0001f642 é",
    "1234 56x7",
    "<s>ab</s> <s> c",
    "don't IT'S we'll",
    " ",
    "",
]


def load_gguf(path: Path, cache: Path, quantize: str | None = None) -> Model:
    files = ModelFiles(model_id="tiny", folder=str(import_gguf(path, cache)), weights=[str(path)])
    options: dict[str, Any] = {"max_total_tokens": 64, "quantize": quantize, "progress": lambda done, total: None}
    return load_model(files, torch.float32, torch.device("cpu"), **options)


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
    "original_max_position_embeddings": 64,
}
UNTOLD: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24, "sliding_window_pattern": None, "rope_local_base_freq": None},
}
"""What files don't tell, as it follows from the rest."""
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, UNTOLD.get(family, {})) for family in FAMILIES),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("qwen2", YARN),
        ("phi3", LONGROPE | {"sliding_window": 7, "partial_rotary_factor": 1.0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_the_same_weights_give_the_same_logits(tmp_path: Path, family: str, overrides: dict[str, Any]):
    folder = write_model(tmp_path / "model", family, **overrides)
    path = write_gguf(folder)
    theirs = logits(load(folder, max_total_tokens=64), tokens(40))
    assert torch.equal(logits(load_gguf(path, tmp_path), tokens(40)), theirs)


@pytest.mark.parametrize("kind", [row.name for row in TYPES.values() if row.name != "F32"])
def test_quantized_weights_are_read_as_they_were_written(tmp_path: Path, kind: str):
    folder = write_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512)
    path = write_gguf(folder, kind)
    theirs = logits(load(folder), tokens(9))
    assert torch.equal(logits(load_gguf(path, tmp_path), tokens(9)), theirs)


def test_types_are_those_of_ggml():
    for number, row in TYPES.items():
        assert gguf.GGMLQuantizationType[row.name] == number
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (row.elements, row.bytes)


def test_llama_3_rope_factors(tmp_path: Path):
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = write_model(tmp_path / "model", "llama", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    path = write_gguf(folder)
    theirs = logits(load(folder), tokens(40))
    assert (logits(load_gguf(path, tmp_path), tokens(40)) - theirs).abs().max() < 1e-4


def test_what_the_folder_holds(tmp_path: Path):
    path = write_gguf(write_model(tmp_path / "model", "llama"), tokenizer__ggml__eot_token_id=5)
    folder = import_gguf(path, tmp_path / "cache")
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["model_max_length"] == 512
    assert "{% for message in messages %}" in config["chat_template"]
    assert json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == [2, 5]
    shapes = {name: row["shape"] for name, row in json.loads((folder / "gguf_index.json").read_bytes()).items()}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [64, 100]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_tokenizers_encode_as_the_originals(tmp_path: Path, kind: str):
    folder = write_model(tmp_path / "model", "llama")
    small_tokenizers.write(folder, kind)
    original = tokenizer(folder)
    spaces = {"tokenizer__ggml__add_space_prefix": kind == "llama"} if kind != "byte_level" else {}
    ours = tokenizer(import_gguf(write_gguf(folder, **spaces), tmp_path / "cache"))
    assert ours.get_vocab() == original.get_vocab()
    for text in TEXTS:
        encoded = original.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).tokens == encoded.tokens
        for skip in (True, False):
            assert ours.decode(encoded.ids, skip) == original.decode(encoded.ids, skip)
    assert "<think>" in ours.encode("a<think>b", add_special_tokens=False).tokens


@pytest.mark.parametrize(("add", "ids"), [(True, [1]), (False, [])])
def test_bos_is_put_where_the_file_says(tmp_path: Path, add: bool, ids: list[int]):
    path = write_gguf(write_model(tmp_path / "model", "llama"), tokenizer__ggml__add_bos_token=add)
    ours = tokenizer(import_gguf(path, tmp_path / "cache"))
    assert ours.encode("hello").ids == ids + ours.encode("hello", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 123 don't  x", ["ab", " 123", " don", "'t", " ", " x"]),
        ("default", "ab 123", ["ab", " 123"]),
        ("smollm", "ab 123 x", ["ab", " ", "1", "2", "3", " x"]),
        ("refact", "ab½", ["ab", "½"]),
        ("command-r", "ab 123 x", ["ab", " ", "1", "2", "3", " x"]),
        ("mpt", "ab 123", ["ab", " 123"]),
        ("phi-2", "ab 123", ["ab", " 123"]),
        ("bloom", "ab 12, don't  x.", ["ab", " 12", ",", " don't", " ", " x", "."]),
        ("llama-bpe", "ab12345 DON'T\n\n x!!\n", ["ab", "123", "45", " DON", "'T", "\n\n", " x", "!!\n"]),
        ("qwen2", "ab123 it's\n x", ["ab", "1", "2", "3", " it", "'s", "\n", " x"]),
        ("gpt-4o", "fooBar don't 1234/\n", ["foo", "Bar", " don't", " ", "123", "4", "/\n"]),
        ("tekken", "fooBar don't 12", ["foo", "Bar", " don", "'t", " ", "1", "2"]),
    ],
)
def test_text_is_split_as_the_file_names_it(tmp_path: Path, pre: str, text: str, pieces: list[str]):
    path = write_gguf(write_model(tmp_path / "model", "llama"), pre=pre)
    ours = tokenizer(import_gguf(path, tmp_path / "cache"))
    alphabet = _alphabet()
    split = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str(text)]
    assert [bytes(alphabet.index(c) for c in piece).decode() for piece in split] == pieces


def _alphabet() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others follow from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def test_a_folder_is_reused_until_the_file_changes(tmp_path: Path):
    path = write_gguf(write_model(tmp_path / "model", "llama"))
    first = import_gguf(path, tmp_path / "cache")
    made = (first / "config.json").stat().st_mtime_ns
    assert import_gguf(path, tmp_path / "cache") == first
    assert (first / "config.json").stat().st_mtime_ns == made
    write_gguf(write_model(tmp_path / "model", "qwen2"))
    second = import_gguf(path, tmp_path / "cache")
    assert second != first
    assert read_config(second)["model_type"] == "qwen2"
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([first.name, second.name])


@pytest.mark.parametrize(
    "metadata",
    [
        {"general__architecture": "rwkv7"},
        {"tokenizer__ggml__pre": "unheard-of"},
        {"tokenizer__ggml__model": "bert"},
        {"tokenizer__ggml__eos_token_id": 431},
        {"llama__rope__scaling__type": "su"},
        {"llama__rope__scaling__attn_factor": 1.5},
        {"llama__attention__clamp_kqv": 8.0},
        {"llama__expert_count": 8},
        {"llama__block_count": "three"},
        {"llama__attention__head_count": 0},
        {"llama__attention__value_length": 8},
        {"split__count": 3},
        {"general__alignment": 0},
    ],
)
def test_refused_by_name(tmp_path: Path, metadata: dict[str, Any]):
    path = write_gguf(write_model(tmp_path / "model", "llama"), **metadata)
    with pytest.raises(StartupError) as caught:
        import_gguf(path, tmp_path / "cache")
    (key,) = metadata
    assert str(path) in str(caught.value)
    assert key.replace("__", ".") in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_an_unknown_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_gguf(write_model(tmp_path / "model", "llama"), llama__odd=1)
    with caplog.at_level(logging.WARNING):
        import_gguf(path, tmp_path / "cache")
    assert "llama.odd" in caplog.text


def test_a_tensor_that_nothing_uses(tmp_path: Path):
    folder = write_model(tmp_path / "model", "qwen3")
    path = write_gguf(folder)
    index = import_gguf(path, tmp_path / "cache") / "gguf_index.json"
    rows = json.loads(index.read_bytes())
    index.write_text(json.dumps(rows | {"blk.0.attn_sinks.weight": rows["model.norm.weight"]}))
    with pytest.raises(StartupError, match=r"model\.gguf.*attn_sinks"):
        load_gguf(path, tmp_path / "cache")


def test_a_file_that_shrank_after_its_import(tmp_path: Path):
    path = write_gguf(write_model(tmp_path / "model", "llama"))
    folder = import_gguf(path, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-100])
    files = ModelFiles(model_id="tiny", folder=str(folder), weights=[str(path)])
    with pytest.raises(StartupError, match=r"model\.gguf: truncated"):
        load_model(files, torch.float32, torch.device("cpu"), progress=lambda d, t: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("whole") / "model", "llama", num_hidden_layers=1, vocab_size=425)
    return write_gguf(folder)


@pytest.mark.parametrize("cut", [0, 3, 4, 23, 24, 30, 500, 3000, 9000, -1])
def test_a_truncated_file(tmp_path: Path, whole: Path, cut: int):
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(StartupError, match=r"cut\.gguf"):
        import_gguf(path, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" * 100, b"GGUF\x00\x00\x00\x03" + b"\xff" * 64])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes):
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=r"odd\.gguf"):
        read_gguf(path)


def test_a_cache_that_can_not_be_written(tmp_path: Path):
    path = write_gguf(write_model(tmp_path / "model", "llama"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StartupError, match="cache"):
        import_gguf(path, tmp_path / "cache" / "deeper")


def test_a_path_that_is_not_there(tmp_path: Path):
    with pytest.raises(StartupError, match=r"none\.gguf"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "cache")


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(data=strategies.data())
def test_damage_never_ends_in_a_crash(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: Any):
    """Any byte of the header may be anything: the file is read, or refused."""
    content = bytearray(whole.read_bytes())
    header = min(row.offset for row in read_gguf(whole).tensors.values())
    for _ in range(data.draw(strategies.integers(1, 3))):
        content[data.draw(strategies.integers(0, header - 1))] = data.draw(strategies.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "x.gguf").write_bytes(content)
    try:
        import_gguf(folder / "x.gguf", folder / "cache")
    except StartupError as error:
        assert "x.gguf" in str(error)


def test_importing_needs_no_torch(tmp_path: Path):
    path = write_gguf(write_model(tmp_path / "model", "llama"))
    code = "import sys; from pathlib import Path; from tgi.launcher.gguf import import_gguf; "
    code += (
        "import_gguf(Path(sys.argv[1]), Path(sys.argv[2])); assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "cache")], check=True)
