"""`text-generation-server detect-watermark`: what it prints, its status, and what it needs of a model."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.tiny import write_model
from tests.tiny_gguf import write_gguf
from tgi.core.errors import StartupError
from tgi.core.watermark import detect, green
from tgi.launcher.detect import detect_watermark
from tgi.launcher.download import Store, resolve_description
from tgi.launcher.errors import ArgumentValidation, DownloadError
from tgi.launcher.flags import Options

WORDS = 300
WIDTH = 320
"""Of the logits: models have more rows than their tokenizers have tokens."""
COMMAND = [sys.executable, "-c", "import sys; from tgi.cli import server; sys.exit(server())", "detect-watermark"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word is a token. The tokenizer cuts, pads and frames prompts, all of which mustn't touch a text."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({f"w{id}": id for id in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=400, pad_token="w3", pad_id=3)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": WIDTH}))
    return folder


def text(gamma: float | None, count: int = 60) -> str:
    """``count`` words, each green behind the one before it, or any."""
    chance = random.Random(3)
    ids = [chance.randrange(WORDS)]
    while len(ids) < count:
        bits = [1] * WORDS if gamma is None else green(ids[-1], WIDTH, gamma)[:WORDS].tolist()
        ids.append(chance.choices(range(WORDS), bits)[0])
    return " ".join(f"w{id}" for id in ids)


def run(model: Path, words: str | bytes, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    data = words.encode() if isinstance(words, str) else words
    return subprocess.run([*COMMAND, str(model), *arguments], input=data, capture_output=True, timeout=60)


def found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, **options: Any) -> Any:
    """(verdict, result) in this process."""
    (tmp_path / "text").write_text(words)
    given = Options(model_id=str(model), file=str(tmp_path / "text"), json=True, **options)
    verdict = detect_watermark(given, Store(tmp_path))
    return verdict, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_the_result_is_that_of_the_texts_own_tokens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gamma: float
) -> None:
    for marked in (gamma, None):
        words = text(marked)
        expected = detect([int(word[1:]) for word in words.split()], WIDTH, gamma)
        assert (expected.green == expected.scored) == (marked is not None)
        verdict, result = found(model, tmp_path, capsys, words, watermark_gamma=gamma)
        assert verdict == (marked is not None)
        assert result == {
            "watermarked": verdict,
            "z": expected.z,
            "p": expected.p,
            "scored": expected.scored,
            "green": expected.green,
            "gamma": gamma,
            "threshold": 4.0,
        }


def test_threshold_and_repeats(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = text(0.5, count=14)
    z = found(model, tmp_path, capsys, words)[1]["z"]
    assert not found(model, tmp_path, capsys, words)[0]
    assert found(model, tmp_path, capsys, words, threshold=z)[0]
    twice = f"{words} {words}"
    assert found(model, tmp_path, capsys, twice)[1]["scored"] == 14
    verdict, result = found(model, tmp_path, capsys, twice, count_repeats=True)
    assert result["scored"] == 27 and verdict


def test_status_and_words(model: Path, tmp_path: Path) -> None:
    marked, plain = run(model, text(0.5)), run(model, text(None), "-")
    assert (marked.returncode, plain.returncode) == (0, 1)
    assert marked.stdout.startswith(b"watermarked: z = 7.6") and b"(threshold 4), p = " in marked.stdout
    assert b" of 59 pairs of tokens are green (" in plain.stdout and b"; by chance 50%)" in plain.stdout
    assert plain.stdout.startswith(b"not watermarked: z = ")
    assert marked.stderr == plain.stderr == b""
    (tmp_path / "text").write_text(text(0.5))
    for arguments in (["--json", str(tmp_path / "text")], [str(tmp_path / "text"), "--json", "--threshold", "7"]):
        done = run(model, "", *arguments)
        assert done.returncode == 0 and json.loads(done.stdout)["watermarked"] is True


@pytest.mark.parametrize("words", ["", "w5", text(0.5, count=16)])
def test_a_short_text_shows_nothing(model: Path, words: str) -> None:
    done = run(model, words)
    assert done.returncode == 1 and done.stdout.startswith(b"too short to show a watermark: z = ")


@pytest.mark.parametrize(
    ("arguments", "words", "error"),
    [
        (["/no/text"], "", "No such file or directory: '/no/text'"),
        ([], b"w1 \xff", "standard input is not UTF-8"),
        (["--watermark-gamma", "0"], "w1 w2", "gamma 0 of 320 tokens leaves nothing to detect"),
        (["--watermark-gamma", "1"], "w1 w2", "gamma 1 of 320 tokens leaves nothing to detect"),
        (["--revision", "main"], "", "ArgumentValidation: `--revision` has no meaning"),
        (["--threshold", "0"], "", "error: invalid value '0' for `--threshold`"),
        (["--watermark-delta", "2"], "", "error: unrecognized arguments: --watermark-delta"),
        (["x", "y"], "", "error: unrecognized arguments: y"),
    ],
)
def test_an_error_is_no_verdict(model: Path, arguments: list[str], words: str | bytes, error: str) -> None:
    done = run(model, words, *arguments)
    assert done.returncode == 2 and done.stdout == b"" and error in done.stderr.decode()


@pytest.mark.parametrize("reader", ["None", "lambda file: os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_bug_and_a_signal_are_no_verdict(model: Path, reader: str) -> None:
    script = f"import os, signal; from tgi.launcher import detect; detect._read = {reader}; {COMMAND[2]}"
    done = subprocess.run([sys.executable, "-c", script, *COMMAND[3:], str(model)], capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == b""
    assert (b"TypeError" in done.stderr) == (reader == "None")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"vocab_size": 250}, r"token 2\d\d is not in the model's vocabulary of 250"),
        ({"vocab_size": "many"}, "vocab_size: expected a positive integer"),
        ({}, "vocab_size is missing"),
        (None, "config.json is missing"),
    ],
)
def test_models_that_do_not_fit_are_told(model: Path, tmp_path: Path, config: Any, error: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text").write_text(text(None))
    with pytest.raises(StartupError, match=error):
        detect_watermark(Options(model_id=str(tmp_path), file=str(tmp_path / "text")), Store(tmp_path))


def test_a_tokenizer_that_cannot_be_read_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    options = Options(model_id=str(tmp_path), file=str(model / "config.json"))
    with pytest.raises(DownloadError, match=r"tokenizer.json is missing"):
        detect_watermark(options, Store(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"tokenizer.json can't be read"):
        detect_watermark(options, Store(tmp_path))


def test_a_gguf_file_has_its_tokenizer_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(write_model(tmp_path / "tiny", "llama"))
    (tmp_path / "text").write_text("the cat sat on the mat")
    options = Options(model_id=str(path), file=str(tmp_path / "text"), json=True)
    assert detect_watermark(options, Store(tmp_path / "cache")) is False
    folder = resolve_description(str(path), None, Store(tmp_path / "cache"))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat sat on the mat").ids
    width = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    assert json.loads(capsys.readouterr().out)["green"] == detect(ids, width, 0.5).green
    with pytest.raises(ArgumentValidation, match="--revision"):
        detect_watermark(dataclasses.replace(options, revision="main"), Store(tmp_path / "cache"))


def test_it_starts_without_torch(model: Path) -> None:
    script = f"import sys; {COMMAND[2].replace('sys.exit(server())', 'server()')}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *COMMAND[3:], str(model)], input=b"w1 w2", capture_output=True)
    assert done.stdout.splitlines()[-1] == b"False", done.stderr
