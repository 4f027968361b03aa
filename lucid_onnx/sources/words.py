"""Texts to ids by a list of words, which needs no package."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .text import Bags, Text


class Words(Text):
    """A row for each word of a list; texts are split at white space.

    A piece of a text is looked up as it is, then without the punctuation around it, then that in lower case. What is
    not found is left out. Of a word that occurs twice in the list, the first row counts.

    Args:
        words: the word of each row.
        name: of the file they are from, as messages begin.

    Raises:
        ValueError: a word has a line break.
    """

    kind = "words"
    suffix = "words.txt"

    def __init__(self, words: Iterable[str], name: str) -> None:
        self._words = list(words)
        for row, word in enumerate(self._words):
            if "\n" in word:
                raise ValueError(f"{name}: the word of row {row}, {word[:40]!r}, has a line break")

    def __len__(self) -> int:
        return len(self._words)

    def bags(self, texts: Sequence[str]) -> Bags:
        row_of = self._rows.get
        lists = []
        for text in texts:
            rows = []
            for piece in text.split():
                row = row_of(piece)
                if row is None:
                    bare = piece.strip(string.punctuation)
                    row = row_of(bare)
                    if row is None:
                        row = row_of(bare.lower())
                if row is not None:
                    rows.append(row)
            lists.append(rows)
        return Bags.of(lists)

    @functools.cached_property
    def _rows(self) -> Mapping[str, int]:
        rows = {word: row for row, word in zip(range(len(self) - 1, -1, -1), reversed(self._words), strict=True)}
        rows.pop("", None)
        return rows

    def describe(self) -> str:
        return f"{len(self):,} words; texts are split at white space"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def content(self) -> bytes:
        return "\n".join(self._words).encode("utf-8", "replace")

    @classmethod
    def load(cls, settings: Mapping[str, Any], content: bytes, name: str) -> Words:
        return cls(content.decode("utf-8", "replace").split("\n"), name)
