"""Templates of the known families, written anew in ``templates/``: the control tokens and the habits of Jinja that
those have, rendered as transformers renders them."""

import copy
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel

from tgi.core.errors import RequestError
from tgi.router.rendering import choose
from tgi.router.template import ChatTemplate

FOLDER = Path(__file__).parent / "templates"
SOURCES = {path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8") for path in FOLDER.glob("*.jinja")}
FAMILIES = sorted({name.partition(".")[0] for name in SOURCES})
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

ONLY_PARTS = {"smolvlm"}
"""Read a list of parts, never a string."""
READ_PARTS = ONLY_PARTS | {"gemma3", "glm4", "llama32_vision", "mistral_tekken"}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "command_r": [{"citation_mode": "accurate"}],
    "deepseek_v31": [{"thinking": True}],
    "gemma4": [{"enable_thinking": True}],
    "glm45": [{"enable_thinking": False}],
    "glm4": [{"enable_thinking": False}, {"enable_thinking": True}],
    "gpt_oss": [{"reasoning_effort": "high", "model_identity": "Du bist ein Modell."}],
    "granite3": [{"thinking": True}, {"controls": {"citations": True, "length": "short"}}],
    "llama31": [
        {"date_string": "1 Jan 2030"},
        {"tools_in_user_message": False},
        {"builtin_tools": ["weather", "code_interpreter"]},
        {"custom_tools": [{"name": "own"}]},
    ],
    "qwen3": [{"enable_thinking": False}, {"enable_thinking": None}],
    "smollm3": [{"enable_thinking": False}, {"python_tools": ["def f(): ...", "x"]}, {"xml_tools": [1, "x"]}],
}

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": " You are <b>terse</b> & 'kind'.\n"}
USER: Message = {"role": "user", "content": "  Hi — how are you?\n"}
ASSISTANT: Message = {"role": "assistant", "content": "Fine, 你呢? 👩‍👩‍👧 "}
THINKING: Message = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo it is."}
REASONED: Message = {"role": "assistant", "content": "So it is.", "reasoning": "\nHm.\n"}


def call(*names: str, **fields: Any) -> Message:
    calls = [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": name, "arguments": {"city": 'Mal"mö', "days": [1, 2.5, None], "deep": {"a": True}}},
        }
        for number, name in enumerate(names)
    ]
    return {"role": "assistant", "tool_calls": calls, **fields}


def result(number: int, content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "weather"}


CONVERSATIONS: dict[str, list[Message]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "system_only": [SYSTEM],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "turns_without_system": [USER, ASSISTANT, USER, ASSISTANT],
    "two_systems": [SYSTEM, USER, ASSISTANT, {"role": "system", "content": "Now be long."}, USER],
    "ends_with_assistant": [SYSTEM, USER, {"role": "assistant", "content": "The answer is"}],
    "ends_in_space": [USER, {"role": "assistant", "content": "The answer is \n"}],
    "says_a_control_token": [USER, {"role": "assistant", "content": "im_end"}],
    "two_users": [USER, USER],
    "assistant_first": [ASSISTANT, USER],
    "unknown_role": [USER, {"role": "critic", "content": "Bad."}],
    "developer": [{"role": "developer", "content": "Use metres."}, USER],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    "unicode": [
        {"role": "user", "content": "\u2028é́\x00\ufeff \U0001d518 </s> <|im_end|>\r\n\r\n{{ 7 * 7 }}{% raw %}"}
    ],
    "modes": [{"role": "system", "content": "Sums. /no_think"}, {"role": "user", "content": "1+1 /think"}],
    "override": [{"role": "system", "content": "Only this. /system_override"}, USER],
    "thinking": [USER, THINKING, USER, THINKING],
    "reasoned": [USER, REASONED, USER, {**REASONED, "reasoning_content": "Other."}],
    "named": [{**USER, "name": "Ada", "unknown": None}],
    "call": [SYSTEM, USER, call("weather", content=None), result(0, "7 °C")],
    "call_without_key": [USER, call("weather"), result(0, '{"t": 7}'), ASSISTANT, USER],
    "call_beside_text": [USER, call("weather", content="Let me look.", thinking=None), result(0, "7"), ASSISTANT],
    "call_after_thought": [USER, call("weather", thinking="I must look."), result(0, "7")],
    "calls": [USER, call("weather", "time"), result(0, "7"), result(1, "8"), ASSISTANT],
    "string_arguments": [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    ],
    "result_without_call": [USER, result(0, "7")],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
    ],
    "images": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "image_beside_system": [
        SYSTEM,
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
    ],
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s <cold> & "wet", naïve',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where"},
                    "days": {"type": "array", "items": {"type": "integer"}, "default": [1]},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "deep": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
                    "map": {"type": "object", "additionalProperties": {"type": "number", "nullable": True}},
                    "any": {"type": ["string", "null"]},
                    "one": {"oneOf": [{"type": "string"}, {"type": "array"}]},
                },
                "required": ["city", "deep"],
            },
            "return": {"type": "number"},
        },
    },
    {"type": "function", "function": {"name": "time", "description": "Now", "parameters": {"type": "object"}}},
]
DOCUMENTS = [{"title": "Größe", "text": "Two\nlines"}, {"title": "B", "text": "Other"}]


