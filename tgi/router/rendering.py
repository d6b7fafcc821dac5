"""Chat templates at work: each is somebody's program, so they run in processes that can be ended. Knows no Jinja.

What a template does is ``template``'s business; here it is asked, and given so much time and memory.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from tgi.core.errors import TEMPLATE, VALIDATION, RequestError
from tgi.router.worker import LostError, Worker

log = logging.getLogger(__name__)

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Of special tokens, by which templates know them."""

EXHAUSTED = "it takes too much time or memory for this conversation"

SECONDS = 3.0
"""For one conversation. Usual ones take a thousandth of it."""


class Template(NamedTuple):
    """What one of the model's templates can do."""

    name: str
    takes_tools: bool = False
    """It shows the model the tools, …"""
    takes_calls: bool = False
    """… the calls of earlier messages, …"""
    takes_documents: bool = False
    """… and documents."""
    options: Sequence[str] = ()
    """The variables that a request may set."""
    error: str | None = None
    """Why it refuses every conversation."""


class _Reader(Protocol):
    @property
    def takes_documents(self) -> bool: ...


Kind = TypeVar("Kind", bound=_Reader)


def choose(named: Mapping[str, Kind], *, tools: bool, documents: bool) -> Kind:
    """As transformers chooses: "tool_use" for a conversation with tools, or else "default". For documents that
    "default" doesn't read it is "rag", which transformers must be told."""
    default = named["default"]
    if tools:
        return named.get("tool_use", default)
    return named.get("rag", default) if documents and not default.takes_documents else default


class Templates:
    """A model's chat templates by name, in a few processes of their own."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], largest: int, count: int) -> None:
        """``special_tokens``: "bos_token", "eos_token", … → text. ``largest``: characters of a prompt. ``count``: how
        many conversations are rendered at once."""
        first = json.dumps({"sources": dict(sources), "special_tokens": dict(special_tokens), "largest": largest})
        self._workers = [Worker("tgi.router.template", first=first.encode(), seconds=SECONDS) for _ in range(count)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="templates")
        self._known: dict[str, Template] = {}

    def start(self) -> None:
        """Begin to start the processes, so that the first conversations needn't wait for that."""
        for _ in self._workers:
            self._threads.submit(self._learn)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    async def choose(self, *, tools: bool, documents: bool) -> Template:
        """The one for a conversation with tools, or with documents."""
        if not self._known:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._learn)
        return choose(self._known, tools=tools, documents=documents)

    async def render(self, template: Template, **conversation: Any) -> str:
        """The prompt; ``conversation`` as of ``ChatTemplate.render``. Raises RequestError: TEMPLATE with the template's
        own words where it refuses the conversation, VALIDATION for what it doesn't read."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._render, template, conversation)

    def _learn(self) -> None:
        worker = self._idle.get()
        try:
            worker.start()
            known = {name: Template(name, *abilities) for name, *abilities in json.loads(worker.greeting)}
        except (TimeoutError, LostError):
            known = {"default": Template("default", error="the model's chat template takes too much time or memory")}
        finally:
            self._idle.put(worker)
        if not self._known:
            for error in filter(None, (template.error for template in known.values())):
                log.warning("chat requests will be refused: %s", error)
            self._known = known

    def _render(self, template: Template, conversation: dict[str, Any]) -> str:
        if template.error is not None:
            raise RequestError(TEMPLATE, template.error)
        worker = self._idle.get()
        try:
            question = json.dumps({"template": template.name, **conversation})
            answer = json.loads(worker.ask(question.encode()))
        except (TimeoutError, LostError):
            raise RequestError(TEMPLATE, EXHAUSTED) from None
        except RecursionError:
            raise RequestError(VALIDATION, "the conversation is nested too deeply") from None
        finally:
            self._idle.put(worker)
        if (text := answer.get("text")) is not None:
            return str(text)
        raise RequestError(TEMPLATE if answer["type"] == TEMPLATE.type else VALIDATION, answer["detail"])
