"""Texts to vectors by a model's file and the file beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lucid_onnx.runtime.installation import load_onnxruntime
from lucid_onnx.runtime.session import InferenceSession

from .fasttext.graph import HOW_MANY, LABELS, PROBABILITIES
from .fasttext.text import FastTextWords
from .text import ENTRY, Text, read
from .tokenizer import Tokenizer
from .words import Words

#: What may encode the texts of a model.
KINDS: tuple[type[Text], ...] = (Tokenizer, Words, FastTextWords)
_DTYPES: Mapping[str, np.dtype] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}


class TextEncoder:
    """Encodes texts with a model that `lucid_onnx.import_model` or ``lucid-onnx import`` made.

    Args:
        model: its .onnx file, with the files beside it.
        session: a session on the model, if there is one already.
        **options: of the session that is opened otherwise; see `lucid_onnx.InferenceSession`.

    Raises:
        OSError: a file cannot be read.
        TypeError: a session and options of another.
        ValueError: the model has nothing that encodes texts, or not as it was written.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, session: InferenceSession | None = None, **options: Any
    ) -> None:
        self._name = os.fspath(model)
        if session is not None and options:
            raise TypeError(f"session given, and options of another: {', '.join(options)}")
        self._session = session or InferenceSession(self._name, **{"session_options": _patient(), **options})
        metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        if ENTRY not in metadata:
            raise ValueError(f"{self._name}: its metadata does not say what encodes texts: it was not imported")
        self._text = read(self._name, metadata[ENTRY], KINDS)
        inputs = self._session.get_inputs()
        self._inputs = {i.name: _DTYPES[i.type] for i in inputs if i.type in _DTYPES}
        if set(self._inputs) not in self._text.inputs() or len(self._inputs) != len(inputs):
            takes = ", ".join(f"{i.name} {i.type}" for i in inputs)
            raise ValueError(f"{self._name}: takes {takes or 'nothing'}, which no ids of texts are")

    @property
    def session(self) -> InferenceSession:
        """The session that runs the model."""
        return self._session

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64.

        Raises:
            ImportError: a package that encodes texts is not installed.
        """
        bags = self._text.bags(list(texts))
        return np.split(bags.ids, bags.offsets[1:-1]) if len(texts) else []

    @property
    def has_labels(self) -> bool:
        """Whether the model labels texts, as `predict` wants it."""
        return HOW_MANY in self._inputs

    def feeds(self, texts: Sequence[str], k: int | None = None) -> dict[str, np.ndarray]:
        """The inputs of the model for some texts.

        Args:
            k: how many labels of each text, of a model that has such; 1 if not given.

        Raises:
            ImportError: as `ids`.
            ValueError: a k below 1, or the model has no labels.
        """
        if k is not None and k < 1:
            raise ValueError(f"k = {k} must be at least 1")
        if k is not None and not self.has_labels:
            raise ValueError(f"{self._name}: has no labels to predict")
        found = self._text.feeds(list(texts), set(self._inputs))
        if self.has_labels:
            found[HOW_MANY] = np.array([1 if k is None else k])
        return {name: array.astype(self._inputs[name], copy=False) for name, array in found.items()}

    def run(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """All outputs of the model for some texts, by name: a row per text, and in ``word_embeddings`` one per word.

        Args:
            texts: any number of them.
            batch_size: how many are encoded at a time.
            progress: called with the texts that are done and their number.

        Raises:
            ImportError: as `ids`.
            TypeError: a text that is not a string.
            ValueError: a batch_size below 1.
        """
        return self._run([o.name for o in self._session.get_outputs()], texts, None, batch_size, progress)

    def predict(
        self,
        texts: Sequence[str],
        k: int = 1,
        *,
        batch_size: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labels of texts by a model that has such, and their probabilities: [len(texts), k] strings, and float32.

        Args:
            k: how many of each text, the most probable first; at most as many as there are. Where a text has fewer, the
                others are "" with the probability 0.
            texts, batch_size, progress: as in `run`.

        Raises:
            ValueError: a k below 1, or the model has no labels.
            TypeError, ImportError: as `run`.
        """
        found = self._run([LABELS, PROBABILITIES], texts, k, batch_size, progress)
        return found[LABELS], found[PROBABILITIES]

    def _run(
        self,
        names: Sequence[str],
        texts: Sequence[str],
        k: int | None,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """Outputs of the model for texts; ``k`` as in `feeds`."""
        if isinstance(texts, str):
            raise TypeError("texts is a string, expected a sequence of strings")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        texts = list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{number}] is a {type(text).__name__}, expected a string")
        parts: list[list[Any]] = []
        for begin in range(0, max(len(texts), 1), batch_size):
            parts.append(self._session.run(names, self.feeds(texts[begin : begin + batch_size], k)))
            if progress is not None:
                progress(min(begin + batch_size, len(texts)), len(texts))
        return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The vectors of texts, [len(texts), D]; of one string its vector, [D]. It is the model's first output.

        Args:
            texts, batch_size, progress: as in `run`.

        Raises:
            ImportError, TypeError, ValueError: as `run`.
        """
        several = [texts] if isinstance(texts, str) else texts
        first = next(iter(self.run(several, batch_size=batch_size, progress=progress).values()))
        return first[0] if isinstance(texts, str) else first


def _patient() -> Any:
    """Options of a session whose threads do not spin after a run: the tokenizer's threads want the cores then."""
    options = load_onnxruntime().SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
