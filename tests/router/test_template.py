import logging
from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tgi.core.errors import RequestError
from tgi.router.template import ChatTemplate

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

# White space that only trim_blocks and lstrip_blocks take away.
LAX = """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == "skip" %}
        {% continue %}
    {% endif %}
  [{{ message.role }}] {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
  [assistant]
{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set date_string = strftime_now("%Y") if strftime_now is defined else "2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + (message.content | tojson) + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.count % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user and assistant roles") }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}
        {{- " " + message["content"] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_query %}
            {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {%- if content %}{{ '\\n' + content.split('</think>')[-1].lstrip('\\n') }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson(indent=1) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>' + content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Loops over the parts whatever they are, as SmolVLM's and Llama 4's relatives do.
PARTS = """\
{% for message in messages %}{{ message['role'] | capitalize }}:
{%- for line in message['content'] %}
{%- if line['type'] == 'text' %} {{ line['text'] }}{% else %}<image>{% endif %}
{%- endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "lax": LAX,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen": QWEN,
    "parts": PARTS,
}

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "You are <b>terse</b> & 'kind'."}
USER: Message = {"role": "user", "content": "  Hi — how are you?\n"}
ASSISTANT: Message = {"role": "assistant", "content": "Fine, 你呢?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s <cold> & "wet", naïve',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL: Message = {
    "role": "assistant",
    "content": None,
    "reasoning": "I should look.",
    "tool_calls": [
        {"id": "0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Malmö", "days": [1, 2]}}}
    ],
}
RESULT: Message = {"role": "tool", "content": "7 °C", "tool_call_id": "0"}


def theirs(source: str, messages: list[Message], **kwargs: Any) -> str:
    """What transformers renders."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' constructor has no types
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?")),
        bos_token="<s>",
        eos_token="</s>",
    )
    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def ours(source: str, messages: list[Message], **kwargs: Any) -> str:
    return ChatTemplate(source, SPECIAL_TOKENS).render(messages, **kwargs)


def in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "named": [{**USER, "name": "Ada", "unknown": None}],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers(template: str, conversation: str, add_generation_prompt: bool) -> None:
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    # The one thing done beyond transformers: a string for a template that only knows parts.
    for_them = [in_parts(message) for message in messages] if template == "parts" else messages
    assert ours(source, messages, add_generation_prompt=add_generation_prompt) == theirs(
        source, for_them, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("template", ["qwen", "llama3"])
def test_tools_render_as_transformers(template: str) -> None:
    messages = [SYSTEM, USER, CALL, RESULT]
    expected = theirs(TEMPLATES[template], messages, tools=TOOLS, add_generation_prompt=True)
    assert ours(TEMPLATES[template], messages, tools=TOOLS) == expected
    assert "Malmö" in expected
    assert template != "qwen" or "I should look." in expected


def test_knows_which_templates_take_tools() -> None:
    takers = {name for name, source in TEMPLATES.items() if ChatTemplate(source, {}).takes_tools}
    assert takers == {"qwen"}


def test_kwargs_reach_the_template() -> None:
    text = ours(QWEN, [USER], options={"enable_thinking": False})
    assert text == theirs(QWEN, [USER], add_generation_prompt=True, enable_thinking=False)
    assert text != ours(QWEN, [USER])


@pytest.mark.parametrize(
    "source",
    [
        # what a template sees of a message: null keys are dropped, reasoning is there under every name
        "{{ messages | tojson }}",
        # a string stays one for a template that knows both forms
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
        "{{ documents }}{{ tools }}{{ nothing }}{{ none }}",
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


# Content: strings and parts


@pytest.mark.parametrize("template", ["gemma", "parts"])
def test_parts_stay_parts_for_templates_that_read_them(template: str) -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    messages = [in_parts(SYSTEM), image]
    expected = theirs(TEMPLATES[template], messages, add_generation_prompt=True)
    assert ours(TEMPLATES[template], messages) == expected
    assert "image>" in expected


@pytest.mark.parametrize("template", ["chatml", "lax", "llama3", "mistral", "qwen"])
def test_parts_are_joined_for_templates_that_read_strings(template: str) -> None:
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    source = TEMPLATES[template]
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


def test_the_caller_s_messages_stay_as_they_are() -> None:
    message = {"role": "user", "content": "x", "name": None, "reasoning": "y"}
    before = dict(message)
    ours(PARTS, [message], continue_final_message=True)
    assert message == before


# Continuation


@pytest.mark.parametrize("template", ["chatml", "lax", "llama3", "mistral", "gemma", "qwen", "parts"])
def test_continues_as_transformers(template: str) -> None:
    messages = [USER, ASSISTANT]
    for_them = [in_parts(message) for message in messages] if template == "parts" else messages
    expected = theirs(TEMPLATES[template], for_them, continue_final_message=True)
    assert ours(TEMPLATES[template], messages, continue_final_message=True) == expected
    assert expected.endswith(ASSISTANT["content"])


def test_a_continuation_has_no_generation_prompt() -> None:
    source = "{{ 'early ' if add_generation_prompt }}{{ messages[-1].content }}"
    assert ours(source, [ASSISTANT], continue_final_message=True) == ASSISTANT["content"]


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_a_continued_text_keeps_its_space_unless_the_template_takes_it(template: str) -> None:
    messages: list[Message] = [USER, {"role": "assistant", "content": "The answer is \n"}]
    text = ours(TEMPLATES[template], messages, continue_final_message=True)
    assert text == theirs(TEMPLATES[template], messages, continue_final_message=True)
    assert text.endswith("The answer is \n" if template == "chatml" else "The answer is")


def test_a_continued_text_may_occur_elsewhere() -> None:
    text = ours(CHATML, [USER, {"role": "assistant", "content": "im_end"}], continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nim_end")


def test_continues_the_last_text_part() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, {"type": "image"}]
    text = ours(PARTS, [{"role": "assistant", "content": parts}], continue_final_message=True)
    assert text == "Assistant: one two"


@pytest.mark.parametrize(
    ("source", "messages", "error"),
    [
        (CHATML, [], "the final message has no text to continue"),
        (QWEN, [USER, CALL], "the final message has no text to continue"),
        ("{{ messages[0].content }}", [USER, ASSISTANT], "the template drops the final message"),
        ("{{ messages[0].content[2:] }}", [ASSISTANT], "the template drops the final message"),
    ],
)
def test_what_can_t_be_continued(source: str, messages: list[Message], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        ours(source, messages, continue_final_message=True)


# Errors


def refusal(source: str | None, messages: list[Message]) -> str:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, SPECIAL_TOKENS).render(messages)
    assert caught.value.body["error_type"] == "template_error"
    return caught.value.body["error"]


def test_no_template() -> None:
    assert refusal(None, [USER]) == "Template error: template not found"


def test_the_template_s_own_words() -> None:
    assert (
        refusal(MISTRAL, [USER, USER]) == "Template error: conversation roles must alternate user and assistant roles"
    )


def test_a_template_that_fails_on_this_input() -> None:
    assert "no element 0" in refusal("{{ messages[0]['role'].x }}", [])
    assert "concatenate" in refusal(CHATML, [{"role": "user", "content": 7}])
    assert refusal("{{ 1 / 0 }}", [USER]) == "Template error: division by zero"


def test_a_template_that_does_not_compile_is_logged_and_refuses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        template = ChatTemplate("{% for %}", {})
    assert "doesn't compile" in caplog.text
    with pytest.raises(RequestError, match="Template error: the model's chat template doesn't compile"):
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
        "{{ namespace(__class__=1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    message = dict(USER)
    refusal(source, [message])
    assert message == USER
