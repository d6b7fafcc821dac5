"""A model's tokens as bytes: what the router makes text of, and what grammars are about. Knows the ``tokenizers``
library, which is loaded with the first vocabulary, tokenizer.json, and which tokens the files beside it call special.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tgi.core.errors import StartupError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a single byte that no token covers."""


FILL_IN = "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"
"""SantaCoder's tokens for filling in the middle, which none of its files calls special."""


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself, the other bytes
    for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class Vocabulary:
    """The tokens of one model. Threads may share it."""

    backend: Tokenizer
    special_tokens: dict[str, str]
    """Name → text: "bos_token", "eos_token" and so on, as the files beside tokenizer.json have them."""
    added: dict[str, int]
    """Text → id of the tokens that stand beside the vocabulary proper: marks, special ones and others."""
    special_ids: frozenset[int]
    """Tokens that steer the model and are no text."""
    size: int
    """Every token id is below it."""

    def __init__(self, backend: Tokenizer, special_tokens: dict[str, str]) -> None:
        # A tokenizer.json can carry its training set-up; requests are cut by validation, with a word to the client.
        backend.no_truncation()
        backend.no_padding()
        # A token that only the config calls special must not be decoded as text. One that the vocabulary lacks is left
        # out: adding it would make an id that the model has no embedding for.
        named = *special_tokens.values(), *FILL_IN
        backend.add_special_tokens([text for text in named if backend.token_to_id(text) is not None])
        added = backend.get_added_tokens_decoder()

        self.backend = backend
        self.special_tokens = special_tokens
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.size = max(backend.get_vocab_size(with_added_tokens=True), *(id + 1 for id in added), 0)
        self._bytes: dict[int, bytes] = {}
        self._anchor = self._find_anchor()
        self._before = self.decode([self._anchor])
        self._after = self.decode([self._anchor, self._anchor]).removeprefix(self._before)

    @classmethod
    def load(cls, folder: Path, config_path: Path | None = None) -> Vocabulary:
        """Read tokenizer.json and, where there are any, the files beside it that name special tokens.

        ``config_path`` is read in place of the folder's tokenizer_config.json. Raises StartupError naming the file that
        is missing or can't be read.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StartupError(
                f"{path} is missing: a fast tokenizer is needed. Where the model has only a slow one, transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise StartupError(f"{path} can't be read: {error}") from error
        declared = read_json(folder / "special_tokens_map.json")
        declared |= {key: value for key, value in read_json(config_path or folder / CONFIG).items() if value}
        texts = {
            name: value.get("content") if isinstance(value, Mapping) else value for name, value in declared.items()
        }
        return cls(backend, {k: text for k, text in texts.items() if k.endswith("_token") and isinstance(text, str)})

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """What this token adds to a text, in UTF-8 that can begin or end inside a character.

        ``first``: no text precedes it, and SentencePiece's space in front of a word falls away. Ids that no token has
        add nothing. Holds for every decoder that turns tokens into text one by one, whatever it does at both ends of
        the whole (strip a space, spare a suffix): the token is decoded between two copies of a plain one.
        """
        if first:
            return self._measure([], token_id)
        if (data := self._bytes.get(token_id)) is None:
            data = self._bytes[token_id] = self._measure([self._anchor], token_id)
        return data

    def _measure(self, context: list[int], token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        text = self.decode([*context, token_id, self._anchor]).removesuffix(self._after)
        if context:
            text = text.removeprefix(self._before)
        if "\ufffd" in text:
            raw = _raw_bytes(token)
            if raw is not None and raw.decode(errors="replace") == text:
                return raw
        return text.encode()

    def _find_anchor(self) -> int:
        """A plain token that reads the same whatever stands before it: a letter, if the vocabulary has one."""
        letters = (self.backend.token_to_id(letter) for letter in string.ascii_lowercase)
        for id in chain(letters, range(self.size)):
            if id is None or id in self.special_ids:
                continue
            once, twice = self.decode([id]), self.decode([id, id])
            if once and "\ufffd" not in twice and twice != once and twice.startswith(once):
                return id
        raise StartupError("tokenizer.json has no token that decodes to plain text")


CONFIG = "tokenizer_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model folder; without it nothing. Raises StartupError."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error


def _raw_bytes(token: str) -> bytes | None:
    """The bytes that a token of byte-level BPE or of SentencePiece's byte fallback spells; None for other tokens."""
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if all(char in BYTE_ALPHABET for char in token):
        return bytes(BYTE_ALPHABET[char] for char in token)
    return None
