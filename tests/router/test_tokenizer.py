import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.small_tokenizers import KINDS, serialized, write
from tgi.core.errors import StartupError
from tgi.core.vocabulary import BYTE_ALPHABET
from tgi.router.galactica import MARKER
from tgi.router.stream import Detokenizer
from tgi.router.tokenizer import SHORT, Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_byte_alphabet_is_the_library_s() -> None:
    assert sorted(BYTE_ALPHABET) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))


def test_encodes_and_decodes_as_the_library(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, kind))
    backend = tokenizers.Tokenizer.from_str(serialized(kind))
    for text in ("the cat sat", " two  spaces", "</s>x<s>", "héllo 你好", "a long 你好 " * SHORT):
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == backend.encode(text, add_special_tokens=special).ids
            assert tokenizer.decode(ids, skip_special_tokens=special) == backend.decode(
                ids, skip_special_tokens=special
            )


@pytest.mark.parametrize("work", [Tokenizer.encode, Tokenizer.spans])
def test_long_texts_hold_up_no_other_thread(tmp_path: Path, work: Callable[..., Any]) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "byte_level"))
    begun, heard = Event(), Event()

    def begin() -> bool:
        begun.set()
        work(tokenizer, "cat " * 100_000, add_special_tokens=False)
        return heard.is_set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # a thread that doesn't let others run isn't interrupted
    try:
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(begin)
            begun.wait()
            heard.set()
            assert future.result()
    finally:
        sys.setswitchinterval(interval)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(serialized("byte_level"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(write(tmp_path) / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1


def test_spans_count_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "byte_level"))
    text = "hé 😀 cat"
    spans = tokenizer.spans(text, add_special_tokens=False)
    assert [id for id, *_ in spans] == tokenizer.encode(text, add_special_tokens=False)
    data = text.encode()
    for _, piece, start, stop in spans:
        assert data[start:stop].decode() == piece
    assert spans[0][2] == 0
    assert spans[-1][3] == len(data)
    # No token covers the character, so its four bytes are tokens that all show it.
    assert [span[1:] for span in spans if "😀" in span[1]] == [("😀", 4, 8)] * 4


def test_spans_of_added_specials_are_empty(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "llama"))
    spans = tokenizer.spans("the cat", add_special_tokens=True)
    assert spans[0] == (1, "", 0, 0)
    assert spans[-1][3] == 7
    assert all(start < stop for _, _, start, stop in spans[1:])


def test_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "byte_level"))
    ids = tokenizer.encode("the</s>", add_special_tokens=False)
    assert [tokenizer.piece(id) for id in ids] == ["the", "</s>"]
    (euro, *_) = tokenizer.encode("€", add_special_tokens=False)
    assert tokenizer.piece(euro) == "\ufffd"
    assert tokenizer.token_bytes(euro) == "€".encode()[:1]
    assert tokenizer.piece(10**6) == ""
    assert tokenizer.token_bytes(10**6) == b""


def test_token_bytes_of_a_space_before_a_word(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "llama"))
    (the,) = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.piece(the) == "the"
    assert tokenizer.token_bytes(the) == b" the"
    assert tokenizer.token_bytes(the, first=True) == b"the"


@given(data=st.data())
def test_token_bytes_join_to_the_text_of_any_tokens(data: st.DataObject, byte_level_tokenizer: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level_tokenizer.vocab_size + 5), max_size=40))
    joined = b"".join(map(byte_level_tokenizer.token_bytes, ids))
    assert joined.decode(errors="replace") == byte_level_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("model"), "byte_level"))


def test_special_tokens_come_from_both_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        write(
            tmp_path,
            "byte_level",
            tokenizer_config={"eos_token": {"content": "<think>"}, "pad_token": "the", "unk_token": None},
            special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
        )
    )
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<think>", "pad_token": "the"}
    named = {tokenizer.decode([id], skip_special_tokens=False) for id in tokenizer.special_ids}
    assert named == {"<unk>", "<s>", "</s>", "<|im_end|>", "<|end▁of▁text|>", "<think>", "the"}
    ids = tokenizer.encode("a <think>cat", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a cat"


def test_a_special_token_that_the_vocabulary_lacks_gets_no_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, "byte_level", tokenizer_config={"pad_token": "[PAD]"}))
    size = tokenizers.Tokenizer.from_str(serialized("byte_level")).get_vocab_size()
    assert tokenizer.vocab_size == size
    assert max(tokenizer.encode("x[PAD]", add_special_tokens=True)) < size


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config": {"eos_token_id": 7}}, {7}),
        ({"generation_config": {"eos_token_id": [7, 8]}}, {7, 8}),
        ({"generation_config": {"eos_token_id": [7, 8]}, "tokenizer_config": {"eos_token": "</s>"}}, {2, 7, 8}),
        ({"generation_config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "</s>"}}, {2}),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 9}}, {2, 9}),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 9}}, {7}),
        ({"generation_config": {}, "config": {"eos_token_id": 9}}, {9}),
        ({"config": {"eos_token_id": 9}}, {9}),
        ({"config": {"text_config": {"eos_token_id": [9, 10]}}}, {9, 10}),
        ({"tokenizer_config": {"eos_token": "[not in the vocabulary]"}}, set()),
        ({}, set()),
    ],
)
def test_end_tokens(tmp_path: Path, files: dict[str, Any], eos: set[int]) -> None:
    assert Tokenizer.load(write(tmp_path, **files)).eos_ids == eos


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 2.5, 10**30])
def test_end_tokens_that_are_no_ids(tmp_path: Path, value: object) -> None:
    folder = write(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(StartupError, match=r"generation_config\.json: eos_token_id"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("value", "length"), [(2048, 2048), (1e30, None), (None, None)])
def test_model_max_length(tmp_path: Path, value: object, length: int | None) -> None:
    folder = write(tmp_path, tokenizer_config={"model_max_length": value})
    assert Tokenizer.load(folder).model_max_length == length


def test_chat_templates_in_order_of_precedence(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_config={"chat_template": "config"})
    assert Tokenizer.load(folder).chat_templates == {"default": "config"}
    write(tmp_path, chat_template={"chat_template": "legacy"})
    assert Tokenizer.load(folder).chat_templates == {"default": "legacy"}
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.load(folder).chat_templates == {"default": "jinja"}
    own = folder / "own.json"
    own.write_text(json.dumps({"eos_token": "</s>"}))
    assert Tokenizer.load(folder, own).chat_templates == {"default": "jinja"}
    own.write_text(json.dumps({"eos_token": "</s>", "chat_template": "own"}))
    tokenizer = Tokenizer.load(folder, own)
    assert tokenizer.chat_templates == {"default": "own"}
    assert tokenizer.special_tokens["eos_token"] == "</s>"


def test_named_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write(tmp_path, tokenizer_config={"chat_template": templates})
    assert list(Tokenizer.load(folder).chat_templates.items()) == [("default", "plain"), ("tool_use", "tools")]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert list(Tokenizer.load(folder).chat_templates) == ["default", "tool_use", "rag"]
    # A file that is a whole template of its own makes those of the config obsolete, as in transformers.
    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(folder).chat_templates == {"default": "new", "rag": "rag"}
    write(tmp_path, tokenizer_config={"chat_template": {"default": "a", "b": "c"}})
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).chat_templates == {"default": "a", "b": "c", "rag": "rag"}


