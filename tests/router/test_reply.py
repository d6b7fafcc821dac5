"""Replies as models of each family write them, recorded in ``replies/``, and whatever else they may write."""

import json
import random
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tgi.router.formats import CALL_NAMES, CALLS, REASONING, Calls, Format, format_of
from tgi.router.lark import MOST_SPACE
from tgi.router.reply import Parsed, ReplyParser

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "deep": {"type": "object"},
    },
    "required": ["city"],
}
FUNCTIONS: dict[str, dict[str, Any]] = {"weather": WEATHER, "weather_2": {}, "nothing": {}}


class Reply(msgspec.Struct, forbid_unknown_fields=True):
    """A recorded reply, and what it says."""

    reply: str
    reasoning: str = ""
    text: str = ""
    calls: list[list[str]] = []
    """Name and arguments of each, and the id where it follows from the reply."""
    complete: bool | None = None
    """Absent: as there are calls."""
    reasoning_format: str = "none"
    thinking: bool = False
    """The prompt has opened the reasoning."""

    def format(self, name: str) -> Format:
        return format_of("", (), name, self.reasoning_format)


class Replies(msgspec.Struct, forbid_unknown_fields=True):
    replies: list[Reply]


RECORDED = [
    (path.stem, reply)
    for path in sorted((Path(__file__).parent / "replies").glob("*.toml"))
    for reply in msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Replies).replies
]


class Folded(msgspec.Struct):
    reasoning: str = ""
    text: str = ""
    calls: list[list[str]] = []
    """Name, arguments and id of each."""
    complete: bool = False

    @property
    def told(self) -> tuple[str, str, list[list[str]], bool]:
        """Ids are drawn by lot."""
        return self.reasoning, self.text, [call[:2] for call in self.calls], self.complete


def fold(parser: ReplyParser, pieces: Iterable[str]) -> Folded:
    """All that is told of a reply that is pushed in these pieces."""
    whole = Folded(calls=[])

    def add(parsed: Parsed) -> None:
        whole.reasoning += parsed.reasoning
        whole.text += parsed.text
        for delta in parsed.calls:
            if delta.index == len(whole.calls):
                assert delta.id and delta.name is not None
                whole.calls.append([delta.name, "", delta.id])
            else:
                assert delta.index == len(whole.calls) - 1 and delta.id is delta.name is None
                assert delta.arguments
            whole.calls[delta.index][1] += delta.arguments

    for piece in pieces:
        add(parser.push(piece))
    add(parser.finish())
    whole.complete = parser.complete
    assert len({id for _, _, id in whole.calls}) == len(whole.calls)
    return whole


def read(format: Format, text: str, *, thinking: bool = False, functions: Any = FUNCTIONS) -> Folded:
    return fold(ReplyParser(format, functions, thinking=thinking), [text])


def cuts(data: st.DataObject, text: str) -> list[str]:
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=40)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def test_each_format_has_a_recorded_reply() -> None:
    assert {name for name, _ in RECORDED} == set(CALL_NAMES)
    assert {reply.reasoning_format for _, reply in RECORDED} == {"none", *(row.name for row in REASONING)}


@pytest.mark.parametrize(("name", "reply"), RECORDED)
def test_recorded(name: str, reply: Reply) -> None:
    format = reply.format(name)
    found = read(format, reply.reply, thinking=reply.thinking)
    assert (found.reasoning, found.text) == (reply.reasoning, reply.text)
    assert [call[: len(expected)] for call, expected in zip(found.calls, reply.calls, strict=True)] == reply.calls
    assert found.complete == (bool(reply.calls) if reply.complete is None else reply.complete)
    if found.complete:
        for _, arguments, _ in found.calls:
            json.loads(arguments)
    characters = fold(ReplyParser(format, FUNCTIONS, thinking=reply.thinking), reply.reply)
    assert characters.told == found.told


@given(st.data(), st.sampled_from(RECORDED))
def test_any_cutting_reads_the_same(data: st.DataObject, recorded: tuple[str, Reply]) -> None:
    name, reply = recorded
    length = data.draw(st.integers(0, len(reply.reply)))
    text, format = reply.reply[:length], reply.format(name)
    pieces = fold(ReplyParser(format, FUNCTIONS, thinking=reply.thinking), cuts(data, text))
    assert pieces.told == read(format, text, thinking=reply.thinking).told


