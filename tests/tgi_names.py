"""TGI by name, from the file beside this one: section → names."""

import configparser
from collections.abc import Mapping
from pathlib import Path


def _read() -> Mapping[str, list[str]]:
    names = configparser.ConfigParser(allow_no_value=True, delimiters="=")
    names.optionxform = str  # type: ignore[method-assign, assignment]  # how configparser is told to keep the case
    names.read(Path(__file__).with_suffix(".ini"))
    return {section: list(names[section]) for section in names.sections()}


TGI_NAMES = _read()