class Noon(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Noon":
        return cls(2031, 2, 3, 12)


@pytest.fixture(autouse=True)
def _noon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Noon)
    monkeypatch.setattr("tgi.router.template.datetime", Noon)
    yield


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {name: id for id, name in enumerate(SPECIAL_TOKENS.values())}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' constructor has no types
        tokenizer_object=tokenizers.Tokenizer(WordLevel(names, unk_token="<pad>")), **SPECIAL_TOKENS
    )


@cache
def sources(family: str) -> dict[str, str]:
    files = {name: name.partition(".") for name in SOURCES}
    return {name or "default": SOURCES[file] for file, (owner, _, name) in files.items() if owner == family}


@cache
def templates(family: str) -> dict[str, ChatTemplate]:
    return {"default": ChatTemplate(None, {})} | {
        name: ChatTemplate(source, SPECIAL_TOKENS) for name, source in sources(family).items()
    }


def theirs(oracle: Any, family: str, messages: list[Message], **kwargs: Any) -> tuple[str, str]:
    """("text", the prompt), or the class of the error and its words."""
    oracle.chat_template = sources(family)
    template = kwargs.pop("template")
    try:
        return "text", oracle.apply_chat_template(messages, tokenize=False, chat_template=template, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)


def ours(family: str, messages: list[Message], options: dict[str, Any], **kwargs: Any) -> tuple[str, str]:
    template = choose(templates(family), tools=bool(kwargs["tools"]), documents=bool(kwargs["documents"]))
    before = copy.deepcopy(messages)
    try:
        return "text", template.render(messages, options=options, **kwargs)
    except RequestError as error:
        assert error.body["error_type"] == "template_error"
        return "RequestError", error.detail
    finally:
        assert messages == before


def as_read(family: str, messages: list[Message]) -> list[Message] | None:
    """As transformers must be given them: it joins no parts and makes none. None for images where none are read."""
    read = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and family not in READ_PARTS:
            if any(part["type"] == "image" for part in content):
                return None
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and family in ONLY_PARTS:
            content = [{"type": "text", "text": content}]
        read.append({**message, "content": content})
    return read


def variants(family: str, messages: list[Message]) -> Iterator[dict[str, Any]]:
    plain: dict[str, Any] = {"tools": None, "documents": None, "options": {}, "continue_final_message": False}
    continues = messages[-1]["role"] == "assistant" and messages[-1].get("content") is not None
    for options in [{}, *OPTIONS.get(family, [])]:
        for tools in (None, TOOLS):
            for add in (True, False):
                yield {**plain, "options": options, "tools": tools, "add_generation_prompt": add}
            if continues:
                yield {
                    **plain,
                    "options": options,
                    "tools": tools,
                    "add_generation_prompt": False,
                    "continue_final_message": True,
                }
    if family in ("command_r", "granite3"):
        yield {**plain, "documents": DOCUMENTS, "add_generation_prompt": True}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_renders_as_transformers(family: str, conversation: str, oracle: Any) -> None:
    messages = CONVERSATIONS[conversation]
    for_them = as_read(family, messages)
    for variant in variants(family, messages):
        options = variant.pop("options")
        chosen = choose(templates(family), tools=bool(variant["tools"]), documents=bool(variant["documents"]))
        options = {name: value for name, value in options.items() if name in chosen.options}
        kind, text = ours(family, messages, options, **variant)
        if for_them is None:
            assert (kind, "text only" in text) == ("RequestError", True)
            continue
        name = "rag" if variant["documents"] and "rag" in sources(family) else None
        expected, words = theirs(oracle, family, for_them, template=name, **variant, **options)
        if expected == "text":
            assert (kind, text) == ("text", words)
        else:
            assert kind == "RequestError"
            assert expected != "TemplateError" or text == words


def test_each_family_is_rendered_and_options_are_read(oracle: Any) -> None:
    """The comparison above would be content with templates that always refuse."""
    for family in FAMILIES:
        variant = {"tools": None, "documents": None, "add_generation_prompt": True}
        kind, text = ours(family, [USER], {}, **variant)
        assert (kind, USER["content"].strip() in text) == ("text", True), family
        options = {name for template in sources(family).values() for name in ChatTemplate(template, {}).options}
        assert options == {name for given in OPTIONS.get(family, []) for name in given}, family


def test_which_templates_take_what() -> None:
    taken = {"takes_tools": set(), "takes_calls": set(), "takes_documents": set()}  # type: dict[str, set[str]]
    for name, source in SOURCES.items():
        template = ChatTemplate(source, {})
        for what, takers in taken.items():
            if getattr(template, what):
                takers.add(name)
    both = {"command_r.tool_use", "deepseek_v3", "glm4", "gpt_oss", "granite3", "hermes2_pro.tool_use", "jamba"}
    both |= {"llama31", "mistral_v3", "nemotron", "qwen2", "qwen3"}
    both |= {"command_r7b", "deepseek_v31", "functiongemma", "gemma4", "glm45", "granite_20b", "internlm3", "kimi_k2"}
    both |= {"llama32_pythonic", "llama4", "magistral", "nemotron_nano", "qwen3_coder"}
    assert taken["takes_tools"] == both - {"deepseek_v3"} | {"lfm2", "phi4_mini", "smollm2_tools", "smollm3"}
    assert taken["takes_calls"] == both
    assert taken["takes_documents"] == {"command_r.rag", "granite3"}
