"""Text ↔ token ids, and the model's special tokens and chat templates. Knows the ``tokenizers`` library and the files
of a model folder; knows no request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec
import tokenizers

from tgi.core.errors import StartupError
from tgi.core.vocabulary import CONFIG, FILL_IN, Vocabulary, read_json
from tgi.router import galactica
from tgi.router.rendering import ROLES

SHORT = 4096
"""Characters of texts that take no time worth mentioning."""

UNBOUNDED = 10**9
"""Files say "no limit" with a ``model_max_length`` of 1e30."""


class Tokenizer:
    """A model's tokenizer. Threads may share it; ``encode`` and ``spans`` work on longer texts than SHORT without the
    interpreter lock."""

    special_ids: frozenset[int]
    """Tokens that steer the model and are no text."""
    shown_ids: frozenset[int]
    """Special tokens that are part of what the model says: Galactica's marks around what it cites or computes, and
    SantaCoder's for filling in the middle."""
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

    def __init__(self, vocabulary: Vocabulary, files: _Files) -> None:
        self._vocabulary = vocabulary
        self._backend = vocabulary.backend
        self._texts: dict[int, str | None] = {}
        self.added = vocabulary.added
        self.special_ids = vocabulary.special_ids
        self.shown_ids = frozenset(vocabulary.added[text] for text in FILL_IN if text in vocabulary.added)
        self._sequences = galactica.MARKER in str(vocabulary.backend.pre_tokenizer)
        if self._sequences:
            named_ids = {vocabulary.added.get(text) for text in vocabulary.special_tokens.values()}
            self.shown_ids |= vocabulary.special_ids - named_ids
        self.vocab_size = vocabulary.size
        named = vocabulary.special_tokens
        self.special_tokens = {role: named[role] for role in ROLES if role in named}
        eos_token = named.get("eos_token")
        own_eos = None if eos_token is None else self._backend.token_to_id(eos_token)
        self.eos_ids = files.eos_ids() | ({own_eos} if own_eos is not None else set())
        self.model_max_length = files.model_max_length()
        self.chat_templates = files.chat_templates()

    @classmethod
    def load(cls, folder: Path, tokenizer_config_path: Path | None = None) -> Tokenizer:
        """Read tokenizer.json and, where there are any, the files beside it.

        ``tokenizer_config_path`` is read in place of the folder's tokenizer_config.json. Raises StartupError naming the
        file that is missing or can't be read.
        """
        files = _Files(folder, tokenizer_config_path)
        return cls(Vocabulary.load(folder, tokenizer_config_path), files)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._sequences:
            text = galactica.Marked(text).text
        return self._encode(text, self._backend.encode_batch_fast, add_special_tokens).ids

    def spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, str, int, int]]:
        """Each token as (id, the piece of ``text`` it covers, start, stop), counted in UTF-8 bytes.

        Special tokens that were added cover nothing; tokens that share a character cover all of it.
        """
        marked = galactica.Marked(text) if self._sequences else None
        encoding = self._encode(text if marked is None else marked.text, self._backend.encode_batch, add_special_tokens)
        offsets = encoding.offsets
        if marked is not None:
            offsets = [(marked.origin(start), marked.origin(stop)) for start, stop in offsets]
        # The library counts characters here.
        at = list(accumulate((len(char.encode()) for char in text), initial=0))
        return [
            (id, text[start:stop], at[start], at[stop]) for id, (start, stop) in zip(encoding.ids, offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence. For a generation, which continues its prompt, see ``stream.Detokenizer``."""
        return self._vocabulary.decode(ids, skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str:
        """The text of one token decoded alone; specials keep their name, a part of a character is U+FFFD."""
        return self._vocabulary.decode([token_id])

    def text(self, token_id: int) -> str | None:
        """What this token adds to a text behind another; None for a special token and for one that begins or ends
        inside a character."""
        try:
            return self._texts[token_id]
        except KeyError:
            text = None
            if token_id not in self.special_ids:
                with contextlib.suppress(UnicodeDecodeError):
                    text = self.token_bytes(token_id).decode()
            return self._texts.setdefault(token_id, text)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """See ``Vocabulary``."""
        return self._vocabulary.token_bytes(token_id, first=first)

    def _encode(
        self, text: str, batch: Callable[..., list[tokenizers.Encoding]], add_special_tokens: bool
    ) -> tokenizers.Encoding:
        """``batch`` is how the library encodes several texts. Only there does it let go of the interpreter lock, and it
        does so in threads of its own, where a short text would wait for long ones."""
        if len(text) <= SHORT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        (encoding,) = batch([text], add_special_tokens=add_special_tokens)
        return encoding


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
        self._config_path = tokenizer_config_path or folder / CONFIG
        self._config = read_json(self._config_path)

    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids("generation_config.json") or self._eos_ids("config.json")

    def _eos_ids(self, name: str) -> frozenset[int]:
        path = self._folder / name
        config = read_json(path)
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
            found = _named(read_json(legacy).get("chat_template"), legacy) or found
            jinja = self._folder / "chat_template.jinja"
            if jinja.is_file():
                found = {"default": _text(jinja)}
            for path in sorted((self._folder / "additional_chat_templates").glob("*.jinja")):
                found[path.stem] = _text(path)
        return dict(sorted(found.items(), key=lambda item: item[0] != "default"))


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
