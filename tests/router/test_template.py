"""What a chat template is shown, what it may say, and what of a request it refuses. How the known families' templates
render is in test_chat_families; how long one may take is in test_rendering."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tgi.core.errors import RequestError
from tgi.router.rendering import choose
from tgi.router.template import MAX_OPTIONS, ChatTemplate

CHATML, LLAMA3, MISTRAL, QWEN, GEMMA, PARTS = (
    (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("chatml", "llama3", "mistral_v1", "qwen3", "gemma3", "smolvlm")
)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def named(**sources: str) -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(source, SPECIAL_TOKENS) for name, source in {"default": None, **sources}.items()}


Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "Be <b>terse</b>."}
USER: Message = {"role": "user", "content": "  Hi — how are you?\n"}
ASSISTANT: Message = {"role": "assistant", "content": "Fine, 你呢?"}


def theirs(source: str, messages: list[Message], **kwargs: Any) -> str:
    """What transformers renders."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' constructor has no types
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?")), **SPECIAL_TOKENS
    )
    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def ours(source: str, messages: list[Message], **kwargs: Any) -> str:
    return ChatTemplate(source, SPECIAL_TOKENS).render(messages, **kwargs)


@pytest.mark.parametrize(
    "source",
    [
        # null keys are dropped, reasoning is there under every name
        "{{ messages | tojson }}",
        # a string stays one for a template that knows both forms
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}",
        "{{ documents }}{{ tools }}{{ nothing }}{{ none }}{{ add_generation_prompt }}{{ bos_token }}{{ pad_token }}",
        # what is there besides Jinja's own
        "{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}{{ namespace(a=1).a }}{{ raise_exception is callable }}",
        "{{ messages | tojson(true, 2, (',', ': '), true) }}{{ '<ü>' | tojson }}{{ [1.0, none] | tojson(indent='-') }}",
        "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "  {% if true %}\n    x\n  {% endif %}\n{#- note -#}  y {%- if true -%} z {% endif +%}\n w \n",
    ],
)
def test_shows_templates_what_transformers_shows(source: str) -> None:
    messages = [SYSTEM, {**USER, "name": None, "thinking": "Hm."}, {**ASSISTANT, "reasoning": "Oh."}]
    assert ours(source, messages) == theirs(source, messages, add_generation_prompt=True)


def test_absent_tokens_are_not_printed() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {})
    assert template.render([USER]) == USER["content"]


def test_strftime_now_is_local_time() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    text = ours("{{ strftime_now('%Y-%m-%d') }}", [])
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))


def test_the_caller_s_messages_stay_as_they_are() -> None:
    message = {"role": "user", "content": "x", "name": None, "reasoning": "y"}
    before = dict(message)
    ours(PARTS, [message], continue_final_message=True)
    assert message == before


# Which template


@pytest.mark.parametrize(
    ("names", "tools", "documents", "chosen"),
    [
        ("default tool_use rag", False, False, "default"),
        ("default tool_use rag", True, False, "tool_use"),
        ("default tool_use rag", False, True, "rag"),
        ("default tool_use rag", True, True, "tool_use"),
        ("default", True, True, "default"),
        ("default other", False, True, "default"),
        ("tool_use", True, False, "tool_use"),
    ],
)
def test_the_template_is_chosen_by_what_the_request_has(names: str, tools: bool, documents: bool, chosen: str) -> None:
    assert choose(named(**{name: name for name in names.split()}), tools=tools, documents=documents).render([USER]) == (
        chosen
    )


def test_documents_go_to_the_default_template_if_it_reads_them() -> None:
    template = choose(named(default="{{ documents[0].text }}", rag="rag"), tools=False, documents=True)
    assert template.render([USER], documents=[{"text": "x"}]) == "x"


@pytest.mark.parametrize("names", ["", "tool_use"])
def test_without_a_default_template_plain_conversations_are_refused(names: str) -> None:
    template = choose(named(**{name: name for name in names.split()}), tools=False, documents=False)
    with pytest.raises(RequestError, match="Template error: template not found"):
        template.render([USER])


# Content: strings and parts


@pytest.mark.parametrize("source", [GEMMA, PARTS])
def test_parts_stay_parts_for_templates_that_read_them(source: str) -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    expected = theirs(source, [image], add_generation_prompt=True)
    assert ours(source, [image]) == expected
    assert "image>" in expected


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, QWEN])
def test_parts_are_joined_for_templates_that_read_strings(source: str) -> None:
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    assert ours(source, [{"role": "user", "content": parts}]) == ours(source, [{"role": "user", "content": "one, two"}])


