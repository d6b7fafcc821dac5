from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_tokenizers import KINDS, write
from tgi.core.messages import Sampling
from tgi.router.stream import Detokenizer, Growth, Stops, Transcript
from tgi.router.tokenizer import Tokenizer
from tgi.router.validate import Generation
from tgi.router.wire.native import GenerateParameters


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(write(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


EXACT = sorted(KINDS.keys() - {"word_suffix"})
"""word_suffix differs at both ends of the text: there a space belongs to the word before it."""


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
@settings(max_examples=80)
def test_stream_equals_whole(kind: str, data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    skip = data.draw(st.booleans())
    tokenizer = tokenizers_by_kind[kind]
    prompt = tokenizer.encode("the cat", add_special_tokens=True)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=30))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if "\ufffd" in whole and kind in ("llama", "gemma", "unigram_bytes"):
        return  # see test_a_wrong_byte_costs_only_itself
    assert "".join(stream(tokenizer, prompt, ids, skip=skip)) == whole.removeprefix(before)


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
@settings(max_examples=40)
def test_stream_equals_whole_where_no_text_precedes_it(
    kind: str, data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    plain = [id for id in range(tokenizer.vocab_size) if id not in tokenizer.special_ids]
    ids = [data.draw(st.sampled_from(plain)), *data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))]
    prompt = data.draw(st.lists(st.sampled_from(sorted(tokenizer.special_ids))))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" in whole and kind in ("llama", "gemma", "unigram_bytes"):
        return
    assert "".join(stream(tokenizer, prompt, ids, skip=True)) == whole


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
@settings(max_examples=40)
def test_no_piece_has_a_part_of_a_character(
    kind: str, data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    """Pieces of a text are text, whatever the text: nothing of it is lost, and nothing comes twice."""
    tokenizer = tokenizers_by_kind[kind]
    # An added token that a byte-level decoder takes for bytes is lost by the library, too.
    unlike = "\ufffd▁" + ("éö" if kind == "byte_level_added" else "")
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=unlike)))
    ids = tokenizer.encode(text, add_special_tokens=True)
    pieces = stream(tokenizer, [], ids, skip=True)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces).split() == tokenizer.decode(ids, skip_special_tokens=True).split()
    assert pieces[-1] == ""


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


def first_stop(stops: list[str], text: str, after: int = 0) -> tuple[int, str] | None:
    for end in range(after + 1, len(text) + 1):
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


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    early=st.lists(AB),
    late=st.lists(AB),
    keep=st.booleans(),
)
@settings(max_examples=500)
def test_stops_that_are_complete_too_early_do_not_count(
    stops: list[str], early: list[str], late: list[str], keep: bool
) -> None:
    finder, text = Stops(stops, keep=keep), "".join(early + late)
    out = "".join(finder.push(piece, may_end=False)[0] for piece in early)
    stop = None
    for piece in late:
        grown, stop = finder.push(piece)
        out += grown
        if stop is not None:
            break
    found = first_stop(stops, text, after=len("".join(early)))
    if found is None:
        assert (out + finder.flush(), stop) == (text, None)
    else:
        end, expected = found
        assert (out, stop) == (text[: end if keep else end - len(expected)], expected)


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


# Both together, token by token


def generation(tokenizer: Tokenizer, **fields: Any) -> Generation:
    values: dict[str, Any] = {
        "parameters": GenerateParameters(),
        "text": "the",
        "token_ids": tokenizer.encode("the", add_special_tokens=False),
        "max_new_tokens": 100,
        "sampling": Sampling(min_tokens=fields.pop("min_tokens", 0)),
        "stop": [],
        "keep_stop": False,
        "stop_token_ids": [],
        "skip_special_tokens": True,
        "shown": frozenset(),
        "prompt_logprobs": False,
        "cache_salt": b"",
        "priority": 0,
    }
    return Generation(**values | fields)


def grow(tokenizer: Tokenizer, ids: list[int], **fields: Any) -> list[Growth]:
    """What comes of each token, as far as they go."""
    transcript, grown = Transcript(tokenizer, generation(tokenizer, **fields)), []
    for at, id in enumerate(ids, 1):
        grown.append(transcript.push(id, last=at == len(ids)))
        if grown[-1].stop is not None:
            break
    return grown


def answer(tokenizer: Tokenizer, text: str, **fields: Any) -> str:
    return "".join(one.text for one in grow(tokenizer, tokenizer.encode(text, add_special_tokens=False), **fields))


