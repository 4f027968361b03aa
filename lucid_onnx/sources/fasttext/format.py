"""fastText's .bin and .ftz as a format of `import_model`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lucid_onnx.builder import convert
from lucid_onnx.sources.graphs import Static, loss
from lucid_onnx.sources.imported import Imported, Options, add_metadata

from . import graph, reader
from .text import FastTextWords

_LOSSES = {
    "hs": "hierarchical softmax",
    "ns": "negative sampling",
    "softmax": "softmax",
    "ova": "one against all",
}
#: What `import_model` can be told that says nothing of such a model.
_NOT_OURS = ("normalize", "key", "tokenizer", "vocabulary")


class FastText:
    """A model that fastText has saved, quantized or not."""

    name = "fasttext"
    files = "a .bin or .ftz file of fastText"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and reader.is_fasttext(path)

    def load(self, path: Path, options: Options) -> Imported:
        for name in _NOT_OURS:
            if getattr(options, name) is not None:
                raise ValueError(f"{name} = {getattr(options, name)!r} is given, but a fastText model has no {name}")
        if options.layout == "padded":
            raise ValueError("layout = 'padded', but fastText's models take 'ragged' ids, many of them to a word")
        model = reader.read(path)
        made = graph.build(model, options)
        text = FastTextWords(model.head)
        found = _found(model, path, options, text)
        if options.dtype is not None and options.sample:
            table = model.input if isinstance(model.input, np.ndarray) else graph.decoded(model.input)
            lines = dataclasses.replace(options, sample=[text.replace("\n", " ") for text in options.sample])
            if lost := loss(Static(table, output=np.dtype(np.float32)), text, lines):
                found["loss"] = lost
        add_metadata(made.model, found)
        convert(made.model, options.form)
        return Imported(made.model, made.tables, found, text)


def _found(model: reader.Model, path: Path, options: Options, text: FastTextWords) -> dict[str, str]:
    head, table = model.head, model.input
    supervised = head.kind == "supervised"
    dtype = "float32"
    if isinstance(table, reader.Quantized):
        pieces = table.codes.shape[1]
        dtype = f"product-quantized, {pieces} bytes a row" + ("" if table.norms is None else " and one for its norm")
    if options.dtype is not None and options.dtype != dtype:
        dtype += f", written as {options.dtype}"
    found = {
        "format": f"fastText, version {head.version} of its files",
        "source": path.name,
        "model": f"{head.kind}, {_LOSSES[head.loss]}",
        "rows": f"{table.shape[0]:,}",
        "embedding_dim": str(table.shape[1]),
        "dtype": dtype,
        "pooling": "mean" if supervised else "mean of the rows of a word; mean of the words of a text",
        "normalisation": "none" if supervised else "words to length 1",
        "texts": text.describe(),
    }
    if supervised:
        found["labels"] = f"{len(head.labels):,}"
    return found
