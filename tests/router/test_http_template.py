"""Chat templates as clients meet them: chosen by what a request has, and none of them a burden to other requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.router.serving import Router, settings
from tgi.router import rendering

TEMPLATES = {
    "chat_template.jinja": "{{ mood }}|{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ tools[0].function.name }}|{{ messages[0].content }}",
    "additional_chat_templates/rag.jinja": "{{ documents | map(attribute='text') | join }}|{{ messages[0].content }}",
}

SLOW = (
    "{% set said = messages[0].content %}"
    "{% if said == 'bomb' %}{{ 'a' * 10 ** 10 }}{% endif %}"
    "{% if said == 'loops' %}" + "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
    "{{ said }}"
)


def prompt_of(router: Router, **fields: Any) -> Any:
    response = router.http.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "hi"}], **fields})
    return response.json()["templated_text"] if response.status_code == 200 else response.json()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "additional_chat_templates").mkdir()
    for name, source in TEMPLATES.items():
        (folder / name).write_text(source)
    with Router(settings(folder)) as router:
        yield router


def test_a_request_gets_the_template_that_it_needs(router: Router) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    documents = [{"text": "a"}, {"text": "b"}]
    assert prompt_of(router) == "|hi"
    assert prompt_of(router, chat_template_kwargs={"mood": "good"}) == "good|hi"
    assert prompt_of(router, tools=[tool]).startswith("f|hi")
    assert prompt_of(router, documents=documents) == "ab|hi"
    assert prompt_of(router, documents=[]) == "|hi"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"chat_template_kwargs": {"temper": "good"}},
            "`chat_template_kwargs` must not set `temper`: the model's chat template has `mood`",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "documents": [{"text": "a"}],
            },
            "`documents` is not supported: the model's chat template doesn't read them",
        ),
        ({"documents": ["a"]}, "`documents` must be a list of objects"),
    ],
)
def test_what_the_template_does_not_read_is_refused(router: Router, fields: dict[str, Any], error: str) -> None:
    assert prompt_of(router, **fields) == {"error": f"Input validation error: {error}", "error_type": "validation"}


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    (tmp_path / "chat_template.jinja").write_text(SLOW)
    with Router(settings(tmp_path)) as router:
        yield router


def says(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("attack", ["bomb", "loops"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/chat/completions", {}), ("/chat_tokenize", {}), ("/v1/messages", {"max_tokens": 1}), ("/invocations", {})],
)
def test_an_attack_ends_its_own_request(slow: Router, path: str, fields: dict[str, Any], attack: str) -> None:
    response = slow.http.post(path, json={**says(attack), **fields, "model": "x"})
    text = f"Template error: {rendering.EXHAUSTED}"
    assert response.status_code == (400 if path == "/v1/messages" else 422)
    assert text in response.text
    assert slow.chat(**says("hello")).status_code == 200
