"""PEFT adapters as models: one folder with what the adapter and its base say."""

import hashlib
import json
from pathlib import Path

from tgi.core.headers import replaced
from tgi.core.model_config import read_config
from tgi.launcher import layout

_HEADS = ("lm_head.weight", "embed_out.weight")


def join(folder: Path, base: Path, weights: Path, cache: Path) -> Path:
    """The folder under ``cache`` with the base's config and, where the adapter has one of its own, its tokenizer.

    An adapter that holds the head as a whole unties it from the embedding.
    """
    names = sorted(path.name for path in base.iterdir())
    files: dict[str, str | Path] = {name: base / name for name in layout.matching(names, layout.SMALL_FILES)}
    own = layout.matching(sorted(path.name for path in folder.iterdir()), layout.TOKENIZER)
    if "tokenizer.json" in own:
        files = {name: path for name, path in files.items() if not layout.matching([name], layout.TOKENIZER)}
        files |= {name: folder / name for name in own}
    config = read_config(base)
    if not replaced(weights).keys().isdisjoint(_HEADS):
        config["tie_word_embeddings"] = False
    files["config.json"] = json.dumps(config, indent=2)
    key = hashlib.sha256(repr(files).encode()).hexdigest()
    made = cache / f"{folder.name}-{key[:16]}"
    return made if made.is_dir() else layout.write_folder(made, files)
