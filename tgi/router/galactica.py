"""Galactica's text rule (Taylor et al., arXiv 2211.09085): inside of sequences each character is a token of its own.

Its tokenizer cuts where it finds a marker, and removes it; so the marker is put between the characters.
"""

import itertools
import re
from bisect import bisect_left

MARKER = "SPL1T-TH1S-Pl3A5E"
"""The tokenizer's own."""

_SEQUENCE = re.compile(r"\[START_(DNA|SMILES|I_SMILES|AMINO)](.*?)\[END_\1]")


class Marked:
    """A text with its markers."""

    def __init__(self, text: str) -> None:
        places = [place for match in _SEQUENCE.finditer(text) for place in range(match.start(2), match.end(2) + 1)]
        cuts = [0, *places, len(text)]
        self.text = MARKER.join(text[start:stop] for start, stop in itertools.pairwise(cuts))
        self._markers = [place + number * len(MARKER) for number, place in enumerate(places)]

    def origin(self, place: int) -> int:
        """Where in the given text is what is at this place of the marked one, which is not within a marker."""
        return place - bisect_left(self._markers, place) * len(MARKER)
