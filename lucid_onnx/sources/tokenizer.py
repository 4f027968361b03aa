"""Texts to ids by a tokenizer.json, which the package tokenizers reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .text import Bags, Text

_MAX_CHARACTERS, _PREFIX = "max_characters", "prefix"


class Tokenizer(Text):
    """A tokenizer of the package tokenizers, without special tokens around a text.

    Args:
        description: the JSON of tokenizer.json.
        name: of the file it is from, as messages begin.
        max_characters: longer texts are cut off before they are tokenized.
        prefix: what is put before each text.

    Raises:
        ValueError: the JSON is not that of a tokenizer.
    """

    kind = "tokenizer"
    suffix = "tokenizer.json"

    def __init__(
        self, description: Mapping[str, Any], name: str, *, max_characters: int | None = None, prefix: str = ""
    ) -> None:
        match description:
            case {"model": {"type": str()}}:
                pass
            case {"model": {"vocab": _}}:  # files of old releases name no type
                pass
            case _:
                raise ValueError(f"{name}: is not a tokenizer of the package tokenizers: it has no model")
        self._description, self._name = description, name
        self._max_characters, self._prefix = max_characters, prefix

    def with_settings(
        self, *, max_length: int | None = None, keeps_truncation: bool = False, max_characters: int | None = None
    ) -> Tokenizer:
        """The same without padding, and cut off at ``max_length`` tokens, or never, or as it says itself."""
        changed = {**self._description, "padding": None}
        if not keeps_truncation:
            changed["truncation"] = None
        if max_length is not None:
            changed["truncation"] = {
                "direction": "Right",
                "max_length": max_length,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        return Tokenizer(changed, self._name, max_characters=max_characters, prefix=self._prefix)

    def with_prefix(self, prefix: str) -> Tokenizer:
        """The same with another prefix."""
        return Tokenizer(self._description, self._name, max_characters=self._max_characters, prefix=prefix)

    def bags(self, texts: Sequence[str]) -> Bags:
        cut = self._max_characters
        given = [self._prefix + t if cut is None else (self._prefix + t)[:cut] for t in texts]
        tokenizer = self._tokenizer
        encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        return Bags.of([encoding.ids for encoding in encode(given, add_special_tokens=False)])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise ImportError("the package tokenizers is not installed: pip install 'lucid-onnx[text]'") from error
        try:
            return Loaded.from_str(self._text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{self._name}: tokenizers cannot read it: {error}") from error

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of each token, added ones too.

        Raises:
            ValueError: the file does not list its tokens.
        """
        vocab = self._description["model"].get("vocab")
        added = self._description.get("added_tokens") or []
        try:
            pairs = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
            found = {str(token): int(number) for token, number in pairs}
            found.update({str(token["content"]): int(token["id"]) for token in added})
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{self._name}: its vocabulary is not that of a tokenizer") from error
        return found

    @property
    def unknown(self) -> int | None:
        """The id of the token that stands for what the vocabulary has not."""
        model = self._description["model"]
        if "unk_id" in model:
            number = model["unk_id"]
            return number if isinstance(number, int) else None
        token = model.get("unk_token")
        return self.vocabulary.get(token) if isinstance(token, str) else None

    def describe(self) -> str:
        kind = self._description["model"].get("type", "a tokenizer of no stated type")
        truncation = self._description.get("truncation") or {}
        cut = f", cut off at {truncation['max_length']} tokens" if "max_length" in truncation else ""
        return f"{kind}, {len(self.vocabulary):,} tokens{cut}"

    def settings(self) -> Mapping[str, Any]:
        found = {_MAX_CHARACTERS: self._max_characters, _PREFIX: self._prefix or None}
        return {key: value for key, value in found.items() if value is not None}

    @functools.cached_property
    def _text(self) -> str:
        return json.dumps(self._description, ensure_ascii=False)

    def content(self) -> bytes:
        return self._text.encode("utf-8", "surrogatepass")

    @classmethod
    def load(cls, settings: Mapping[str, Any], content: bytes, name: str) -> Tokenizer:
        cut, prefix = settings.get(_MAX_CHARACTERS), settings.get(_PREFIX, "")
        if not (cut is None or (isinstance(cut, int) and cut >= 0)) or not isinstance(prefix, str):
            raise ValueError(f"{name}: the model's metadata has {dict(settings)} for a tokenizer")
        return cls(parse(content, name), name, max_characters=cut, prefix=prefix)


def parse(content: bytes, name: str) -> dict[str, Any]:
    """A file of JSON with an object in it.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: is not a JSON object")
    return found