def test_a_part_that_is_no_text_is_refused_by_type() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(RequestError, match="text only, not a part of type 'image_url'"):
        ours(CHATML, [image])


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True),
        ("{% for p in messages[0]['content'] %}{{ p.text }}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% for p in c %}{{ p.text }}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% set d = c %}{% for p in d[1:] %}{{ p.text }}{% endfor %}", True),
        ("{% for p in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}", True),
        ("{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}", True),
        ("{{ messages[0]['content'][0]['text'] }}", True),
        ("{{ messages[0].content[0].text }}", True),
        ("{% if messages[0].content[0] == '/' %}x{% endif %}", False),
        ("{% for line in messages[0].content.split() %}{{ line }}{% endfor %}", False),
        ("{% for call in messages[0].tool_calls %}{{ call.text }}{% endfor %}", False),
    ],
)
def test_tells_templates_that_read_parts(source: str, parts: bool) -> None:
    asks = "{{ '' if messages[0].content is string else 'PARTS' }}"
    text = ours(source + asks, [{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    assert text.endswith("PARTS") == parts


# Options and documents


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("{{ a }}{% if b is defined %}{{ c | default(1) }}{% endif %}", {"a", "b", "c"}),
        # what has a default, however that is written
        ("{% if a is not defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
        ("{% set a = a | default(1) %}{% set b = b if b is defined else 2 %}{{ a }}{{ b }}", {"a", "b"}),
        ("{% if a is defined %}{% else %}{% set a %}x{% endset %}{% endif %}{{ a }}", {"a"}),
        # what the template sets by itself, perhaps not always
        ("{% set a = 1 %}{{ a }}", set()),
        ("{% if messages %}{% set a = 1 %}{% endif %}{{ a }}{% if a is defined %}{% endif %}", set()),
        ("{% for a in messages %}{% set b %}{{ a }}{% endset %}{{ b }}{% endfor %}", set()),
        ("{% macro a(b) %}{{ b }}{{ varargs }}{{ caller() }}{% endmacro %}{{ a(1) }}", set()),
        # what is said elsewhere, and what is Jinja's
        ("{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}{{ pad_token }}", set()),
        ("{{ range(1) }}{{ namespace() }}{{ raise_exception }}{{ strftime_now }}{{ loop }}{{ self }}", set()),
    ],
)
def test_options_are_what_a_template_reads_and_does_not_set(source: str, options: set[str]) -> None:
    assert ChatTemplate(source, SPECIAL_TOKENS).options == options


def test_options_reach_the_template() -> None:
    text = ours(QWEN, [USER], options={"enable_thinking": False})
    assert text == theirs(QWEN, [USER], add_generation_prompt=True, enable_thinking=False)
    assert text != ours(QWEN, [USER])


def refusal(source: str | None, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, SPECIAL_TOKENS).render(kwargs.pop("messages", [USER]), **kwargs)
    assert caught.value.kind.status == 422
    return caught.value.kind.type, caught.value.detail


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"options": {"b": 1}}, "`chat_template_kwargs` must not set `b`: the model's chat template has `a`, `z`"),
        ({"options": {"messages": []}}, "`chat_template_kwargs` must not set `messages`: "),
        ({"options": {"range": 1}}, "`chat_template_kwargs` must not set `range`: "),
        ({"options": {"a": "x" * MAX_OPTIONS}}, "`chat_template_kwargs` must have at most 65536 characters"),
        ({"options": {"a": nested(9999)}}, "`chat_template_kwargs` is nested too deeply"),
        ({"documents": [{"text": "x"}]}, "`documents` is not supported: the model's chat template doesn't read them"),
    ],
)
def test_what_the_template_does_not_read_is_refused_by_name(kwargs: dict[str, Any], error: str) -> None:
    kind, detail = refusal("{{ z }}{{ a }}{{ range }}", **kwargs)
    assert kind == "validation"
    assert detail.startswith(error)


def test_documents_are_objects() -> None:
    assert refusal("{{ documents }}", documents=["x"]) == ("validation", "`documents` must be a list of objects")


# Continuation


def test_a_continuation_has_no_generation_prompt() -> None:
    source = "{{ 'early ' if add_generation_prompt }}{{ messages[-1].content }}"
    assert ours(source, [ASSISTANT], continue_final_message=True) == ASSISTANT["content"]


@pytest.mark.parametrize(("source", "end"), [(CHATML, "The answer is \n"), (LLAMA3, "The answer is")])
def test_a_continued_text_keeps_its_space_unless_the_template_takes_it(source: str, end: str) -> None:
    messages: list[Message] = [USER, {"role": "assistant", "content": "The answer is \n"}]
    text = ours(source, messages, continue_final_message=True)
    assert text == theirs(source, messages, continue_final_message=True)
    assert text.endswith(end)


def test_a_continued_text_may_occur_elsewhere() -> None:
    text = ours(CHATML, [USER, {"role": "assistant", "content": "im_end"}], continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nim_end")


def test_continues_the_last_text_part() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, {"type": "image"}]
    text = ours(PARTS, [{"role": "assistant", "content": parts}], continue_final_message=True)
    assert text == "<|im_start|>Assistant: onetwo"


@pytest.mark.parametrize(
    ("source", "messages", "error"),
    [
        (CHATML, [], "the final message has no text to continue"),
        (QWEN, [USER, {"role": "assistant", "tool_calls": []}], "the final message has no text to continue"),
        ("{{ messages[0].content }}", [USER, ASSISTANT], "the template drops the final message"),
        ("{{ messages[0].content[2:] }}", [ASSISTANT], "the template drops the final message"),
    ],
)
def test_what_can_t_be_continued(source: str, messages: list[Message], error: str) -> None:
    kind, detail = refusal(source, messages=messages, continue_final_message=True)
    assert kind == "template_error"
    assert detail.startswith(error)


# Errors


def test_the_template_s_own_words() -> None:
    error = ("template_error", "Only user and assistant, in turns, are supported!")
    assert refusal(MISTRAL, messages=[USER, USER]) == error


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "template not found"),
        ("{{ messages[1]['role'].x }}", "list object has no element 1"),
        ("{{ 'a' + 7 }}", 'can only concatenate str (not "int") to str'),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_on_this_input(source: str | None, words: str) -> None:
    kind, detail = refusal(source)
    assert kind == "template_error"
    assert detail.startswith(words)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ " + "(" * 9999 + ")" * 9999 + " }}", "{% for a in b %}" * 30 + "{% endfor %}" * 30]
)
def test_a_template_that_does_not_compile_refuses(source: str) -> None:
    template = ChatTemplate(source, {})
    assert template.error is not None
    assert template.error.startswith("the model's chat template doesn't compile: ")
    with pytest.raises(RequestError, match="doesn't compile"):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.datetime }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    message = dict(USER)
    refusal(source, messages=[message])
    assert message == USER
