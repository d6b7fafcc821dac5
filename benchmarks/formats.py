"""docs/quantization.md, made of the page beside this file, the tables in the code and what was measured."""

from pathlib import Path
from string import Template

from records import Data
from report import quality_table
from tgi.launcher.flags import FLAGS
from tgi.quantization.scheme import METHODS, REFUSED

_PAGE = Path(__file__).with_name("quantization.md")
_RESULTS = Path(__file__).with_name("results") / "formats.jsonl"


def document() -> str:
    """The page."""
    methods = [
        f"| `{name}` | {row.description} | [{row.module.rpartition('.')[2]}](../{row.module.replace('.', '/')}.py) |"
        for name, row in METHODS.items()
    ]
    return Template(_PAGE.read_text()).substitute(
        methods="\n".join(methods),
        refused="\n".join(
            f"| {', '.join(f'`{name}`' for name in REFUSED if REFUSED[name] == why)} | {why} |"
            for why in dict.fromkeys(REFUSED.values())
        ),
        quantize=next(flag.help for flag in FLAGS if flag.key == "quantize"),
        quality="\n".join(quality_table(Data.read([_RESULTS]))),
    )
