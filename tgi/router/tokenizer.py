"""Text ↔ token ids, and the model's special tokens and chat templates. Knows the ``tokenizers`` library and the files
of a model folder; knows no request."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from tgi.core.errors import StartupError
from tgi.router.rendering import ROLES

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a single byte that no token covers."""

SHORT = 4096
"""Characters of texts that take no time worth mentioning."""

UNBOUNDED = 10**9
"""Files say "no limit" with a ``model_max_length`` of 1e30."""


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself, the other bytes
    for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class Tokenizer:
    """A model's tokenizer. Threads may share it; ``encode`` and ``spans`` work on longer texts than SHORT without the
    interpreter lock."""

    special_ids: frozenset[int]
    """Tokens that steer the model and are no text."""
    added: dict[str, int]
    """Text → id of the tokens that stand beside the vocabulary proper: marks, special ones and others."""
    eos_ids: frozenset[int]
    """Tokens that end a generation: those that generation_config.json names (one or a list), or else config.json, and
    the tokenizer's own end token. A chat model's end of turn is often in only one of the two places."""
    special_tokens: dict[str, str]
    """Role → text: "bos_token", "eos_token" and so on, where the model has one."""
    vocab_size: int
    """Every token id is below it."""
    model_max_length: int | None
    chat_templates: dict[str, str]
    """Name → Jinja source, "default" first. An operator's own tokenizer config has the last word, then
    chat_template.jinja, then chat_template.json, then tokenizer_config.json; additional_chat_templates/ adds to what is
    in the folder."""

    def __init__(self, backend: tokenizers.Tokenizer, files: _Files) -> None:
        # A tokenizer.json can carry its training set-up; requests are cut by validation, with a word to the client.
        backend.no_truncation()
        backend.no_padding()
        named = files.special_tokens()
        # A token that only the config calls special must not be decoded as text. One that the vocabulary lacks is left
        # out: adding it would make an id that the model has no embedding for.
        backend.add_special_tokens([text for text in named.values() if backend.token_to_id(text) is not None])
        added = backend.get_added_tokens_decoder()

        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), *(id + 1 for id in added), 0)
        self.special_tokens = {role: named[role] for role in ROLES if role in named}
        eos_token = named.get("eos_token")
        own_eos = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_ids = files.eos_ids() | ({own_eos} if own_eos is not None else set())
        self.model_max_length = files.model_max_length()
        self.chat_templates = files.chat_templates()
        self._anchor = self._find_anchor()
        self._before = self._decode([self._anchor])
        self._after = self._decode([self._anchor, self._anchor]).removeprefix(self._before)

    @classmethod
    def load(cls, folder: Path, tokenizer_config_path: Path | None = None) -> Tokenizer:
        """Read tokenizer.json and, where there are any, the files beside it.

        ``tokenizer_config_path`` is read in place of the folder's tokenizer_config.json. Raises StartupError naming the
        file that is missing or can't be read.
        """
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
        return cls(backend, _Files(folder, tokenizer_config_path))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._encode(text, self._backend.encode_batch_fast, add_special_tokens).ids

    def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, str, int, int]]:
        """Each token as (id, the piece of ``text`` it covers, start, stop), counted in UTF-8 bytes.

        Special tokens that were added cover nothing; tokens that share a character cover all of it.
        """
        encoding = self._encode(text, self._backend.encode_batch, add_special_tokens)
        # The library counts characters here.
        at = list(accumulate((len(char.encode()) for char in text), initial=0))
        return [
            (id, text[start:stop], at[start], at[stop])
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence. For a generation, which continues its prompt, see ``stream.Detokenizer``."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str:
        """The text of one token decoded alone; specials keep their name, a part of a character is U+FFFD."""
        return self._decode([token_id])

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

    def _encode(
        self, text: str, batch: Callable[..., list[tokenizers.Encoding]], add_special_tokens: bool
    ) -> tokenizers.Encoding:
        """``batch`` is how the library encodes several texts. Only there does it let go of the interpreter lock, and it
        does so in threads of its own, where a short text would wait for long ones."""
        if len(text) <= SHORT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        (encoding,) = batch([text], add_special_tokens=add_special_tokens)
        return encoding

    def _measure(self, context: list[int], token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        text = self._decode([*context, token_id, self._anchor]).removesuffix(self._after)
        if context:
            text = text.removeprefix(self._before)
        if "\ufffd" in text:
            raw = _raw_bytes(token)
            if raw is not None and raw.decode(errors="replace") == text:
                return raw
        return text.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _find_anchor(self) -> int:
        """A plain token that reads the same whatever stands before it: a letter, if the vocabulary has one."""
        letters = (self._backend.token_to_id(letter) for letter in string.ascii_lowercase)
        for id in chain(letters, range(self.vocab_size)):
            if id is None or id in self.special_ids:
                continue
            once, twice = self._decode([id]), self._decode([id, id])
            if once and "\ufffd" not in twice and twice != once and twice.startswith(once):
                return id
        raise StartupError("tokenizer.json has no token that decodes to plain text")


def _raw_bytes(token: str) -> bytes | None:
    """The bytes that a token of byte-level BPE or of SentencePiece's byte fallback spells; None for other tokens."""
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if all(char in BYTE_ALPHABET for char in token):
        return bytes(BYTE_ALPHABET[char] for char in token)
    return None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _Files:
    """The JSON and Jinja files beside tokenizer.json; each may be absent."""

    def __init__(self, folder: Path, tokenizer_config_path: Path | None) -> None:
        self._folder = folder
        self._own_path = tokenizer_config_path
        if tokenizer_config_path is not None and not tokenizer_config_path.is_file():
            raise StartupError(f"--tokenizer-config-path {tokenizer_config_path}: no such file")
        self._config_path = tokenizer_config_path or folder / "tokenizer_config.json"
        self._config = self._read(self._config_path)
        self._map = self._read(folder / "special_tokens_map.json")

    def special_tokens(self) -> dict[str, str]:
        """Name → text for bos_token, eos_token, pad_token, …, declared as a string or as ``{"content": …}``."""
        declared = self._map | {name: value for name, value in self._config.items() if value}
        texts = {
            name: value.get("content") if isinstance(value, Mapping) else value for name, value in declared.items()
        }
        return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}

    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids("generation_config.json") or self._eos_ids("config.json")

    def _eos_ids(self, name: str) -> frozenset[int]:
        path = self._folder / name
        config = self._read(path)
        value = config.get("eos_token_id")
        if value is None and isinstance(text_config := config.get("text_config"), Mapping):
            value = text_config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and abs(id) < 2**31 for id in ids):
            raise StartupError(f"{path}: eos_token_id must be an integer or a list of integers, not {value!r}")
        return frozenset(ids)

    def model_max_length(self) -> int | None:
        value = self._config.get("model_max_length")
        return int(value) if isinstance(value, int | float) and 0 < value < UNBOUNDED else None

    def chat_templates(self) -> dict[str, str]:
        found = _named(self._config.get("chat_template"), self._config_path)
        if self._own_path is None or not found:
            legacy = self._folder / "chat_template.json"
            found = _named(self._read(legacy).get("chat_template"), legacy) or found
            jinja = self._folder / "chat_template.jinja"
            if jinja.is_file():
                found = {"default": _text(jinja)}
            for path in sorted((self._folder / "additional_chat_templates").glob("*.jinja")):
                found[path.stem] = _text(path)
        return dict(sorted(found.items(), key=lambda item: item[0] != "default"))

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            raise StartupError(f"{path} can't be read: {error}") from error


def _named(value: object, path: Path) -> dict[str, str]:
    """``chat_template`` is one source or several with names."""
    try:
        templates = msgspec.convert(value, str | list[_NamedTemplate] | dict[str, str] | None)
    except msgspec.ValidationError as error:
        raise StartupError(f"{path}: chat_template must be a string or a list of name and template") from error
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, dict):
        return templates
    return {item.name: item.template for item in templates or []}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error