@pytest.fixture(scope="module")
def byte_level(tokenizers_by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_kind["byte_level"]


@given(data=st.data())
@settings(max_examples=200)
def test_what_comes_of_tokens_is_the_text_up_to_the_stop(
    data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_kind[data.draw(st.sampled_from(sorted(KINDS)))]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=20))
    skip, keep, least = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 20))
    prompt = generation(tokenizer).token_ids
    pieces = stream(tokenizer, prompt, ids, skip=skip)
    pieces[-2:] = ["".join(pieces[-2:])]
    whole, early = "".join(pieces), len("".join(pieces[:least]))
    # Stop strings that occur, most of them.
    cuts = st.integers(0, len(whole))
    stops = [whole[min(cut) : max(cut)] or "?" for cut in data.draw(st.lists(st.tuples(cuts, cuts), max_size=3))]
    grown = grow(tokenizer, ids, stop=stops, keep_stop=keep, skip_special_tokens=skip, min_tokens=least)
    found = first_stop(stops, whole, after=early)
    text, (*_, last) = "".join(one.text for one in grown), grown
    if found is None:
        assert (text, last.stop, len(grown)) == (whole, None, len(ids))
    else:
        end, stop = found
        assert (text, last.stop) == (whole[: end if keep else end - len(stop)], stop)
        # It ended with the token that completes the stop string.
        assert len("".join(pieces[: len(grown) - 1])) < end <= len("".join(pieces[: len(grown)]))
    assert [one.token for one in grown[:-1]] == pieces[: len(grown) - 1]


def test_shown_special_tokens_are_part_of_the_text(byte_level: Tokenizer) -> None:
    text = "cat<|im_end|>dog</s>"
    assert answer(byte_level, text) == "catdog"
    assert answer(byte_level, text, skip_special_tokens=False) == text
    # So a stop string may be, or have, the name of one.
    assert answer(byte_level, text, skip_special_tokens=False, stop=["<|im_end|>"]) == "cat"
    assert (
        answer(byte_level, text, skip_special_tokens=False, stop=["t<|im_end|>d"], keep_stop=True) == "cat<|im_end|>d"
    )
    assert answer(byte_level, text, stop=["<|im_end|>"]) == "catdog"
    # Hidden ones keep no stop string apart.
    assert answer(byte_level, text, stop=["td"]) == "ca"


def test_a_token_that_ends_the_text_is_not_in_it(byte_level: Tokenizer) -> None:
    (cat,) = byte_level.encode("cat", add_special_tokens=False)
    ids = [*byte_level.encode("the", add_special_tokens=False), cat, cat]
    assert [one.text for one in grow(byte_level, ids, stop_token_ids=[cat])] == ["the", "cat", ""]
    assert [one.text for one in grow(byte_level, ids, stop_token_ids=[cat], keep_stop=True)] == ["the", "cat", "cat"]
    assert [one.token for one in grow(byte_level, ids, stop_token_ids=[cat])] == ["the", "cat", ""]
    # What was held back for a stop string comes out with it.
    assert answer(byte_level, "the cat", stop=["the cat sat"], stop_token_ids=[cat]) == "the cat"
    ids = byte_level.encode("the</s>", add_special_tokens=False)
    for keep, shown in ((False, "the"), (True, "the</s>")):
        grown = grow(byte_level, ids, stop_token_ids=ids[-1:], skip_special_tokens=False, keep_stop=keep)
        assert "".join(one.text for one in grown) == shown


def test_no_stop_string_within_min_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a cat a cat", add_special_tokens=False)
    pieces = stream(byte_level, [], ids, skip=True)
    first = next(at for at in range(len(ids)) if "cat" in "".join(pieces[: at + 1])) + 1
    text = "a cat a cat"
    assert answer(byte_level, text, stop=["cat"], min_tokens=first - 1) == "a "
    assert answer(byte_level, text, stop=["cat"], min_tokens=first) == "a cat a "
    assert answer(byte_level, text, stop=["cat"], min_tokens=len(ids)) == text
    # One that only begins within them counts.
    assert answer(byte_level, text, stop=["cat a"], min_tokens=first) == "a "


def test_an_end_within_a_character_comes_with_the_last_token(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x😀", add_special_tokens=False)[:-1]
    assert [one.text for one in grow(byte_level, ids)] == ["x", "", "", "\ufffd"]
    assert [one.stop for one in grow(byte_level, ids, stop=["\ufffd"])] == [None, None, None, "\ufffd"]
