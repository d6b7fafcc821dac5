"""The way in of every chat dialect: a conversation becomes a prompt and parameters. Knows no answer."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from tgi.router.formats import Format
from tgi.router.grammar import grammar_of
from tgi.router.pipeline import Service
from tgi.router.rendering import Template
from tgi.router.tools import Tools
from tgi.router.validate import invalid
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import ChatRequest, ImagePart, Message, OpenAIRequest

SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that turns reasoning on or off."""


class Prompt(NamedTuple):
    text: str
    format: Format
    """How the model's replies to it are spelled."""
    thinking: bool
    """It has opened the reasoning: the reply begins in it."""
    thoughtless: bool
    """Reasoning isn't wanted, and the template can't tell the model."""


async def prompt_of(service: Service, request: ChatRequest, tools: Tools | None) -> Prompt:
    """The conversation and its tools as the model's template writes them. A last message by the assistant is gone on
    with."""
    template = await service.templates.choose(tools=tools is not None, documents=bool(request.documents))
    format = service.formats[template.name]
    last = request.messages[-1] if request.messages else None
    goes_on = request.continue_final_message
    if goes_on and request.add_generation_prompt:
        raise invalid("`continue_final_message` and `add_generation_prompt` must not both be true")
    if goes_on is None and not request.add_generation_prompt:
        goes_on = last is not None and last.role == "assistant" and last.content is not None and not last.tool_calls
    messages = [_as_template_reads(message, template, format) for message in request.messages]
    if tools is not None:
        told = tools.instructions(request.tool_prompt, format.calls, shown=template.takes_tools)
        for message in reversed(messages):
            if message["role"] != "assistant" and message["content"] is not None:
                message["content"] = _with_text(message["content"], told)
                break
    options, thoughtless = _options(request, template, format)
    text = await service.templates.render(
        template,
        messages=messages,
        tools=tools.definitions if tools and template.takes_tools else None,
        add_generation_prompt=not goes_on if request.add_generation_prompt is None else request.add_generation_prompt,
        continue_final_message=goes_on or False,
        documents=request.documents or None,
        options=options,
    )
    # Where nobody asks for the continuation by its name it is TGI's, which ends without white space.
    text = text.rstrip() if goes_on and request.continue_final_message is None else text
    return Prompt(text, format, _thinks(text, format, last if goes_on else None), thoughtless)


def _thinks(prompt: str, format: Format, continued: Message | None) -> bool:
    """Whether a prompt ends within reasoning: its opening comes last, or the message that is gone on with has not
    closed it."""
    if (reasoning := format.reasoning) is None:
        return False
    if continued is not None and isinstance(continued.content, str):
        return continued.content.rfind(reasoning.opens) > continued.content.rfind(reasoning.closes)
    return prompt.rstrip().endswith(reasoning.opens.strip())


def _options(request: ChatRequest, template: Template, format: Format) -> tuple[Mapping[str, Any], bool]:
    """What the template is told beside the conversation, and whether reasoning isn't wanted and that can't be told.

    ``chat_template_kwargs`` wins over the fields for the same.
    """
    effort, wanted = request.reasoning_effort, request.enable_thinking
    if effort == "none" and wanted:
        raise invalid("`enable_thinking` is true, and `reasoning_effort` none")
    switch = next((name for name in SWITCHES if name in template.options), None)
    options: dict[str, Any] = {}
    if effort is not None:
        graded = "reasoning_effort" in template.options
        if graded:
            options["reasoning_effort"] = effort
        elif effort != "none" and switch is None:
            raise invalid("`reasoning_effort` is not supported: the model's chat template doesn't read it")
        if wanted is None and (effort == "none" or not graded):
            wanted = effort != "none"
    if switch is not None and wanted is not None:
        options[switch] = wanted
    elif wanted and format.reasoning is None:
        raise invalid("`enable_thinking` is not supported: the model doesn't reason")
    if request.thinking_budget is not None and "thinking_budget" in template.options:
        options["thinking_budget"] = request.thinking_budget
    thoughtless = wanted is False and switch is None and format.reasoning is not None
    return options | (request.chat_template_kwargs or {}), thoughtless


def is_greedy(request: OpenAIRequest) -> bool:
    return request.temperature == 0 or request.top_p == 0


def to_parameters(
    request: OpenAIRequest, max_tokens: int | None, top_logprobs: int | None = None, *, add_special_tokens: bool = True
) -> GenerateParameters:
    """In TGI's terms. OpenAI samples unless told not to; its ``top_p`` includes both ends: 0 is greedy, 1 is off; its
    seeds have a sign. ``add_special_tokens``: what the route does unless told otherwise."""
    if request.top_p is not None and not 0 <= request.top_p <= 1:
        raise invalid("`top_p` must be >= 0.0 and <= 1.0")
    logit_bias = request.logit_bias or None
    if isinstance(logit_bias, list):
        raise invalid("`logit_bias` as a list is not supported: send an object of token ids and biases")
    return GenerateParameters(
        do_sample=True,
        temperature=request.temperature or None,
        top_p=None if request.top_p in (0, 1) else request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=logit_bias,
        max_new_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos or False,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        stop_token_ids=request.stop_token_ids or [],
        include_stop_str_in_output=request.include_stop_str_in_output or False,
        skip_special_tokens=request.skip_special_tokens is not False,
        add_special_tokens=add_special_tokens if request.add_special_tokens is None else request.add_special_tokens,
        watermark=request.watermark or False,
        seed=request.seed if request.seed is None or request.seed >= 0 else request.seed % 2**64,
        top_n_tokens=top_logprobs,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        grammar=grammar_of(request),
    )


def _as_template_reads(message: Message, template: Template, format: Format) -> dict[str, Any]:
    """For a template that doesn't write out tool calls they are text, as the model spells them."""
    if not isinstance(message.content, str) and any(isinstance(part, ImagePart) for part in message.content or []):
        raise invalid("`image_url` content is not supported")
    try:
        plain: dict[str, Any] = msgspec.to_builtins(message)
        calls = [_as_called(call) for call in plain["tool_calls"] or []]
        if format.calls.ids == "nine":
            plain["tool_call_id"] = plain["tool_call_id"] and _nine(plain["tool_call_id"])
            for call in calls:
                call["id"] = _nine(call["id"])
        if calls and not template.takes_calls:
            spelled = format.calls.spelled((call["function"]["name"], call["function"]["arguments"]) for call in calls)
            plain["content"] = _with_text(plain["content"], "\n" + spelled) if plain["content"] else spelled
    except RecursionError:
        raise invalid("the arguments of `tool_calls` are nested too deeply") from None
    return plain


def _nine(id: str) -> str:
    """An id as some templates insist on: those of other shapes have another, always the same."""
    if len(id) == 9 and id.isalnum() and id.isascii():
        return id
    return hashlib.blake2b(id.encode(errors="replace"), digest_size=5).hexdigest()[:9]


def _with_text(content: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    return content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]


def _as_called(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends arguments as JSON in a string; templates write the object out themselves."""
    function = call["function"]
    arguments = function["parameters"] if function["arguments"] is None else function["arguments"]
    if isinstance(arguments, str):
        with suppress(msgspec.DecodeError):
            arguments = msgspec.json.decode(arguments or "{}")
    call["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return call
