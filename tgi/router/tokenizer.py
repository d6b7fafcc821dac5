"""Text ↔ token ids, and the model's special tokens and chat templates. Knows the ``tokenizers`` library and the files
of a model folder; knows no request."""

from __future__ import annotations

from pathlib import Path


class Tokenizer:
    special_ids: frozenset[int]
    eos_ids: frozenset[int]
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int | None
    chat_templates: dict[str, str]

    @classmethod
    def load(cls, folder: Path, tokenizer_config_path: Path | None = None) -> Tokenizer:
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, str, int, int]]:
        raise NotImplementedError

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        raise NotImplementedError
