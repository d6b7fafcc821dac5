"""Chat templates, rendered as transformers renders them. Knows Jinja and messages as dicts; knows no wire format."""

import json
import logging
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tgi.core.errors import TEMPLATE, VALIDATION, RequestError
from tgi.router.tokenizer import ROLES

log = logging.getLogger(__name__)

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning. Templates read the first, gpt-oss's the second."""

_OWN = {*ROLES, "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
"""Variables that are not the request's to set."""


class ChatTemplates:
    """A model's chat templates by name. A model that has none has one that refuses every conversation."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: "bos_token", "eos_token", … → text, which templates read under these names."""
        named = {name: ChatTemplate(source, special_tokens) for name, source in sources.items()}
        self._default = named.get("default") or ChatTemplate(None, special_tokens)
        self._tool_use = named.get("tool_use", self._default)
        self._rag = named.get("rag", self._default)

    def choose(self, *, tools: bool = False, documents: bool = False) -> "ChatTemplate":
        """As transformers chooses: "tool_use" for a conversation with tools, or else "default". For documents that
        "default" doesn't read it is "rag", which transformers must be told."""
        if tools:
            return self._tool_use
        return self._rag if documents and not self._default.takes_documents else self._default


class ChatTemplate:
    """One chat template; one that is missing or doesn't compile answers every render with an error.

    What it does as transformers does: the Jinja dialect (see ``_environment``), the variables, keys whose value is null
    left out, reasoning under every name.

    ``content`` reaches the template as a string or as a list of parts, as the client sent it, unless the template can't
    read that: parts are joined (with nothing between them) for a template that reads no parts, and a string becomes
    one text part for a template that reads parts and never asks whether the content is a string.
    """

    variables: frozenset[str] = frozenset()
    """What it reads besides the conversation, for the request to set: its options."""

    takes_tools = False
    """Whether it shows the model the tools, …"""
    takes_calls = False
    """… the calls of earlier messages, …"""
    takes_documents = False
    """… and documents."""
    options: frozenset[str] = frozenset()
    """The variables that a request may set."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        # Left undefined where the model has none: None would be printed as "None".
        self._tokens = dict(special_tokens)
        self._error = "template not found"
        self._template = None
        self._reads_parts = self._asks_for_string = False
        if source is None:
            return
        environment = _environment()
        try:
            tree = environment.parse(source)
            reads = find_undeclared_variables(tree)
            self.takes_tools, self.takes_documents = "tools" in reads, "documents" in reads
            self.takes_calls = _names(tree, "tool_calls")
            self.options = frozenset(reads - environment.globals.keys() - _OWN)
            self._reads_parts = _reads_parts(tree)
            self._asks_for_string = any(test.name == "string" for test in tree.find_all(nodes.Test))
            self._template = environment.from_string(tree)
        except TemplateError as error:
            self._error = f"the model's chat template doesn't compile: {error}"
            log.warning("%s; chat requests will be refused", self._error)

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
            raise RequestError(TEMPLATE, self._error)
        if documents and not self.takes_documents:
            raise RequestError(VALIDATION, "`documents` is not supported: the model's chat template doesn't read them")
        if not all(isinstance(document, dict) for document in documents or []):
            raise RequestError(VALIDATION, "`documents` must be a list of objects")
        options = options or {}
        for name in options.keys() - self.options:
            known = ", ".join(f"`{option}`" for option in sorted(self.options)) or "no options"
            raise RequestError(
                VALIDATION, f"`chat_template_kwargs` must not set `{name}`: the model's chat template has {known}"
            )
        messages = [self._readable(message) for message in messages]
        mark = ""
        if continue_final_message:
            mark = secrets.token_hex(16)
            messages = [*messages[:-1], _with_text_appended(messages[-1:], mark)]
        variables = {
            **self._tokens,
            **options,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # the template is somebody else's program, and only this request is its input
            raise RequestError(TEMPLATE, str(error) or type(error).__name__) from error
        if continue_final_message:
            # The template shows where the text ends. Looking for the text itself would find it in what follows, too.
            text, found, _ = text.rpartition(mark)
            if not found:
                raise RequestError(TEMPLATE, "the template drops the final message, which can't be continued")
            text = text.rstrip()
        return text

    def _readable(self, message: Message) -> Message:
        """The message in the form that this template reads; the caller's stays as it is."""
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[field] for field in REASONING_FIELDS if field in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts:
            message["content"] = "".join(_part_text(part) for part in content)
        elif isinstance(content, str) and self._reads_parts and not self._asks_for_string:
            message["content"] = [{"type": "text", "text": content}]
        return message


def _part_text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(
            TEMPLATE, f"the model's chat template takes text only, not a part of type {part.get('type')!r}"
        )
    return text


def _with_text_appended(last: list[Message], mark: str) -> Message:
    """The last message with ``mark`` behind its text, or behind its last text part."""
    content = last[0].get("content") if last else None
    if isinstance(content, str):
        return {**last[0], "content": content + mark}
    if isinstance(content, list):
        for i in reversed(range(len(content))):
            if isinstance(content[i].get("text"), str):
                marked = {**content[i], "text": content[i]["text"] + mark}
                return {**last[0], "content": [*content[:i], marked, *content[i + 1 :]]}
    raise RequestError(TEMPLATE, "the final message has no text to continue")


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
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _dict,
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


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # Not the type itself: its unbound methods (``dict.update(message, …)``) would change what the sandbox protects.
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
