"""Chat templates, rendered as transformers renders them. Knows Jinja and messages as dicts; knows no wire format."""

from typing import Any


class ChatTemplate:
    def __init__(self, source: str | None, bos_token: str | None, eos_token: str | None) -> None:
        raise NotImplementedError

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads ``tools``."""
        raise NotImplementedError

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        raise NotImplementedError
