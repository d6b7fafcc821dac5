"""A budget of reasoning: what it forces, and when."""

import pytest

from tests.engine.test_scheduler import submit
from tgi.core.messages import Thinking
from tgi.engine.request import Request
from tgi.engine.thinking import Thoughts


def token_bytes(token: int) -> bytes:
    """Tokens are characters."""
    return chr(token).encode()


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def thoughts(budget: int, opens: str = "", closes: str = "</think>") -> Thoughts:
    return Thoughts(Thinking(budget, opens, closes), token_bytes, encode)


def request(said: str, budget: int, opens: str = "", closes: str = "</think>", most: int = 100) -> Request:
    """After it has said this; each of its characters is a token."""
    made = Request(0, submit(1, encode("prompt"), most))
    made.follow(None, thoughts(budget, opens, closes))
    for character in said:
        made.extend(encode(character))
    return made


def text(request: Request) -> str:
    return "".join(map(chr, request.tokens[request.submit.prompt_length :]))


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_it_is_closed_when_the_budget_is_used_up(budget: int) -> None:
    assert text(request("abcdefgh"[:budget], budget=budget)) == "abcdefgh"[:budget] + "</think>"


def test_it_goes_on_before() -> None:
    assert text(request("abcd", budget=5)) == "abcd"


def test_who_has_closed_it_gets_nothing() -> None:
    for said in ("</think>and then some more", "a\n</think>x, although that is over the budget"):
        assert text(request(said, budget=12)) == said


def test_what_is_begun_is_only_completed() -> None:
    assert text(request("abc</th", budget=7)) == "abc</think>"
    assert text(request("abc<<</", budget=7)) == "abc<<</think>"
    assert text(request("ab◁", budget=3, closes="◁/think▷")) == "ab◁/think▷"


def test_afterwards_the_reply_is_free() -> None:
    assert text(request("abc" + "answer <think> and more", budget=3)) == "abc</think>answer <think> and more"


def test_reasoning_that_the_reply_opens_itself() -> None:
    assert text(request("\n <think>abc", budget=12, opens="<think>")) == "\n <think>abc</think>"
    for said in ("No reasoning here at all.", "<thinking> is none", "x<think>abcdefghijk"):
        assert text(request(said, budget=5, opens="<think>")) == said
    # Over the budget before it has been opened: that is not cut in two.
    assert text(request("<thin", budget=2, opens="<think>")) == "<thin"
    assert text(request("<think>", budget=2, opens="<think>")) == "<think></think>"


def test_no_room_is_left() -> None:
    cut = request("abcde", most=8, budget=5)
    assert (text(cut), cut.finish) == ("abcde</t", "length")


@pytest.mark.parametrize("said", range(14))
def test_a_resumed_request_goes_on_as_it_would_have(said: int) -> None:
    whole = text(request("abcde", budget=5))
    resumed = request("", budget=5)
    resumed.tokens += encode(whole[:said])
    resumed.follow(None, thoughts(5))
    assert text(resumed) == (whole if said >= 5 else whole[:said])
