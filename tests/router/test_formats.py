"""Which format a model writes is seen in its chat template, and the template's own earlier calls are read by it."""

import json
from typing import Any

import pytest

from tests.router.test_chat_families import SOURCES, SPECIAL_TOKENS, TOOLS, USER
from tgi.router.formats import AUTO, CALL_NAMES, CALLS, OFF, REASONING, REASONING_NAMES, Format, format_of, words
from tgi.router.reply import ReplyParser
from tgi.router.template import ChatTemplate

FOUND = {
    "command_r.tool_use": ("command_r", None),
    "command_r7b": ("command_r7b", "command"),
    "deepseek_r1": ("tgi", "think"),
    "deepseek_v3": ("deepseek_v3", None),
    "deepseek_v31": ("deepseek_v31", "think"),
    "functiongemma": ("functiongemma", None),
    "gemma4": ("gemma4", "gemma4"),
    "glm4": ("glm45", "think"),
    "glm45": ("glm45", "think"),
    "gpt_oss": ("gpt_oss", "gpt_oss"),
    "granite3": ("granite", "think"),
    "granite_20b": ("granite_20b", None),
    "hermes2_pro.tool_use": ("hermes", None),
    "internlm3": ("internlm", None),
    "jamba": ("jamba", None),
    "kimi_k2": ("kimi_k2", None),
    "lfm2": ("lfm2", None),
    "llama31": ("llama3_json", None),
    "llama32_pythonic": ("pythonic", None),
    "llama4": ("llama4_pythonic", None),
    "magistral": ("mistral_v11", "mistral"),
    "mistral_v3": ("mistral", None),
    "nemotron": ("nemotron_mini", None),
    "nemotron_nano": ("nemotron", "think"),
    "phi4_mini": ("phi4_mini", None),
    "qwen2": ("hermes", None),
    "qwen3": ("hermes", "think"),
    "qwen3_coder": ("qwen3_coder", None),
    "smollm2_tools": ("smollm", None),
    "smollm3": ("tgi", "think"),
}
"""Template → format of calls and of reasoning. Models of all other templates have neither; some of those strip
reasoning from earlier answers, as do some of these."""


def names(format: Format) -> tuple[str, str | None]:
    return format.calls.name, format.reasoning and format.reasoning.name


@pytest.mark.parametrize("name", SOURCES)
def test_the_format_is_seen_in_the_template(name: str) -> None:
    assert names(format_of(SOURCES[name], ())) == FOUND.get(name, ("tgi", None))


def test_reasoning_is_seen_in_the_vocabulary() -> None:
    assert names(format_of("", {"<think>", "</think>"})) == ("tgi", "think")
    assert names(format_of("", {"</think>"})) == ("tgi", None)
    assert names(format_of("", {"[THINK]", "[/THINK]"})) == ("tgi", "mistral")


def test_the_format_may_be_chosen() -> None:
    for calls in CALL_NAMES:
        for reasoning in REASONING_NAMES:
            assert names(format_of(SOURCES["qwen3"], (), calls, reasoning)) == (calls, reasoning)
    assert names(format_of(SOURCES["qwen3"], (), AUTO, OFF)) == ("hermes", None)


def test_names_are_of_one_row() -> None:
    assert len(set(CALL_NAMES)) == len(CALLS)
    assert len(set(REASONING_NAMES)) == len(REASONING)
    assert not {AUTO, OFF} & {*CALL_NAMES, *REASONING_NAMES}


def test_special_tokens_of_a_format() -> None:
    """Those that it is spelled with must reach the parser; others stay hidden."""
    format = format_of(SOURCES["qwen3"], ()).spelled_with({"<tool_call>": 1, "</think>": 2, "<|im_end|>": 3})
    assert format.special == {"<tool_call>": 1, "</think>": 2}
    marks = {"<|channel|>": 1, "<|message|>": 2, "<|start|>": 3, "<|constrain|>": 4, "<|end|>": 5, "<|call|>": 6}
    assert format_of(SOURCES["gpt_oss"], ()).spelled_with({**marks, "<|return|>": 7}).special == marks
    assert format_of(SOURCES["functiongemma"], ()).spelled_with({"<escape>": 1}).special == {"<escape>": 1}


def test_words() -> None:
    assert words('<tool_call>\n{"name": ') == ["<tool_call>", "{", '"name"', ":"]
    assert words("[TOOL_CALLS] [") == ["[TOOL_CALLS]", "["]
    assert words("<|channel|>commentary to=functions.") == ["<|channel|>", "commentary", "to", "=", "functions", "."]


# --- As the template writes them -------------------------------------------------------------------------------------

TALKERS = sorted(name for name, source in SOURCES.items() if ChatTemplate(source, {}).takes_calls)

ONE_CALL = {"gpt_oss", "llama31"}
"""Templates that write only one call of a message."""

WRITES_MORE = {"mistral_v3": ', "id": "call0000#"}'}
"""Templates that write more than models are taught to, which is text."""

ENDS = {"", "</s>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>", "<|eom|>"} | {
    "<end_of_turn>",
    "<turn|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}

ARGUMENTS: list[dict[str, Any]] = [
    {"city": 'Mal"mö', "days": [1, 2], "unit": "C", "deep": {"a": True}},
    {"city": "{}\\\n", "any": None, "deep": {"a": False}},
]


@pytest.mark.parametrize("name", TALKERS)
def test_a_templates_calls_are_read_in_its_format(name: str) -> None:
    """So the format is the template's, and what it looks like to the model."""
    source = SOURCES[name]
    template, format = ChatTemplate(source, SPECIAL_TOKENS), format_of(source, ())
    given = [("weather", arguments) for arguments in ARGUMENTS[: 1 if name in ONE_CALL else 2]]
    calls = [
        {"id": f"functions.{called}:{at}" if name == "kimi_k2" else f"call0000{at}", "type": "function"}
        | {"function": {"name": called, "arguments": arguments}}
        for at, (called, arguments) in enumerate(given)
    ]  # fmt: skip
    prompt = template.render([USER], tools=TOOLS)
    whole = template.render(
        [USER, {"role": "assistant", "content": "", "tool_calls": calls}], tools=TOOLS, add_generation_prompt=False
    )
    begun = prompt.removesuffix("<think>\n")
    assert whole.startswith(begun)
    reply = whole.removeprefix(begun)
    for at in range(2):
        reply = reply.replace(WRITES_MORE.get(name, "}").replace("#", str(at)), "}")
    parser = ReplyParser(format, {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS})
    parsed = parser.push(reply)
    found: list[tuple[str | None, str]] = []
    for delta in parsed.calls:
        assert delta.index == len(found)
        found.append((delta.name, delta.arguments))
    assert [(called, json.loads(arguments)) for called, arguments in found] == given
    assert parser.complete
    assert (parsed.text + parser.finish().text).strip() in ENDS


def test_a_template_that_takes_arguments_for_a_string() -> None:
    """DeepSeek's own do."""
    source = "{% for call in messages[0].tool_calls %}{{ '```' + call['function']['arguments'] + '```' }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": {"a": "ö"}}}
    text = ChatTemplate(source, {}).render([{"role": "assistant", "tool_calls": [call]}])
    assert text == '```{"a": "ö"}```'


def test_reasoning_closes_what_it_opens() -> None:
    for row in REASONING:
        parser = ReplyParser(Format(reasoning=row), {})
        parsed = parser.push(f"{row.opens}\nHm.\n{row.closes}{row.joint}{row.answers}So.")
        assert (parsed.reasoning, parsed.text + parser.finish().text) == ("Hm.", "So.")
