"""GGUF's vocabulary → tokenizer.json, tokenizer_config.json and generation_config.json.

A GGUF names its way of splitting text (``tokenizer.ggml.pre``) without stating it: the table here states those of
which we are certain, and any other is refused by name, since a wrong split is wrong output that no one sees.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tgi.core.errors import StartupError
from tgi.launcher.gguf.reader import GgufFile, Section

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Values of ``tokenizer.ggml.token_type`` that mean something here."""

_SPACE = "\u2581"
"""SentencePiece's visible space."""


@dataclass(frozen=True, slots=True)
class _Split:
    """How text is cut before byte-level merges."""

    pattern: str | None = None
    """None: GPT-2's."""
    digits: bool = False
    """Every digit by itself, before the pattern applies."""
    ignore_merges: bool = False
    """A word that is itself a token is never merged from parts."""
    nfc: bool = False
    add_bos: bool = False
    """Where the file doesn't say."""


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_GPT4O = rf"{_CASED % (f'{_CONTRACTION}?', f'{_CONTRACTION}?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"

_SPLITS: Mapping[str, _Split] = {
    "default": _Split(),
    "gpt-2": _Split(),
    "olmo": _Split(),
    "phi-2": _Split(),
    "mpt": _Split(nfc=True),  # GPT-NeoX's
    "bloom": _Split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "refact": _Split(digits=True),  # Granite 3 too
    "command-r": _Split(digits=True, nfc=True, add_bos=True),
    "llama-bpe": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "dbrx": _Split(_LLAMA3),  # Phi 4
    "qwen2": _Split(_QWEN2, nfc=True),
    "gpt-4o": _Split(_GPT4O),
    "tekken": _Split(_TEKKEN, ignore_merges=True, add_bos=True),
}


def convert_tokenizer(file: GgufFile) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The text of tokenizer.json, tokenizer_config.json and generation_config.json."""
    vocabulary = _Vocabulary.read(file.section("tokenizer.ggml"))
    match vocabulary.section.need("model", str):
        case "gpt2":
            tokenizer, add_bos = _byte_level(vocabulary)
        case "llama":
            tokenizer, add_bos = _sentencepiece(vocabulary, str(file.metadata.get("general.architecture"))), True
        case other:
            raise StartupError(f"tokenizer.ggml.model: {other!r} is not implemented; known: gpt2, llama")
    if (stated := vocabulary.section.get("add_bos_token", bool)) is not None:
        add_bos = stated
    add_eos = vocabulary.section.get("add_eos_token", bool) or False
    roles = {f"{role}_token": vocabulary.named(f"{key}_token_id") for role, key in _ROLES.items()}
    bos, eos = roles["bos_token"], roles["eos_token"]
    if post := _post_processor(vocabulary, bos if add_bos else None, eos if add_eos else None):
        tokenizer.post_processor = post
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
    }
    config |= {role: token for role, token in roles.items() if token is not None}
    if template := _chat_template(file.section("tokenizer")):
        config["chat_template"] = template
    return tokenizer.to_str(), config, _generation_config(vocabulary.section)


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Hugging Face's name of a token's role → GGUF's."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The tokens and what else ``tokenizer.ggml`` says."""

    section: Section
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, section: Section) -> "_Vocabulary":
        tokens = section.list("tokens", str)
        if not tokens:
            raise StartupError("tokenizer.ggml.tokens is missing")
        types = section.list("token_type", int) or [_NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise StartupError(f"tokenizer.ggml.token_type: {len(types)} values for {len(tokens)} tokens")
        return cls(section, tokens, types)

    def named(self, key: str) -> str | None:
        """The token that an id in the metadata stands for."""
        index = self.section.get(key, int)
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise StartupError(f"tokenizer.ggml.{key}: {index} is not one of {len(self.tokens)} tokens")
        return self.tokens[index]

    def ids(self) -> dict[str, int]:
        """Token → id; the first of equal tokens keeps its id."""
        return {token: index for index, token in reversed(list(enumerate(self.tokens)))}


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE as GPT-2 introduced it, and whether bos comes first where the file doesn't say."""
    pre = vocabulary.section.need("pre", str)
    if pre not in _SPLITS:
        raise StartupError(f"tokenizer.ggml.pre: {pre!r} is not implemented; known: {', '.join(_SPLITS)}")
    split = _SPLITS[pre]
    lines = [line.partition(" ") for line in vocabulary.section.list("merges", str) or ()]
    merges = [(left, right) for left, _, right in lines]
    ids = vocabulary.ids()
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise StartupError(f"tokenizer.ggml.merges: {left!r} and {right!r} don't merge tokens into a token")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=split.ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, vocabulary, frozenset())
    return tokenizer, split.add_bos


