"""What turns texts into the ids of a model: saved in a file beside the model, which names it in its metadata.

Each kind is a subclass of `Text`, and a line in `KINDS` of the module `encoder`.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lucid_onnx.builder import TEXT_ENTRY as ENTRY
from lucid_onnx.builder import is_plain_name

#: The inputs of a model of padded texts, and of one of ragged ones.
PADDED, RAGGED = frozenset({"input_ids", "attention_mask"}), frozenset({"ids", "offsets"})
_FILE, _DIGEST, _KIND = "file", "sha256", "kind"


class Bags(NamedTuple):
    """The ids of some texts, one text after another."""

    ids: np.ndarray  #: int64 [num_ids]
    offsets: np.ndarray  #: int64 [num_texts + 1]; text i has ids[offsets[i]:offsets[i + 1]]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Bags:
        """From the ids of each text."""
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        flat = np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(offsets[-1]))
        return cls(flat, offsets)


class Text(abc.ABC):
    """Turns texts into ids, and goes into a file and back.

    Attributes:
        kind: its name in a model's metadata.
        suffix: of its file, which is called ``<model>.<suffix>``.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str]

    @abc.abstractmethod
    def bags(self, texts: Sequence[str]) -> Bags:
        """The ids of texts.

        Raises:
            ImportError: a package that this needs is not installed; the message says which.
        """

    def inputs(self) -> Sequence[frozenset[str]]:
        """The names of the inputs that `feeds` knows: one set for each way that a model may take texts."""
        return (PADDED, RAGGED)

    def feeds(self, texts: Sequence[str], inputs: Set[str]) -> dict[str, np.ndarray]:
        """The inputs of a model for texts, int64; they are one of `inputs`.

        Raises:
            ImportError: as `bags`.
        """
        bags = self.bags(texts)
        return {"ids": bags.ids, "offsets": bags.offsets[:-1]} if inputs == RAGGED else _padded(bags)

    @abc.abstractmethod
    def describe(self) -> str:
        """What it is, in a line."""

    @abc.abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What is small, for JSON in the model's metadata."""

    @abc.abstractmethod
    def content(self) -> bytes:
        """The content of its file."""

    @classmethod
    @abc.abstractmethod
    def load(cls, settings: Mapping[str, Any], content: bytes, name: str) -> Text:
        """From `settings` and `content`.

        Args:
            name: of the file, as messages begin.

        Raises:
            ValueError: they are not what `settings` and `content` give.
        """


def entry(text: Text, name: str, content: bytes) -> str:
    """The metadata of a text side whose content is in a file of this name."""
    found = {_KIND: text.kind, _FILE: name, _DIGEST: hashlib.sha256(content).hexdigest(), **text.settings()}
    return json.dumps(found, ensure_ascii=False)


def read(model: str, found: str, kinds: Iterable[type[Text]]) -> Text:
    """The text side that the metadata of a model's file describes.

    Args:
        model: the path of the model.
        found: the entry `ENTRY` of its metadata.

    Raises:
        OSError: the file beside the model cannot be read.
        ValueError: the entry or the file is not what `Imported.save` wrote.
    """
    try:
        settings = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{model}: its metadata {ENTRY} is not JSON: {error}") from error
    match settings:
        case {"kind": str(kind), "file": str(name), "sha256": str(digest)}:
            pass
        case _:
            raise ValueError(f"{model}: its metadata {ENTRY} has no kind, file and sha256")
    known = {k.kind: k for k in kinds}
    if kind not in known:
        raise ValueError(f"{model}: its texts are encoded by {kind[:40]!r}, which is not one of {', '.join(known)}")
    if not is_plain_name(name):
        raise ValueError(f"{model}: its metadata {ENTRY} names the file {name[:100]!r}, outside of the model's folder")
    path = Path(model).with_name(name)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path}: is not the file that {model} was written with; import the model again")
    rest = {key: value for key, value in settings.items() if key not in (_KIND, _FILE, _DIGEST)}
    return known[kind].load(rest, content, str(path))


def _padded(bags: Bags) -> dict[str, np.ndarray]:
    lengths = np.diff(bags.offsets)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = bags.ids
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