@pytest.mark.parametrize("jinja", [True, False])
@pytest.mark.parametrize("additional", [True, False])
@pytest.mark.parametrize(
    "config", ["config", [{"name": "default", "template": "c"}, {"name": "tool_use", "template": "t"}]]
)
def test_chat_templates_are_found_as_transformers_finds_them(
    tmp_path: Path, config: object, additional: bool, jinja: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write(tmp_path, tokenizer_config={"chat_template": config})
    if jinja:
        (folder / "chat_template.jinja").write_text("jinja")
    if additional and jinja:  # without a default beside them, transformers would lose the config's
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder)).chat_template
    assert Tokenizer.load(folder).chat_templates == (theirs if isinstance(theirs, dict) else {"default": theirs})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not JSON"),
        ("tokenizer_config.json", "[1, 2]"),
        ("tokenizer_config.json", '{"chat_template": 1}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("special_tokens_map.json", "{"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
        ("generation_config.json", '{"eos_token_id": [true]}'),
        ("chat_template.json", "-"),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write(tmp_path)
    (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(StartupError, match=name):
        Tokenizer.load(folder)


def test_without_a_fast_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json is missing: a fast tokenizer is needed"):
        Tokenizer.load(tmp_path)


def test_tokenizer_config_path_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--tokenizer-config-path"):
        Tokenizer.load(write(tmp_path), tmp_path / "nowhere.json")


def test_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    folder = write(tmp_path, kind, tokenizer_config=config)
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.chat_templates == {"default": theirs.chat_template}
    for text in ("the cat <s>sat</s>", "x", "größe\n\n 1"):
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs(text)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    shutil.rmtree(folder)


def test_galactica_reads_sequences_character_by_character(tmp_path: Path) -> None:
    backend = KINDS["byte_level"]()
    pre = tokenizers.pre_tokenizers
    backend.pre_tokenizer = pre.Sequence([pre.Split(MARKER, "removed"), backend.pre_tokenizer])
    backend.add_special_tokens(["[START_AMINO]", "[END_AMINO]"])
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    text = "the cat [START_AMINO]the é[END_AMINO] the cat[START_AMINO][END_AMINO][START_DNA]cat[END_AMINO]"
    plain = backend.encode("the", add_special_tokens=False).ids
    spans = tokenizer.spans(text, add_special_tokens=False)
    assert [span[0] for span in spans] == tokenizer.encode(text, add_special_tokens=False)
    first = [piece for _, piece, _, _ in spans[: [span[1] for span in spans].index("[END_AMINO]") + 1]]
    assert first[first.index("[START_AMINO]") + 1 : -1] == ["t", "h", "e", " ", "é", "é"]
    assert spans[0][0] == plain[0]
    raw = text.encode()
    assert all(raw[start:stop].decode() == piece for _, piece, start, stop in spans)
    assert tokenizer.decode([span[0] for span in spans], skip_special_tokens=False) == text
    assert tokenizer.shown_ids == tokenizer.special_ids - {tokenizer.added["<s>"], tokenizer.added["</s>"]}
    detokenizer = Detokenizer(tokenizer, [5], skip_special_tokens=True)
    ids = [tokenizer.added["[START_AMINO]"], tokenizer.added["</s>"], *plain]
    assert "".join(map(detokenizer.push, ids)) == "[START_AMINO]the"


def test_santacoder_s_marks_are_single_tokens_and_shown(tmp_path: Path) -> None:
    backend = KINDS["byte_level"]()
    backend.add_tokens(["<fim-prefix>", "<fim-suffix>"])
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("<fim-prefix>the<fim-suffix>", add_special_tokens=False)
    assert {ids[0], ids[-1]} == tokenizer.shown_ids <= tokenizer.special_ids
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(map(detokenizer.push, ids)) == "<fim-prefix>the<fim-suffix>"
    assert "<fim-middle>" not in tokenizer.added, "the model has no such token"
