"""What turns texts into the ids of a model that was fastText's: the beginning of its file, which has the words."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from lucid_onnx.sources.text import RAGGED, Bags, Text

from .graph import HOW_MANY
from .reader import Head, read_head
from .words import Hashing, WordRows


class FastTextWords(Text):
    """fastText's words and n-grams.

    Args:
        head: what the file says of them.
    """

    kind = "fasttext"
    suffix = "fasttext"

    def __init__(self, head: Head) -> None:
        self._head = head

    @functools.cached_property
    def _rows(self) -> WordRows:
        return WordRows(Hashing.of(self._head))

    def bags(self, texts: Sequence[str]) -> Bags:
        if self._head.kind == "supervised":
            found = self._rows.texts(texts)
            return Bags(found.indices, np.append(found.offsets, len(found.indices)))
        words = self._rows.sentences(texts)
        starts = np.append(words.word_offsets, len(words.indices))
        return Bags(words.indices, starts[np.append(words.offsets, len(words.word_offsets))])

    def feeds(self, texts: Sequence[str], inputs: Set[str]) -> dict[str, np.ndarray]:
        found = self._rows.texts(texts) if self._head.kind == "supervised" else self._rows.sentences(texts)
        named = found._asdict()
        return {"ids": named.pop("indices"), **named}

    def inputs(self) -> Sequence[frozenset[str]]:
        return (RAGGED | {HOW_MANY if self._head.kind == "supervised" else "word_offsets"},)

    def describe(self) -> str:
        a = self._head.arguments
        parts = [f"{len(self._head.words):,} words"]
        if a.maxn > 0:
            parts.append(f"their pieces of {max(a.minn, 1)} to {a.maxn} characters")
        if self._head.kind == "supervised" and a.word_ngrams > 1:
            parts.append(f"up to {a.word_ngrams} words together")
        if self._head.has_ngrams:
            kept = "" if self._head.kept is None else f", of which {len(self._head.kept[0]):,} are kept"
            parts.append(f"in {a.bucket:,} buckets{kept}")
        return ", ".join(parts)

    def settings(self) -> Mapping[str, Any]:
        return {}

    def content(self) -> bytes:
        return self._head.content

    @classmethod
    def load(cls, settings: Mapping[str, Any], content: bytes, name: str) -> FastTextWords:
        if settings:
            raise ValueError(
                f"{name}: the model's metadata has {dict(settings)} for fastText's words, expected nothing"
            )
        return cls(read_head(content, name))