def _sentencepiece(vocabulary: _Vocabulary, architecture: str) -> Tokenizer:
    """SentencePiece's BPE with byte fallback. The file has scores instead of merges: a pair merges the earlier, the
    higher the score of the token that it makes."""
    gemma = architecture.startswith("gemma")
    tokens = vocabulary.tokens
    if gemma:
        # Runs of spaces are kept as such in the file, but are merged like other words from visible ones.
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        vocabulary = _Vocabulary(vocabulary.section, tokens, vocabulary.types)
    ids = vocabulary.ids()
    if gemma:
        # Its scores say nothing about the order of merges, the order of the vocabulary does.
        scores: list[float] = [-index for index in range(len(tokens))]
    else:
        scores = vocabulary.section.list("scores", float) or []
        if len(scores) != len(tokens):
            raise StartupError(f"tokenizer.ggml.scores: {len(scores)} values for {len(tokens)} tokens")
    merges = _merges(vocabulary, ids, scores)
    unknown = vocabulary.named("unknown_token_id")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = vocabulary.section.get("add_space_prefix", bool) is not False
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    # Phi 3's markers swallow the white space behind them; nothing in the file says so.
    swallow = architecture == "phi3"
    plain = frozenset({"<unk>", "<s>", "<|endoftext|>"})
    _add_tokens(tokenizer, vocabulary, frozenset(tokens) - plain if swallow else frozenset())
    return tokenizer


def _merges(vocabulary: _Vocabulary, ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best first."""
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((-score, len(left), len(right), left, right))
    pairs.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in pairs]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, swallow: frozenset[str]) -> None:
    """Tokens that are matched whole in the text, before it is split. ``swallow``: those that take the white space
    behind them along."""
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        found: Iterable[str] = (t for t, k in zip(vocabulary.tokens, vocabulary.types, strict=True) if k == kind)
        added = [
            AddedToken(token, rstrip=token in swallow, normalized=False, special=special)
            for token in found
            if token.strip(_SPACE)
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _post_processor(vocabulary: _Vocabulary, bos: str | None, eos: str | None) -> processors.PostProcessor | None:
    """What encloses a text when special tokens are asked for."""
    if bos is None and eos is None:
        return None
    ids = vocabulary.ids()
    around = [[bos] if bos else [], [eos] if eos else []]

    def enclose(name: str, sequence: int) -> list[str]:
        return [f"{t}:{sequence}" for t in around[0]] + [f"${name}:{sequence}"] + [f"{t}:{sequence}" for t in around[1]]

    return processors.TemplateProcessing(
        single=enclose("A", 0),
        pair=enclose("A", 0) + enclose("B", 1),
        special_tokens=[(token, ids[token]) for token in {*around[0], *around[1]}],
    )


def _chat_template(section: Section) -> str | list[dict[str, str]] | None:
    """The template, or, if the file names several, all of them as Hugging Face spells it."""
    default = section.get("chat_template", str)
    prefix = "chat_template."
    named = {key.removeprefix(prefix): section.need(key, str) for key in section.values if key.startswith(prefix)}
    if not named:
        return default
    if default is not None:
        named = {"default": default} | named
    return [{"name": name, "template": text} for name, text in named.items()]


def _generation_config(section: Section) -> dict[str, Any]:
    """Every id that the file names as an end: of the text, of a turn, of a message."""
    ends = (section.get(f"{kind}_token_id", int) for kind in ("eos", "eot", "eom"))
    config: dict[str, Any] = {"eos_token_id": sorted({end for end in ends if end is not None})}
    for role in ("bos", "pad"):
        if (index := section.get(f"{_ROLES[role]}_token_id", int)) is not None:
            config[f"{role}_token_id"] = index
    return config
