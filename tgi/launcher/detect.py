"""Whether a text carries the watermark: tokenized as the model does, tested by ``core.watermark``, told in words or as
JSON. Needs no weights."""

import json
import sys
from pathlib import Path

from tgi.core.errors import StartupError
from tgi.core.model_config import integer, read_config
from tgi.core.watermark import Detection, detect
from tgi.launcher.download import Store, resolve_description
from tgi.launcher.flags import Options


def detect_watermark(options: Options, store: Store) -> bool:
    """Print what the text shows; whether that is a watermark. Raises StartupError, or OSError for the file."""
    text = _read(options.file)
    folder = resolve_description(options.model_id, options.revision, store)
    vocabulary = integer(read_config(folder), "vocab_size")
    try:
        found = detect(_ids(text, folder), vocabulary, options.watermark_gamma, repeats=options.count_repeats)
    except ValueError as error:
        raise StartupError(f"{options.model_id}: {error}") from None
    print(_as_json(found, options) if options.json else _in_words(found, options.threshold))
    return found.z >= options.threshold


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise StartupError(f"{'standard input' if file == '-' else file} is not UTF-8: {error}") from None


def _ids(text: str, folder: Path) -> list[int]:
    """The text's tokens, without those that a tokenizer adds at the ends of a prompt."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise StartupError(f"{path} can't be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _as_json(found: Detection, options: Options) -> str:
    return json.dumps(
        {
            "watermarked": found.z >= options.threshold,
            "z": found.z,
            "p": found.p,
            "scored": found.scored,
            "green": found.green,
            "gamma": options.watermark_gamma,
            "threshold": options.threshold,
        }
    )


def _in_words(found: Detection, threshold: float) -> str:
    if found.z >= threshold:
        verdict = "watermarked"
    else:
        verdict = "not watermarked" if found.best_z >= threshold else "too short to show a watermark"
    seen = f"{found.green} of {found.scored} pairs of tokens are green"
    if found.scored:
        seen += f" ({found.green / found.scored:.0%}; by chance {found.share:.0%})"
    return f"{verdict}: z = {found.z:.2f} (threshold {threshold:g}), p = {found.p:.2g}\n{seen}"
