import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_tokenizers import KINDS, write
from tgi.router.stream import Detokenizer, Stops
from tgi.router.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(write(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


EXACT = ["byte_level", "llama", "gemma", "unigram", "word_piece", "words"]
"""word_suffix differs at both ends of the text: there a space belongs to the word before it."""


@given(data=st.data())
@settings(max_examples=300)
def test_stream_equals_whole(data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    kind = data.draw(st.sampled_from(EXACT))
    skip = data.draw(st.booleans())
    tokenizer = tokenizers_by_kind[kind]
    prompt = tokenizer.encode("the cat", add_special_tokens=True)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=30))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if "\ufffd" in whole and kind in ("llama", "gemma"):
        return  # see test_a_wrong_byte_costs_only_itself
    assert "".join(stream(tokenizer, prompt, ids, skip=skip)) == whole.removeprefix(before)


@given(data=st.data())
def test_encoded_text_comes_back(data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[data.draw(st.sampled_from(["byte_level", "gemma"]))]
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.encode("the", add_special_tokens=False)
    pieces = stream(tokenizer, prompt, ids, skip=False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_a_character_comes_whole_with_its_last_byte(kind: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode("x😀", add_special_tokens=False)[-4:]
    assert stream(tokenizer, prompt, ids, skip=True) == ["", "", "", "😀", ""]


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_an_end_within_a_character_is_not_lost(kind: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode("cat😀", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, prompt, ids, skip=True)
    assert "".join(pieces[:-1]).lstrip() == "cat"
    assert pieces[-1] == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_a_wrong_byte_costs_only_itself(kind: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    prompt = tokenizer.encode("the", add_special_tokens=False)
    smile = tokenizer.encode("x😀", add_special_tokens=False)[-4:]
    assert "".join(stream(tokenizer, prompt, [*smile, smile[1], *smile], skip=True)) == "😀\ufffd😀"


def test_leading_space(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["llama"]
    (cat,) = tokenizer.encode("cat", add_special_tokens=False)
    the = tokenizer.encode("the", add_special_tokens=True)
    assert stream(tokenizer, the, [cat], skip=True) == [" cat", ""]
    # A prompt that ends in special tokens has text before the answer all the same …
    assert stream(tokenizer, [*the, 2, 1, 2, 1, 2, 1], [cat], skip=True) == [" cat", ""]
    # … and one that has no text has none; special tokens of the answer don't count either.
    for skip, special in ((True, ""), (False, "</s>")):
        assert stream(tokenizer, [1], [2, cat, cat], skip=skip) == [special, "cat", " cat", ""]


def test_special_tokens_are_shown_or_skipped(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode("a<think>b<|end▁of▁text|>", add_special_tokens=False)
    assert "".join(stream(tokenizer, prompt, ids, skip=True)) == "a<think>b"
    assert "".join(stream(tokenizer, prompt, ids, skip=False)) == "a<think>b<|end▁of▁text|>"


def test_words_that_end_in_a_suffix_are_kept_apart(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["word_suffix"]
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode("quick dogs sat", add_special_tokens=False)
    assert "".join(stream(tokenizer, prompt, ids, skip=True)).strip() == "quick dogs sat"


def run(stops: list[str], pieces: list[str], *, keep: bool) -> tuple[list[str], str | None]:
    """The pieces as they come out, the last one from flush, and the match."""
    finder = Stops(stops, keep=keep)
    out = []
    for piece in pieces:
        text, stop = finder.push(piece)
        out.append(text)
        if stop is not None:
            return out, stop
    return [*out, finder.flush()], None


@pytest.mark.parametrize(
    ("stops", "pieces", "kept", "stripped", "stop"),
    [
        ([], ["a", "b"], ["a", "b", ""], ["a", "b", ""], None),
        (["END"], ["a", "b"], ["a", "b", ""], ["a", "b", ""], None),
        (["END"], ["a ", "END"], ["a ", "END"], ["a ", ""], "END"),
        # inside a token's text, with text on both sides
        (["END"], ["a ENDb", "c"], ["a END"], ["a "], "END"),
        # across tokens
        (["END"], ["aE", "N", "Dx"], ["aE", "N", "D"], ["a", "", ""], "END"),
        # a beginning that leads nowhere comes out late, with the token that shows it
        (["END"], ["aE", "N", "d"], ["aE", "N", "d", ""], ["a", "", "ENd", ""], None),
        (["END"], ["aE", "N"], ["aE", "N", ""], ["a", "", "EN"], None),
        # a beginning inside a beginning
        (["aab"], ["aa", "a", "b"], ["aa", "a", "b"], ["", "a", ""], "aab"),
        # the first to be complete wins, whatever the order of the list …
        (["bcd", "ab"], ["xabcd"], ["xab"], ["x"], "ab"),
        (["abcd", "bc"], ["a", "b", "cd"], ["a", "b", "c"], ["", "", "a"], "bc"),
        # … and the longest of those complete at the same place
        (["c", "bc", "abc"], ["xabc"], ["xabc"], ["x"], "abc"),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a\n", "b\n", "\n"], ["a", "\nb", ""], "\n\n"),
        # far longer than TGI's window of 200 characters
        (["y" * 500], ["x"] + ["y"] * 501, ["x"] + ["y"] * 500, ["x"] + [""] * 500, "y" * 500),
        (["👍🏽"], ["a👍", "🏽b"], ["a👍", "🏽"], ["a", ""], "👍🏽"),
    ],
)
def test_stops(stops: list[str], pieces: list[str], kept: list[str], stripped: list[str], stop: str | None) -> None:
    assert run(stops, pieces, keep=True) == (kept, stop)
    assert run(stops, pieces, keep=False) == (stripped, stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Stops(["a", ""], keep=True)


def first_stop(stops: list[str], text: str) -> tuple[int, str] | None:
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(found, key=len)
    return None


AB = st.text("ab", max_size=8)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), pieces=st.lists(AB), keep=st.booleans())
@settings(max_examples=500)
def test_stops_depend_on_the_text_alone(stops: list[str], pieces: list[str], keep: bool) -> None:
    text = "".join(pieces)
    out, stop = run(stops, pieces, keep=keep)
    found = first_stop(stops, text)
    if found is None:
        assert ("".join(out), stop) == (text, None)
    else:
        end, expected = found
        assert stop == expected
        assert "".join(out) == (text[:end] if keep else text[: end - len(expected)])


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), pieces=st.lists(AB))
def test_nothing_is_held_longer_than_needed(stops: list[str], pieces: list[str]) -> None:
    finder = Stops(stops, keep=False)
    seen = emitted = ""
    for piece in pieces:
        text, stop = finder.push(piece)
        if stop is not None:
            return
        seen += piece
        emitted += text
        held = seen[len(emitted) :]
        assert seen.startswith(emitted)
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = (seen[-n:] for n in range(len(held) + 1, len(seen) + 1))
        assert not any(stop.startswith(end) for end in longer for stop in stops)