def test_a_reply_cut_short_is_never_complete_within_arguments() -> None:
    for name, reply in RECORDED:
        for length in range(len(reply.reply)):
            found = read(reply.format(name), reply.reply[:length], thinking=reply.thinking)
            if found.complete:
                for _, arguments, _ in found.calls:
                    json.loads(arguments)


# --- Garbage ---------------------------------------------------------------------------------------------------------

FORMATS = [Format(calls, reasoning) for calls in CALLS for reasoning in (None, *REASONING)]


def crumbs(format: Format) -> list[str]:
    """Of which replies in this format, and what resembles them, are made."""
    calls, reasoning = format.calls, format.reasoning
    whole = calls.spelled([("weather", {"city": 'a "b"', "days": 3})])
    marks = [
        calls.opens,
        calls.head,
        calls.middle,
        calls.tail,
        calls.between,
        calls.closes,
        whole,
        whole[:-9],
        whole[5:],
    ]
    marks += [calls.opens + calls.head + calls.called(name) + calls.middle for name in ("nothing", "weather_", "other")]
    if reasoning is not None:
        marks += [reasoning.opens, reasoning.closes, reasoning.answers, *reasoning.dropped]
    others = [
        "weather",
        "nothing",
        " ",
        "\n",
        " " * MOST_SPACE,
        "{",
        "}",
        '"',
        "'",
        "\\",
        "(",
        ")",
        ",",
        "=",
        ":",
        "<",
        "☃",
    ]
    return [*filter(None, marks), *others, "a", "a", "1", "None"]


@settings(max_examples=300)
@given(st.data(), st.sampled_from(FORMATS), st.booleans())
def test_garbage(data: st.DataObject, format: Format, thinking: bool) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(crumbs(format)) | st.text(max_size=3), max_size=12)))
    thinking = thinking and format.reasoning is not None
    whole = read(format, text, thinking=thinking)
    pieces = fold(ReplyParser(format, FUNCTIONS, thinking=thinking), cuts(data, text))
    assert pieces.told == whole.told
    if not whole.calls and format.reasoning is None:
        assert whole.text == text
    assert read(format, text, thinking=thinking, functions={}).calls == []
    if format.reasoning is None:
        assert read(format, text, functions={}).text == text
    if whole.complete and format.calls.style.begins != "{":
        for _, arguments, _ in whole.calls:
            json.loads(arguments)


def test_much_garbage() -> None:
    """As above, faster."""
    draw = random.Random(0)
    for format in FORMATS * 4:
        text = "".join(draw.choices(crumbs(format), k=draw.randrange(30)))
        whole = read(format, text)
        assert fold(ReplyParser(format, FUNCTIONS), text).told == whole.told, (format, text)
        if not whole.calls and format.reasoning is None:
            assert whole.text == text


# --- Details ---------------------------------------------------------------------------------------------------------

HERMES, TGI, KIMI = (format_of("", (), name) for name in ("hermes", "tgi", "kimi_k2"))
MISTRAL = format_of("", (), "mistral")
CALL = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'


def test_without_tools_nothing_is_held_back() -> None:
    parser = ReplyParser(HERMES, {})
    for piece in (" ", "<", "tool_call", CALL):
        assert parser.push(piece) == Parsed(text=piece)
    assert parser.finish() == Parsed()


def test_text_comes_as_soon_as_it_is_known_to_be_text() -> None:
    parser = ReplyParser(HERMES, FUNCTIONS)
    told = [parser.push(piece).text for piece in ("Hello", " ", "you", ", ", "<", "tool", "s>", " 1 <", " 2")]
    assert told == ["Hello", "", " you", ",", "", "", " <tools>", " 1", " < 2"]


def test_arguments_come_as_they_are_written() -> None:
    text = '{"city": "Paris", "days": 7}'
    parser = ReplyParser(TGI, FUNCTIONS)
    deltas = [delta for c in f'{{"name": "weather", "parameters": {text}}}' for delta in parser.push(c).calls]
    assert [delta.arguments for delta in deltas] == list(text)


def test_a_call_is_announced_with_its_head() -> None:
    """Whatever its arguments look like, before any of them."""
    for row in CALLS:
        opening = f"{row.opens}{row.head.replace('#', '0')}{row.called('weather')}{row.middle.replace('#', '0')}"
        parser = ReplyParser(Format(row), FUNCTIONS)
        (delta,) = parser.push(opening.rstrip() + row.style.begins).calls
        assert (delta.index, delta.name, delta.arguments) == (0, "weather", "{")
        assert not parser.complete


