"""Templates in processes of their own: what takes too long or grows too large ends, and harms nobody."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tgi.core.errors import RequestError
from tgi.router import rendering
from tgi.router.rendering import EXHAUSTED, Templates

USER = {"role": "user", "content": "hello"}


@contextmanager
def templates(source: str | None, largest: int = 1 << 20, count: int = 1, **more: str) -> Iterator[Templates]:
    named = {} if source is None else {"default": source}
    found = Templates(named | more, {"bos_token": "<s>"}, largest, count)
    try:
        yield found
    finally:
        found.close()


async def render(templates: Templates, *messages: dict[str, Any], **more: Any) -> str:
    template = await templates.choose(tools=False, documents=False)
    return await templates.render(template, messages=list(messages or [USER]), **more)


def refusal(templates: Templates, *messages: dict[str, Any], **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        asyncio.run(render(templates, *messages, **more))
    assert caught.value.kind.type in ("template_error", "validation")
    return caught.value.detail


def test_what_templates_can_do_is_known_and_they_are_shown_what_they_are_given() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ mood }}"
    with templates(source, tool_use="{{ tools }}{{ message.tool_calls }}", rag="{{ documents }}") as found:
        assert asyncio.run(render(found, options={"mood": "!"})) == "<s>hello!"
        default, tool_use, rag = (
            asyncio.run(found.choose(tools=tools, documents=documents))
            for tools, documents in ((False, False), (True, False), (False, True))
        )
    assert (default.name, list(default.options)) == ("default", ["mood"])
    assert (tool_use.name, tool_use.takes_tools, tool_use.takes_calls) == ("tool_use", True, True)
    assert (rag.name, rag.takes_documents) == ("rag", True)


def test_every_text_goes_there_and_back() -> None:
    text = 'ü\ud800\u2028 "\\\0 👩‍👩‍👧 ' + "x" * 200_000
    with templates("{{ messages[0].content }}{{ messages[0].big }}") as found:
        said = asyncio.run(render(found, {"content": text, "big": 10**40}))
        assert said == text + str(10**40)


def test_a_refusal_has_the_template_s_words_and_the_process_goes_on() -> None:
    with templates("{{ raise_exception('no ' ~ messages[0].content) if messages[0].content else 'yes' }}") as found:
        assert refusal(found) == "no hello"
        assert asyncio.run(render(found, {"content": ""})) == "yes"
        assert "`chat_template_kwargs` must not set `x`" in refusal(found, options={"x": 1})


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ 10 ** (10 ** (8 + messages | length)) }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ ('a' * 10 ** 7).replace('a', 'b' * 1000) }}",
        "{{ ('a' * 10 ** 6 ~ messages | length) | wordwrap(1) | length }}{{ 'x' * (2 ** 20 + 1) }}",
    ],
)
def test_no_template_takes_more_than_its_share(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    attack = "{% if messages[0].content == 'attack' %}" + source + "{% endif %}fine"
    with templates(attack) as found:
        asyncio.run(render(found))
        begin = time.monotonic()
        detail = refusal(found, {"role": "user", "content": "attack"})
        assert detail == EXHAUSTED or "recursion" in detail or "int string" in detail or "exceeds" in detail, detail
        assert time.monotonic() - begin < 30
        assert asyncio.run(render(found)) == "fine"


def test_a_slow_conversation_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    slow = "{% if messages[0].content == 'slow' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    slow += "{% endfor %}{% endfor %}{% endif %}done"

    async def both(found: Templates) -> None:
        await asyncio.gather(render(found), render(found))
        waiting = asyncio.create_task(render(found, {"content": "slow"}))
        for _ in range(20):
            assert await render(found) == "done"
        assert not waiting.done()
        with pytest.raises(RequestError, match=EXHAUSTED):
            await waiting

    with templates(slow, count=2) as found:
        asyncio.run(both(found))


def test_a_process_that_is_killed_is_started_again() -> None:
    with templates("{{ messages[0].content }}") as found:
        asyncio.run(render(found))
        (worker,) = found._workers
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        assert asyncio.run(render(found)) == "hello"


@pytest.mark.parametrize(
    "source", [None, "{% if %}", "{% for x in y %}" * 200 + "{% endfor %}" * 200, "{{ " + "(" * 10_000 + ")" * 10_000]
)
def test_a_template_that_is_none_refuses_every_conversation(
    source: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with templates(source) as found, caplog.at_level(logging.WARNING):
        detail = refusal(found)
        assert refusal(found) == detail
    assert detail == "template not found" or detail.startswith("the model's chat template ")
    assert len(caplog.records) == 1
