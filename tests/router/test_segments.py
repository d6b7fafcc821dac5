"""What is said, cut into segments."""

import asyncio
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from tgi.router.conversation import Said
from tgi.router.pipeline import Piece
from tgi.router.reply import CallDelta
from tgi.router.segments import Begin, End, Finish, Grow, Segment, Step, follow, whole
from tgi.router.wire.native import Token
from tgi.router.wire.openai import FinishReason


def said(text: str = "", *calls: CallDelta, finish: FinishReason | None = None, reasoning: str = "") -> Said:
    return Said(0, piece(reasoning + text), reasoning, text, list(calls), finish)


def unsaid(text: str) -> Said:
    """A token that is held back, or part of nothing."""
    return Said(0, piece(text), "", "", [], None)


def piece(text: str) -> Piece:
    return Piece(Token(len(text), text, -1.0, False), [], text, None)


def called(index: int, name: str) -> CallDelta:
    return CallDelta(index, "", f"call_{index}", name)


def steps_of(answer: Sequence[Said]) -> list[Step]:
    steps: list[Step] = []
    asyncio.run(follow(Replay(answer), steps.append))
    return steps


def whole_of(answer: Sequence[Said]) -> tuple[list[Segment], FinishReason]:
    return asyncio.run(whole(Replay(answer)))


class Replay:
    def __init__(self, answer: Sequence[Said]) -> None:
        self._answer = answer

    async def follow(self, hear: Callable[[Said], None]) -> None:
        for one in self._answer:
            hear(one)


def told(answer: Sequence[Said]) -> list[str]:
    """Steps on a line each."""
    lines = []
    for step in steps_of(answer):
        match step:
            case Begin(segment):
                lines.append(f"begin {segment.index} {segment.name or segment.kind}")
            case Grow(segment, text):
                lines.append(f"grow {segment.index} {text}")
            case End(segment):
                lines.append(f"end {segment.index}{' cut' if segment.cut else ''}")
            case Finish(reason):
                lines.append(f"finish {reason}")
    return lines


def test_text() -> None:
    answer = [said("a"), said(), said("b"), said(finish="stop")]
    assert told(answer) == ["begin 0 text", "grow 0 a", "grow 0 b", "end 0", "finish stop"]


def test_text_then_calls() -> None:
    answer = [
        said("Look:"),
        said("", called(0, "f"), CallDelta(0, "{")),
        said("", CallDelta(0, "}"), called(1, "g")),
        said("", CallDelta(1, "{}"), finish="tool_calls"),
    ]
    assert told(answer) == [
        *("begin 0 text", "grow 0 Look:", "end 0"),
        *("begin 1 f", "grow 1 {", "grow 1 }", "end 1"),
        *("begin 2 g", "grow 2 {}", "end 2", "finish tool_calls"),
    ]


def test_text_behind_a_call_is_a_segment_of_its_own() -> None:
    segments, _ = whole_of([said("", called(0, "f")), said("a"), said("b", finish="stop")])
    told = [(segment.kind, segment.call_id, segment.text) for segment in segments]
    assert told == [("call", "call_0", ""), ("text", "", "ab")]


def test_reasoning_comes_before_text_and_calls() -> None:
    answer = [
        unsaid("<think>"),
        said(reasoning="Let"),
        said(reasoning=" me"),
        said("Well.", called(0, "f"), reasoning=" see."),
        said(finish="tool_calls"),
    ]
    assert told(answer) == [
        *("begin 0 reasoning", "grow 0 Let", "grow 0  me", "grow 0  see.", "end 0"),
        *("begin 1 text", "grow 1 Well.", "end 1", "begin 2 f", "end 2", "finish tool_calls"),
    ]


def test_nothing_but_reasoning() -> None:
    assert told([said(reasoning="a"), said(finish="length")]) == [
        *("begin 0 reasoning", "grow 0 a", "end 0 cut", "finish length")
    ]


def test_an_answer_that_says_nothing_is_an_empty_text() -> None:
    assert told([said(finish="stop")]) == ["begin 0 text", "end 0", "finish stop"]


def test_only_the_last_segment_is_cut() -> None:
    answer = [said("a"), said("", called(0, "f"), CallDelta(0, '{"x'), finish="length")]
    assert [segment.cut for segment in whole_of(answer)[0]] == [False, True]


def test_tokens_held_back_belong_to_the_text_that_they_show_up_in() -> None:
    answer = [said(), said("ab"), said(), said("c"), said(), said("", called(0, "f")), said("d"), said(finish="stop")]
    first, _, last = whole_of(answer)[0]
    assert [piece.text for piece in first.pieces] == ["", "ab", "", "c"]
    assert [piece.text for piece in last.pieces] == ["d"]


def test_marks_and_space_between_reasoning_and_text_are_no_tokens_of_either() -> None:
    answer = [
        *(unsaid("<think>"), said(reasoning="a"), unsaid(" "), unsaid("</think>"), unsaid("\n\n")),
        *(unsaid(""), said("☃"), unsaid(" "), said(" b"), said(finish="stop")),
    ]
    thought, text = whole_of(answer)[0]
    assert thought.pieces == []
    assert [piece.text for piece in text.pieces] == ["", "☃", " ", " b"]


@given(st.lists(st.sampled_from(["", "text", "reasoning", "call", "arguments"]), max_size=12), st.booleans())
def test_steps_add_up_to_the_whole(kinds: list[str], cut: bool) -> None:
    pieces, calls, in_call = [], 0, False
    for kind in kinds:
        if kind == "call":
            pieces.append(said("", called(calls, "f"), CallDelta(calls, "{")))
            calls += 1
        elif kind == "arguments" and in_call:
            pieces.append(said("", CallDelta(calls - 1, "}")))
        elif kind == "reasoning":
            pieces.append(said(reasoning=kind))
        else:
            pieces.append(said(kind))
        in_call = kind == "call" or (in_call and kind in ("", "arguments"))
    pieces.append(said(finish="length" if cut else "stop"))
    grown: dict[int, str] = {}
    open_: Segment | None = None
    for step in steps_of(pieces):
        match step:
            case Begin(segment):
                assert open_ is None
                assert segment.index == len(grown)
                open_, grown[segment.index] = segment, ""
            case Grow(segment, text):
                assert segment is open_
                assert text
                grown[segment.index] += text
            case End(segment):
                assert segment is open_
                open_ = None
            case Finish():
                assert open_ is None
    segments, reason = whole_of(pieces)
    assert [segment.text for segment in segments] == list(grown.values())
    assert reason == ("length" if cut else "stop")
    assert [segment.cut for segment in segments] == [False] * (len(segments) - 1) + [cut]