def test_white_space_is_left_out() -> None:
    for before, behind in [("", ""), ("\n", " "), (" " * MOST_SPACE, "\n" * MOST_SPACE)]:
        assert read(HERMES, f"a{before}{CALL}{behind}{CALL}{behind}").told[1:3] == ("a", [["nothing", "{}"]] * 2)
    assert read(HERMES, f"{CALL}\n\nSo.").text == "\n\nSo."
    assert read(HERMES, f"a{' ' * (MOST_SPACE + 1)}{CALL}").text == "a "
    assert read(HERMES, " \n ").text == " \n "


def test_arguments_that_make_no_sense() -> None:
    """The call stays as it was streamed, but isn't whole."""
    found = read(format_of("", (), "pythonic"), "[weather(city='a', days=[1, }, nothing()]")
    assert found.told == ("", "}, nothing()]", [["weather", '{"city": "a", "days": [1, ']], False)


def test_ids() -> None:
    assert all(
        len(id) == 9 and id.isalnum() for _, _, id in read(MISTRAL, MISTRAL.calls.spelled([("nothing", {})] * 3)).calls
    )
    assert all(id.startswith("call_") for _, _, id in read(HERMES, CALL).calls)
    spelled = KIMI.calls.spelled([("nothing", {}), ("weather", {"city": "a"})])
    assert [id for _, _, id in read(KIMI, spelled).calls] == ["functions.nothing:0", "functions.weather:1"]


def test_a_name_that_begins_another() -> None:
    for row in CALLS:
        for name in ("weather", "weather_2"):
            assert [call[0] for call in read(Format(row), row.spelled([(name, {})] * 2)).calls] == [name] * 2
        for name in ("weathe", "weather_", "weather_22"):
            text = row.spelled([(name, {})])
            assert read(Format(row), text).told == ("", text, [], False)


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row.name)
@example(arguments={})
@given(arguments=st.fixed_dictionaries(
    {"city": st.text()},
    optional={"days": st.integers(), "unit": st.sampled_from(["C", "F"]), "deep": st.dictionaries(
        st.from_regex("[a-zé_]{1,4}", fullmatch=True), st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3), max_leaves=4), max_size=3)},
))  # fmt: skip
@settings(max_examples=30)
def test_calls_are_read_as_they_are_spelled(row: Calls, arguments: dict[str, Any]) -> None:
    marks = "".join((row.style.marks, row.tail, row.closes))
    if any(mark and mark in json.dumps(arguments, ensure_ascii=False) for mark in marks.split("\n")):
        return  # there is no way to spell these
    calls = [("weather", arguments), ("nothing", {}), ("weather", arguments)]
    found = read(Format(row), row.spelled(calls))
    assert [(name, json.loads(given)) for name, given, _ in found.calls] == calls
    assert (found.text, found.complete) == ("", True)


# --- Much text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hermes", "gpt_oss", "tgi", "glm45", "pythonic"])
def test_what_is_held_back_is_bounded(name: str) -> None:
    """So the work for each piece is, whatever came before."""
    format = format_of("", (), name, "gpt_oss" if name == "gpt_oss" else "think")
    calls = format.calls
    opening = calls.opens + calls.head
    for unit in (" ", "<", "\n", "{", opening[:4], opening, opening + calls.called("weather"), calls.closes or "a"):
        for before in ("", "a", opening, calls.spelled([("nothing", {})])):
            parser = ReplyParser(format, FUNCTIONS)
            parser.push(before)
            for _ in range(500):
                for character in unit:
                    parser.push(character)
                    assert len(parser._held) < 2000


def test_a_reply_in_one_piece() -> None:
    """A piece of any size is read, and as its characters one by one are."""
    text = "<tool_call> <" * 2000 + CALL
    found = read(HERMES, text)
    assert found.told == ("", "<tool_call> <" * 2000, [["nothing", "{}"]], True)
    assert fold(ReplyParser(HERMES, FUNCTIONS), text).told == found.told


def test_long_arguments() -> None:
    for row in {id(row.style): row for row in CALLS}.values():  # one of each style
        calls = [("weather", {"city": "ab <" * 25_000})]
        text = row.spelled(calls)
        found = fold(ReplyParser(Format(row), FUNCTIONS), (text[at : at + 4] for at in range(0, len(text), 4)))
        assert [(name, json.loads(given)) for name, given, _ in found.calls] == calls
