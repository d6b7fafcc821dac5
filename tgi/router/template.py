"""Chat templates, rendered as transformers renders them, and the process that does it for a router.

Knows Jinja and messages as dicts; knows no wire format.
"""

import json
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tgi.core.errors import TEMPLATE, VALIDATION, RequestError
from tgi.router.rendering import EXHAUSTED, ROLES, Template
from tgi.router.worker import bound, serve

MEMORY = 1 << 28
"""Bytes that a render may add to the process."""

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning. Templates read the first, gpt-oss's the second."""

_OWN = {
    *ROLES,
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("caller", "kwargs", "loop", "self", "super", "varargs"),
}
"""Variables that a request can't set: what it says elsewhere, and Jinja's."""

MAX_OPTIONS = 1 << 16
"""Characters of JSON."""

DEFAULT_LARGEST = 1 << 23


class ChatTemplate:
    """One chat template; one that is missing or doesn't compile answers every render with an error.

    What it does as transformers does: the Jinja dialect (see ``_environment``), the variables, keys whose value is null
    left out, reasoning under every name.

    ``content`` reaches the template as a string or as a list of parts, as the client sent it, unless the template can't
    read that: parts are joined (with nothing between them) for a template that reads no parts, and a string becomes
    one text part for a template that reads parts and never asks whether the content is a string.
    """

    takes_tools = False
    """Whether it shows the model the tools, …"""
    takes_calls = False
    """… the calls of earlier messages, …"""
    takes_documents = False
    """… and documents."""
    options: frozenset[str] = frozenset()
    """The variables that a request may set."""

    error: str | None = "template not found"
    """Why it refuses every conversation."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], largest: int = DEFAULT_LARGEST) -> None:
        """``special_tokens``: "bos_token", "eos_token", … → text, which it reads under these names. ``largest``:
        characters of a prompt."""
        # Left undefined where the model has none: None would be printed as "None".
        self._tokens = dict(special_tokens)
        self._largest = largest
        self._template: jinja2.Template | None = None
        self._reads_parts = self._asks_for_string = False
        if source is None:
            return
        try:
            environment = _environment()
            tree = environment.parse(source)
            reads = find_undeclared_variables(tree)
            self.takes_tools, self.takes_documents = "tools" in reads, "documents" in reads
            self.takes_calls = _names(tree, "tool_calls")
            self.options = frozenset(reads - environment.globals.keys() - _OWN - _assigned(tree))
            self._reads_parts = _reads_parts(tree)
            self._asks_for_string = any(test.name == "string" for test in tree.find_all(nodes.Test))
            self._template = environment.from_string(tree)
            self.error = None
        except Exception as error:  # Python's compiler has its own limits, and its own errors for them
            self.error = f"the model's chat template doesn't compile: {_words(error)}"

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt for these messages.

        ``continue_final_message``: the prompt ends with the text of the last message for the model to go on; no
        generation prompt is added. ``options``: values for some of ``options``, plain JSON. Raises RequestError:
        TEMPLATE with the template's own words where it refuses the conversation, VALIDATION for what it doesn't read.
        """
        if self._template is None:
            raise RequestError(TEMPLATE, self.error or "")
        if documents and not self.takes_documents:
            raise RequestError(VALIDATION, "`documents` is not supported: the model's chat template doesn't read them")
        if not all(isinstance(document, dict) for document in documents or []):
            raise RequestError(VALIDATION, "`documents` must be a list of objects")
        self._check(options or {})
        messages = [self._readable(message) for message in messages]
        final = mark = ""
        if continue_final_message:
            mark = secrets.token_hex(16)
            final, messages[-1:] = _with_text_appended(messages[-1:], mark + " ")
        variables = {
            **self._tokens,
            **(options or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._template.render(variables)
        except MemoryError:
            raise RequestError(TEMPLATE, EXHAUSTED) from None
        except Exception as error:  # the template is somebody else's program, and only this request is its input
            raise RequestError(TEMPLATE, _words(error)) from error
        if len(text) > self._largest:
            raise RequestError(TEMPLATE, EXHAUSTED)
        return _continued(text, final, mark) if continue_final_message else text

    def _check(self, options: Mapping[str, Any]) -> None:
        for name in options.keys() - self.options:
            known = ", ".join(f"`{option}`" for option in sorted(self.options)) or "no options"
            raise RequestError(
                VALIDATION, f"`chat_template_kwargs` must not set `{name}`: the model's chat template has {known}"
            )
        try:
            size = len(json.dumps(options)) if options else 0
        except RecursionError:
            raise RequestError(VALIDATION, "`chat_template_kwargs` is nested too deeply") from None
        if size > MAX_OPTIONS:
            raise RequestError(VALIDATION, f"`chat_template_kwargs` must have at most {MAX_OPTIONS} characters")

    def _readable(self, message: Message) -> Message:
        """The message in the form that this template reads; the caller's stays as it is."""
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[field] for field in REASONING_FIELDS if field in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_addable(call) for call in calls]
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts:
            message["content"] = "".join(_part_text(part) for part in content)
        elif isinstance(content, str) and self._reads_parts and not self._asks_for_string:
            message["content"] = [{"type": "text", "text": content}]
        return message


class _Arguments(dict[str, Any]):
    """A call's arguments. Some templates take them for JSON in a string, and put it between others."""

    def __radd__(self, before: str) -> str:
        return before + _to_json(self)


def _addable(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": _Arguments(function["arguments"])}}


def _part_text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(
            TEMPLATE, f"the model's chat template takes text only, not a part of type {part.get('type')!r}"
        )
    return text


def _with_text_appended(last: list[Message], mark: str) -> tuple[str, list[Message]]:
    """The text of the last message, or of its last text part; and the message with ``mark`` behind that."""
    content = last[0].get("content") if last else None
    if isinstance(content, str):
        return content, [{**last[0], "content": content + mark}]
    if isinstance(content, list):
        for i in reversed(range(len(content))):
            if isinstance(text := content[i].get("text"), str):
                marked = {**content[i], "text": text + mark}
                return text, [{**last[0], "content": [*content[:i], marked, *content[i + 1 :]]}]
    raise RequestError(TEMPLATE, "the final message has no text to continue")


def _continued(text: str, final: str, mark: str) -> str:
    """The text up to the mark, which shows where the final message ends: what that says may also occur behind it."""
    start, found, rest = text.rpartition(mark)
    if not found or final.strip() not in start:
        raise RequestError(TEMPLATE, "the template drops the final message, or a part of it, which can't be continued")
    # A template that strips the space behind the mark would have stripped the message's own.
    return start if rest.startswith(" ") else start.rstrip()


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _assigned(tree: nodes.Node) -> set[str]:
    """The template's own variables, which it assigns whether they have a value or not. Who assigns an option's default
    looks at the option first."""
    assigned: set[str] = set()

    def names(node: nodes.Node) -> set[str]:
        return {name.name for name in (node, *node.find_all(nodes.Name)) if isinstance(name, nodes.Name)}

    def walk(node: nodes.Node, looked_at: set[str]) -> None:
        match node:
            case nodes.If():
                looked_at = looked_at | names(node.test)
            case nodes.Assign():
                assigned.update(names(node.target) - names(node.node) - looked_at)
            case nodes.AssignBlock():
                assigned.update(names(node.target) - looked_at)
        for child in node.iter_child_nodes():
            walk(child, looked_at)

    walk(tree, set())
    return assigned


def _names(tree: nodes.Template, key: str) -> bool:
    """Whether a template looks at a key of this name, or asks for it."""
    return any(node.attr == key for node in tree.find_all(nodes.Getattr)) or any(
        node.value == key for node in tree.find_all(nodes.Const)
    )


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether a template loops over a message's content, or takes the text of one of its parts by position.

    Follows content through ``set``, filters and slices, and takes any variable or macro argument named ``content`` for
    it.
    """
    names = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name(name=name):
                return name in names
            case nodes.Getattr(attr="content"):
                return True
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Getitem(node=inner, arg=nodes.Slice()) | nodes.Filter(node=inner):
                return is_content(inner)
        return False

    def is_part_text(node: nodes.Node) -> bool:
        match node:
            case nodes.Getattr(attr="text", node=part) | nodes.Getitem(arg=nodes.Const(value="text"), node=part):
                return isinstance(part, nodes.Getitem) and is_content(part.node)
        return False

    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            names.add(assign.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For)) or any(
        is_part_text(node) for node in tree.find_all((nodes.Getattr, nodes.Getitem))
    )


class _Generation(Extension):
    """``{% generation %}`` marks the model's own words for training; a prompt takes the body as it is."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """``namespace()`` without names that begin with an underscore: Python looks some of those up on its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # ``self`` is a legal name in a namespace
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template can't set {name!r} on a namespace")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect of transformers' ``apply_chat_template``: a sandbox in which nothing that it is given can change,
    tag lines that leave no white space behind, ``break`` and ``continue``, JSON without HTML escapes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # it would compute what is constant at once, for as long as that takes
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """``dict`` without its unbound methods: ``dict.update(message, …)`` would change what the sandbox protects."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def main() -> None:
    """The process: ``python -m tgi.router.template``. What is asked first are the sources; the rest are renders."""
    templates: dict[str, ChatTemplate] = {}

    def answer(question: bytes) -> bytes:
        asked = json.loads(question)
        if not templates:
            sources = {"default": None, **asked.pop("sources")}
            templates.update({name: ChatTemplate(source, **asked) for name, source in sources.items()})
            return json.dumps([_described(*named) for named in templates.items()]).encode()
        try:
            return json.dumps({"text": templates[asked.pop("template")].render(**asked)}).encode()
        except RequestError as error:
            return json.dumps({"type": error.kind.type, "detail": error.detail}).encode()

    bound(MEMORY)
    serve(answer)


def _described(name: str, template: ChatTemplate) -> Template:
    options = sorted(template.options)
    return Template(name, template.takes_tools, template.takes_calls, template.takes_documents, options, template.error)


if __name__ == "__main__":
    main()
