"""The real model's tokenizer: text that is streamed is the text itself."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgi.launcher import flags
from tgi.launcher.download import resolve_model
from tgi.launcher.launch import store
from tgi.router.stream import Detokenizer
from tgi.router.tokenizer import Tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(resolve_model(flags.DEFAULT_MODEL, None, store(flags.cache_options())).folder))


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x", add_special_tokens=False), skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
@settings(max_examples=500)
def test_any_tokens_stream_as_the_library_decodes_them(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert tokenizer.vocab_size == 49152
    assert "".join(streamed(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


# It has no tokens for some bytes: of a few control characters, and of planes that have no characters yet.
CHARACTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\ufffd\x04\x06\x13\x14\x16\x1d"
)


@given(text=st.text(CHARACTERS))
@settings(max_examples=500)
def test_any_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False), skip=False)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_every_token_says_what_it_says_in_a_text(tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x", add_special_tokens=False)
    for id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(id).decode(errors="replace")
        assert f"x{text}x" == tokenizer.decode([x, id, x], skip_special_tokens=False)
