"""How families of models spell tool calls and reasoning: two tables. What replies must spell, how they are read, and
how earlier calls are told where the template can't, is all made of their rows. Knows no token and no request.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from tgi.router.arguments import GEMMA, GEMMA4, GLM, JSON, PYTHON, QWEN, Style
from tgi.router.readers import spelled

PLACE = "#"
"""In a ``head`` or ``middle``: which call of its reply it is, from 0. Models may count all calls of a conversation."""

PLACES = 1000
"""No place is as high."""

KEYS = ('"arguments"', '"parameters"')
"""Models take one for the other."""

_WORD = re.compile(r'<[^<>\s]*>?|\[[A-Z_]+\]|"[^"]*"|```\w*|\w+|\S')


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How calls are spelled: ``opens (head NAME middle ARGUMENTS tail) between (…) closes``.

    Exactly so where a grammar holds; read, white space between words may be more or less.
    """

    name: str
    signs: tuple[str, ...] = ()
    """What a template of such a model has in it, all of it; without any the row must be chosen."""
    opens: str = ""
    head: str = ""
    middle: str
    tail: str = ""
    between: str = ""
    closes: str = ""
    quoted: bool = True
    """The name is a JSON string."""
    style: Style = JSON
    anchored: bool = False
    """Calls are the whole reply: they begin with its first word. Otherwise text may stand before them."""
    trigger: Literal["word", "head", "name"] = "word"
    """How much of the first call the model writes by itself before it can't but go on: the first word, all before the
    name, or the name, too. Only then is a reply not free any more."""
    taught: bool = True
    """The model knows when to stop calling. Others get one call only, unless a request asks for several."""
    ids: Literal["call", "nine", "place"] = "call"
    """Of calls: any; nine letters and digits, which the template insists on; or made of name and place."""
    also: tuple["Calls", ...] = ()
    """Other ways to begin a call that such models have; of these, ``opens``, ``head``, ``middle`` and ``between`` are
    read."""
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(KEYS, KEYS))
    """Words of the spelling that are read in other forms, too; "": they may be missing."""

    def spelled(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, each of a name and arguments, as the model would have written them."""
        written = [
            f"{placed(self.head, place)}{self.called(name)}{placed(self.middle, place)}"
            f"{self.style.spell(arguments)}{self.tail}"
            for place, (name, arguments) in enumerate(calls)
        ]
        return self.opens + self.between.join(written) + self.closes

    def called(self, name: str) -> str:
        return spelled(name) if self.quoted else name


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What stands around a model's reasoning, which comes before the rest of its reply."""

    name: str
    opens: str
    closes: str
    joint: str = ""
    """What stands behind reasoning, before anything else."""
    answers: str = ""
    """What opens an answer in text."""
    dropped: tuple[str, ...] = ()
    """Marks between reasoning, text and calls that are none of them."""
    sign: str = ""
    """What a template of such a model has in it, if not ``closes``."""


_LIST = Calls(name="", head='{"name": ', middle=', "arguments": ', tail="}", between=", ")
"""Each call an item of a JSON array."""

TGI = Calls(
    name="tgi",
    head='{"name": ',
    middle=', "parameters": ',
    tail="}",
    between="\n",
    anchored=True,
    taught=False,
)
"""For models without a format of their own."""

_HARMONY = Calls(
    name="gpt_oss",
    signs=("<|channel|>", "to=functions."),
    head="<|channel|>commentary to=functions.",
    middle=" <|constrain|>json<|message|>",
    tail="<|call|>",
    between="<|start|>assistant",
    quoted=False,
    trigger="head",
    forms={
        "commentary": ("commentary", "analysis"),
        "<|constrain|>": ("<|constrain|>", ""),
        "json": ("json", "code", ""),
    },
)
"""A message's recipient stands behind its channel or before it."""

_LLAMA = Calls(
    name="llama3_json",
    signs=('{"name": "', '"parameters": '),
    head='{"name": ',
    middle=', "parameters": ',
    tail="}",
    between="; ",
    anchored=True,
    trigger="head",
)

CALLS = (
    replace(
        _HARMONY,
        also=(
            replace(_HARMONY, head="<|channel|>analysis to=functions."),
            replace(_HARMONY, head=" to=functions.", middle="<|channel|>commentary <|constrain|>json<|message|>"),
        ),
    ),
    Calls(
        name="kimi_k2",
        signs=("<|tool_calls_section_begin|>",),
        opens="<|tool_calls_section_begin|>",
        head="<|tool_call_begin|>functions.",
        middle=":#<|tool_call_argument_begin|>",
        tail="<|tool_call_end|>",
        closes="<|tool_calls_section_end|>",
        quoted=False,
        ids="place",
    ),
    Calls(
        name="deepseek_v3",
        signs=("<｜tool▁sep｜>", "```json"),
        opens="<｜tool▁calls▁begin｜>",
        head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
        between="\n",
        closes="<｜tool▁calls▁end｜>",
        quoted=False,
    ),
    Calls(
        name="deepseek_v31",
        signs=("<｜tool▁sep｜>",),
        opens="<｜tool▁calls▁begin｜>",
        head="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        tail="<｜tool▁call▁end｜>",
        closes="<｜tool▁calls▁end｜>",
        quoted=False,
    ),
    Calls(
        name="mistral_v11",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        head="[TOOL_CALLS]",
        middle="[ARGS]",
        quoted=False,
        ids="nine",
    ),
    replace(_LIST, name="mistral", signs=("[TOOL_CALLS]",), opens="[TOOL_CALLS] [", closes="]", ids="nine"),
    Calls(
        name="command_r7b",
        signs=("<|START_ACTION|>",),
        opens="<|START_ACTION|>[\n",
        head='    {"tool_call_id": "#", "tool_name": ',
        middle=', "parameters": ',
        tail="}",
        between=",\n",
        closes="\n]<|END_ACTION|>",
    ),
    Calls(
        name="command_r",
        signs=("Action:", "```json"),
        opens="Action: ```json\n[\n",
        head='    {\n        "tool_name": ',
        middle=',\n        "parameters": ',
        tail="\n    }",
        between=",\n",
        closes="\n]\n```",
        trigger="name",  # it says that it needs none by the name of a tool that isn't there
    ),
    Calls(
        name="functiongemma",
        signs=("<start_function_call>",),
        head="<start_function_call>call:",
        middle="",
        tail="<end_function_call>",
        quoted=False,
        style=GEMMA,
    ),
    Calls(
        name="gemma4",
        signs=("<|tool_call>",),
        head="<|tool_call>call:",
        middle="",
        tail="<tool_call|>",
        quoted=False,
        style=GEMMA4,
    ),
    Calls(
        name="gemma",
        signs=("```tool_code",),
        opens="```tool_code\n",
        middle="(",
        between="\n",
        closes="\n```",
        quoted=False,
        style=PYTHON,
        trigger="name",
    ),
    replace(_LIST, name="functools", signs=("functools[",), opens="functools[", closes="]", trigger="head"),
    replace(_LIST, name="phi4_mini", signs=("<|/tool|>",), opens="<|tool_call|>[", closes="]<|/tool_call|>"),
    replace(_LIST, name="granite", signs=("<|tool_call|>",), opens="<|tool_call|>[", closes="]"),
    Calls(
        name="granite_20b",
        signs=("<function_call>",),
        head='<function_call> {"name": ',
        middle=', "arguments": ',
        tail="}",
        between=" ",
    ),
    replace(_LIST, name="jamba", signs=("<tool_calls>",), opens="<tool_calls>[", closes="]</tool_calls>"),
    replace(_LIST, name="nemotron", signs=("<TOOLCALL>",), opens="<TOOLCALL>[", closes="]</TOOLCALL>"),
    Calls(
        name="nemotron_mini",
        signs=("<toolcall>",),
        head='<toolcall> {"name": ',
        middle=', "arguments": ',
        tail="} </toolcall>",
        between="\n",
    ),
    Calls(
        name="internlm",
        signs=("<|action_start|>",),
        head='<|action_start|><|plugin|>\n{"name": ',
        middle=', "parameters": ',
        tail="}<|action_end|>",
        between="\n",
    ),
    Calls(
        name="qwen3_coder",
        signs=("<tool_call>", "<function="),
        head="<tool_call>\n<function=",
        middle=">\n",
        tail="\n</tool_call>",
        between="\n",
        quoted=False,
        style=QWEN,
    ),
    Calls(
        name="glm45",
        signs=("<tool_call>", "<arg_key>"),
        head="<tool_call>",
        middle="\n",
        between="\n",
        quoted=False,
        style=GLM,
    ),
    replace(_LIST, name="smollm", signs=("<tool_call>[",), opens="<tool_call>[", closes="]</tool_call>"),
    Calls(
        name="hermes",
        signs=("<tool_call>",),
        head='<tool_call>\n{"name": ',
        middle=', "arguments": ',
        tail="}\n</tool_call>",
        between="\n",
    ),
    Calls(
        name="lfm2",
        signs=("<|tool_call_start|>",),
        opens="<|tool_call_start|>[",
        middle="(",
        between=", ",
        closes="]<|tool_call_end|>",
        quoted=False,
        style=PYTHON,
    ),
    Calls(
        name="llama4_pythonic",
        signs=("<|python_start|>",),
        opens="<|python_start|>[",
        middle="(",
        between=", ",
        closes="]<|python_end|>",
        quoted=False,
        style=PYTHON,
    ),
    Calls(
        name="pythonic",
        signs=("[func_name1(",),
        opens="[",
        middle="(",
        between=", ",
        closes="]",
        quoted=False,
        style=PYTHON,
        anchored=True,
        trigger="name",
    ),
    replace(_LLAMA, also=(replace(_LLAMA, head='{"type": "function", "name": '),)),
    replace(_LIST, name="xlam", opens="[", closes="]", anchored=True, trigger="head"),
    TGI,
)
"""By what distinguishes them: the more special first."""

REASONING = (
    Reasoning(
        "gpt_oss",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        joint="<|start|>assistant",
        answers="<|channel|>final<|message|>",
        dropped=("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>"),
        sign="<|channel|>",  # others, too, end turns as it ends reasoning
    ),
    Reasoning("mistral", "[THINK]", "[/THINK]"),
    Reasoning(
        "command",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        answers="<|START_RESPONSE|>",
        dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    Reasoning("gemma4", "<|channel>thought\n", "<channel|>"),
    Reasoning("seed_oss", "<seed:think>", "</seed:think>"),
    Reasoning("kimi", "◁think▷", "◁/think▷"),
    Reasoning("exaone", "<thought>", "</thought>"),
    Reasoning("granite", "Here is my thought process:", "Here is my response:"),
    Reasoning("think", "<think>", "</think>"),
)

OFF = "none"
AUTO = "auto"
CALL_NAMES = tuple(row.name for row in CALLS)
REASONING_NAMES = tuple(row.name for row in REASONING)


Row = TypeVar("Row", Calls, Reasoning)


@dataclass(frozen=True, slots=True)
class Format:
    """What a model's replies consist of."""

    calls: Calls = TGI
    reasoning: Reasoning | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    """The special tokens that they are spelled with, text → id. As text these must not be left out, as others are."""

    def spelled_with(self, special: Mapping[str, int]) -> "Format":
        """The same for a model with these special tokens, text → id."""
        calls, reasoning = self.calls, self.reasoning
        marks = [calls.tail, calls.closes, calls.style.marks]
        for way in (calls, *calls.also):
            marks += way.opens, way.head, way.middle, way.between
        if reasoning is not None:
            marks += reasoning.opens, reasoning.closes, reasoning.joint, reasoning.answers, *reasoning.dropped
        return replace(self, special={text: id for text, id in special.items() if any(text in mark for mark in marks)})


def format_of(template: str, added: Collection[str], calls: str = AUTO, reasoning: str = AUTO) -> Format:
    """What a model with this chat template and these added tokens writes. ``calls`` and ``reasoning`` are names of
    rows, or AUTO; of reasoning also OFF."""
    spelling = (row for row in CALLS if row.signs and all(sign in template for sign in row.signs))
    thinking = (
        row for row in REASONING if (row.sign or row.closes) in template or {row.opens, row.closes} <= set(added)
    )
    return Format(
        _named(CALLS, calls) or next(spelling, TGI),
        None if reasoning == OFF else _named(REASONING, reasoning) or next(thinking, None),
    )


def words(spelling: str) -> list[str]:
    """Cut a spelling where it may have more or less white space when it is read."""
    return _WORD.findall(spelling)


def placed(spelling: str, place: int) -> str:
    return spelling.replace(PLACE, str(place))


def _named(rows: Iterable[Row], name: str) -> Row | None:
    return next((row for row in rows if row.name == name), None)
