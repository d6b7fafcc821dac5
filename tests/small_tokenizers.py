"""One tiny tokenizer of each kind that models use, trained on the spot; real in every part but size."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "hello world, this is a small text about cats and dogs",
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x + 1\n",
    "a cat sat on the mat; the dog sat on the cat",
    "größe naïve 你好 世界",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: byte-level BPE. Some added tokens are no part of its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("▷ok")])
    tokenizer.add_special_tokens(["<|im_end|>", "<|end▁of▁text|>"])
    return tokenizer


def llama() -> Tokenizer:
    """Llama 2, Mistral: SentencePiece BPE with byte fallback and a space put before the text."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def gemma() -> Tokenizer:
    """Gemma: as Llama 2, but every space is the text's own."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """T5, XLNet: SentencePiece unigram."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram_first() -> Tokenizer:
    """SentencePiece unigram as newer conversions have it: a space is put only before the text's very beginning."""
    return _metaspace("first")


def unigram_never() -> Tokenizer:
    """SentencePiece unigram without the space before the text."""
    return _metaspace("never")


def unigram_bytes() -> Tokenizer:
    """Gemma's and T5's cousins: SentencePiece unigram with byte fallback, decoded as Llama 2 is."""
    model = json.loads(unigram().to_str())["model"]
    known = [(token, score) for token, score in model["vocab"] if token not in SPECIALS]
    vocab = [*((token, 0.0) for token in SPECIALS), *((byte, -99.0) for byte in BYTES), *known]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def byte_level_prefix() -> Tokenizer:
    """RoBERTa, GPT-2 as some use it: byte-level BPE that puts a space before the text."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def byte_level_added() -> Tokenizer:
    """Byte-level BPE with added tokens of every kind: those that take the spaces beside them along, those that are
    whole words only, those in the middle of words, those that look like bytes."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True),
            AddedToken("mat", single_word=True),
            AddedToken("rown"),
            AddedToken("é"),
            AddedToken("  "),
            AddedToken("<0x41>"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<|both|>", lstrip=True, rstrip=True), AddedToken("ö!")])
    return tokenizer


def word_piece_cleanup() -> Tokenizer:
    """BERT's family as published: no space before punctuation."""
    tokenizer = word_piece()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's family."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_suffix() -> Tokenizer:
    """GPT-1: BPE that marks the ends of words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words and no decoder at all."""
    names = SPECIALS + sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    build.__name__: build
    for build in (
        byte_level,
        byte_level_prefix,
        byte_level_added,
        llama,
        gemma,
        unigram,
        unigram_first,
        unigram_never,
        unigram_bytes,
        word_piece,
        word_piece_cleanup,
        word_suffix,
        words,
    )
}


@cache
def serialized(kind: str) -> str:
    return KINDS[kind]().to_str()


def write(folder: Path, kind: str = "byte_level", **files: object) -> Path:
    """A model folder: tokenizer.json and, by name without ending, further JSON files. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(serialized(kind), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _metaspace(prepend: str) -> Tokenizer:
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """BPE over ▁-marked words, trained, then given the byte tokens that training knows nothing of."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = [*SPECIALS, *BYTES, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: id for id, name in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens([AddedToken("<think>")])
    return tokenizer
