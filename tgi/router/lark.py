"""Grammars under construction, in llguidance's Lark. Knows the model's special tokens, which are no text there; knows
no tool and no request.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

ANY = r"/(.|\n)*/"

MOST_SPACE = 20
"""White space that may stand between the words of a spelling."""


class Lark:
    """Rules, added one by one, and expressions to make them of."""

    def __init__(self, special: Mapping[str, int], ends: Collection[int] = (), free: Collection[int] = ()) -> None:
        """``special``: those special tokens that will be spelled, text → id; ``ends``: tokens that end a reply, which
        therefore need no spelling; ``free``: special tokens that may stand in any text."""
        self._special = dict(special)
        self._ends = frozenset(ends)
        self._marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._lines: list[str] = []
        self._names = 0
        self._aside = self._before = ""
        if free:
            # llguidance follows one only of two ranges that a token is in: those that are spelled stand by themselves.
            apart = set(special.values()) & set(free)
            sets = filter(None, [set(free) - apart, *({id} for id in sorted(apart))])
            one = self.rule(" | ".join(f"<[{_ranges(ids)}]>" for ids in sets))
            self._aside = self.rule(f"({ANY} {one})*")
            if hidden := set(free) - set(special.values()):
                self._before = self.rule(f"<[{_ranges(hidden)}]>*")

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def name(self) -> str:
        """Of a rule that will be added."""
        self._names += 1
        return f"r{self._names}"

    def rule(self, right: str, name: str = "", *, lazy: bool = False) -> str:
        """Add a rule; returns its name. ``lazy``: a regex that ends as early as it can."""
        name = name or self.name()
        self._lines.append(f"{name}{'[lazy]' if lazy else ''}: {right}")
        return name

    def spelled(self, text: str) -> str:
        """Exactly this."""
        parts, at = list[str](), 0
        for mark in self._marks.finditer(text):
            parts += _quoted(text[at : mark.start()]), self._token(mark.group())
            at = mark.end()
        parts.append(_quoted(text[at:]))
        return " ".join(filter(None, parts)) or '""'

    def text(self) -> str:
        """Any text."""
        return f"{self._aside} {ANY}"

    def upto(self, marks: Sequence[str], *, anchored: bool = False) -> str:
        """Any text, or only white space, and then these in a row, where they come first. Special tokens that aren't
        spelled with may stand before."""
        return f"{self._before if anchored else self._aside} {self.closed(marks, anchored=anchored)}"

    def closed(self, marks: Sequence[str], *, anchored: bool = False) -> str:
        """The same without special tokens."""
        before = _SPACE if anchored else _TEXT
        parts = list[str]()
        for special, run in groupby(marks, self._special.__contains__):
            if special:
                for mark in run:
                    parts.append(f"/{before}/ {self._token(mark)}")
                    before = _SPACE
            else:
                parts.append(self._regex(before, list(run)))
                before = _SPACE
        return " ".join(parts)

    def bounded(self, regexes: Iterable[str], closes: str) -> str:
        """Text without a mark that all of these match, and then the mark."""
        mark = closes.strip()
        wanted = [f"/{_slashed(regex)}/" for regex in regexes]
        terminal = self.name().upper()
        if mark in self._special:
            before = _quoted(closes.partition(mark)[0])
            self.rule(f"({' & '.join(wanted)}) {before}", terminal)
            return f"{terminal} {self._token(mark)}"
        wanted.append(f"/{_without(mark)}/")
        self.rule(f"({' & '.join(wanted)}) {_quoted(closes)}", terminal)
        return terminal

    def json(self, schema: str) -> str:
        return self.rule(f"%json {schema}")

    def either(self, alternatives: Iterable[str]) -> str:
        return self.rule(" | ".join(alternatives))

    def _regex(self, before: str, marks: Sequence[str]) -> str:
        return self.rule(f"/{before}{_SPACE.join(map(_escaped, marks))}/", lazy=True)

    def _token(self, mark: str) -> str:
        id = self._special[mark]
        return "" if id in self._ends else f"<[{id}]>"


_TEXT = r"(.|\n)*"
_SPACE = rf"[ \t\r\n]{{0,{MOST_SPACE}}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    return _slashed(re.escape(text)).replace("\n", "n")


def _slashed(regex: str) -> str:
    """A regex as it stands between slashes."""
    return re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], regex, flags=re.DOTALL)


def _without(mark: str) -> str:
    """A regex of texts without a mark, whose first character stands nowhere else in it. As the complement of those with
    it, llguidance would look through all lengths that are allowed to find that nothing goes on behind the mark."""
    first, *others = (f"\\x{{{ord(character):x}}}" for character in mark)
    begun = broken = ""
    for character in reversed(others):
        broken = f"(?:[^{character}{first}]" + (f"|{character}{broken})" if broken else ")")
    for character in reversed(others[:-1]):
        begun = f"(?:{character}{begun})?"
    return f"(?:[^{first}]|(?:{first}{begun})*{first}{broken})*(?:{first}{begun})*"


def _ranges(ids: Iterable[int]) -> str:
    """1, 2, 3, 7 → "1-3,7"."""
    runs = (list(run) for _, run in groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0]))
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
