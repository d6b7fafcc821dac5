"""From a stream of token ids to text: detokenise and find stop strings. Knows no HTTP."""

from collections.abc import Sequence

from tgi.router.tokenizer import Tokenizer


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        raise NotImplementedError

    def push(self, token_id: int) -> str:
        raise NotImplementedError

    def flush(self) -> str:
        raise NotImplementedError


class Stops:
    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        raise NotImplementedError

    def push(self, text: str) -> tuple[str, str | None]:
        raise NotImplementedError

    def flush(self) -> str:
        raise NotImplementedError
